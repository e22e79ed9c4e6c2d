"""`python3 -m fastchat.serve.multi_model_worker`: one worker that holds several models."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fastchat.errors import ConfigError
from fastchat.serve.arguments import create_parser, run_command
from fastchat.serve.settings import parse_settings
from fastchat.serve.worker_arguments import add_model_flags, add_worker_flags
from fastchat.serve.worker_command import run_worker
from fastchat.worker.config import ModelSpec


def create_multi_model_worker_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = create_parser(
        "multi_model_worker",
        "A worker with several models: --model-path A --model-names a --model-path B --model-names b.",
        epilog="Each model has its own engine, so none waits for another. Sizes are for each model. Listens on this "
        "machine only; --host 0.0.0.0 lets the API servers of other machines in, which need this cluster's token.",
    )
    add_model_flags(parser, is_repeatable=True)
    add_worker_flags(parser)
    return parser


def model_specs(arguments: argparse.Namespace) -> tuple[ModelSpec, ...]:
    """One model for each `--model-path`; names and templates belong to the paths in their order."""
    num_models = len(arguments.model_path)
    names = arguments.model_names or [()] * num_models
    if len(names) != num_models:
        raise ConfigError(
            f"--model-names was given {len(names)} times and --model-path {num_models} times; give each path its names."
        )
    templates = arguments.conv_template or [None]
    if len(templates) == 1:
        templates = templates * num_models
    if len(templates) != num_models:
        raise ConfigError(
            f"--conv-template was given {len(templates)} times and --model-path {num_models} times; give it once, or "
            "once for each path."
        )
    return tuple(
        ModelSpec(Path(path), tuple(own_names), template)
        for path, own_names, template in zip(arguments.model_path, names, templates, strict=True)
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the worker until a signal ends it; returns the exit code."""
    arguments = parse_settings(create_multi_model_worker_parser(), argv)
    return run_worker("multi_model_worker", arguments, model_specs(arguments))


if __name__ == "__main__":
    run_command(main)
