"""`python3 -m fastchat.serve.model_worker`: loads one model and serves it to the API server."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fastchat.serve.arguments import create_parser, run_command
from fastchat.serve.settings import parse_settings
from fastchat.serve.worker_arguments import add_model_flags, add_worker_flags
from fastchat.serve.worker_command import run_worker
from fastchat.worker.config import ModelSpec


def create_model_worker_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = create_parser(
        "model_worker",
        "A worker: loads a model and computes its answers.",
        epilog="Listens on this machine only; --host 0.0.0.0 lets the API servers of other machines in, which need "
        "this cluster's token. Differs from FastChat in the defaults of --device, --dtype, --limit-worker-concurrency, "
        "--stream-interval and --worker-address, as their lines say.",
    )
    add_model_flags(parser, is_repeatable=False)
    add_worker_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the worker until a signal ends it; returns the exit code."""
    arguments = parse_settings(create_model_worker_parser(), argv)
    spec = ModelSpec(Path(arguments.model_path), arguments.model_names or (), arguments.conv_template)
    return run_worker("model_worker", arguments, (spec,))


if __name__ == "__main__":
    run_command(main)
