"""`python3 -m fastchat.serve.cli`: loads a model in this process and talks with it in the terminal; no server."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fastchat.ops.logs import configure_logging
from fastchat.serve.arguments import add_refused_flag, create_parser, flag_type, run_command
from fastchat.serve.demo_model import find_demo_model
from fastchat.serve.terminal_arguments import EPILOG, add_session_flags, create_screen, run_session
from fastchat.serve.worker_arguments import add_engine_flags, engine_spec, model_path, obey_early_flags
from fastchat.worker.config import ModelSpec, WorkerConfig
from fastchat.worker.model_groups import group_models

MAX_NEW_TOKENS = 512


def create_cli_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = create_parser("cli", "Talk with a model in the terminal; loads it itself.", epilog=EPILOG)
    parser.add_argument(
        "--model-path",
        type=flag_type(model_path),
        metavar="FOLDER",
        help="the checkpoint (default: the tiny demo model)",
    )
    parser.add_argument(
        "--conv-template",
        metavar="NAME",
        help="prompt format, by name or as a .json file (default: the checkpoint's own)",
    )
    add_session_flags(parser, max_new_tokens=MAX_NEW_TOKENS)
    add_engine_flags(parser)
    add_refused_flag(
        parser,
        "--judge-sent-end",
        reason="an answer ends where the model ends it; leave the flag out",
        takes_value=False,
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Load the model and talk until the input ends; returns the exit code."""
    arguments = create_cli_parser().parse_args(argv)
    configure_logging("cli", level="WARNING")
    obey_early_flags(arguments)
    screen = create_screen(arguments)
    if arguments.model_path is None:
        arguments.model_path = find_demo_model()
        sys.stderr.write("no model was given: this is the tiny demo; talk with a real one with --model-path FOLDER\n")
    config = _worker_config(arguments)
    group_models(config.models)
    # torch and transformers take seconds to import: a flag or a folder that is refused is told before.
    from fastchat.terminal.local_talker import LocalTalker
    from fastchat.worker.loaded_model import open_models

    (model,) = open_models(config).models
    return run_session(arguments, screen, LocalTalker(lambda: model.start_last(config)))


def _worker_config(arguments: argparse.Namespace) -> WorkerConfig:
    """A worker with one model and no socket: it has no address, and nobody who could need its token."""
    return WorkerConfig(
        models=(ModelSpec(Path(arguments.model_path), conv_template=arguments.conv_template),),
        address="",
        cluster_token="none",  # noqa: S106 - nothing listens
        engine=engine_spec(arguments),
    )


if __name__ == "__main__":
    run_command(main)
