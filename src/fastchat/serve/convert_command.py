"""`fastchat convert SRC DST`: writes a checkpoint anew, in safetensors, quantized if asked; DST loads directly."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from fastchat.config import expand_home, parse_bytes
from fastchat.models.checkpoint import Checkpoint
from fastchat.models.stored_quantization import choose_quantization
from fastchat.ops.logs import configure_logging
from fastchat.serve.arguments import create_parser, flag_type, run_command
from fastchat.serve.sizes import size_text
from fastchat.serve.worker_arguments import add_quantization_flags, quantization

EXIT_TERMINATED = 128 + signal.SIGTERM


def create_convert_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = create_parser(
        "convert_command",
        "Write a checkpoint anew in safetensors, smaller if asked; it is whole or not there at all.",
        epilog="The new folder has the tokenizer and the settings too, so it is served by --model-path DST; it "
        "computes the same as SRC does with the same --quantize. Memory: one tensor.",
    )
    parser.prog = "fastchat convert"
    parser.add_argument("source", type=Path, metavar="SRC", help="the folder of a checkpoint")
    parser.add_argument("destination", type=Path, metavar="DST", help="a new folder")
    add_quantization_flags(parser)
    parser.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        help="number type of what is not quantized (default: as it is stored)",
    )
    parser.add_argument(
        "--max-shard-size",
        type=flag_type(parse_bytes),
        default=parse_bytes("5GB"),
        metavar="SIZE",
        help="largest file, but for a single tensor that is larger (default: 5GB)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Convert; returns the exit code. Raises `CheckpointError` or `ConfigError`, and leaves nothing behind then."""
    arguments = create_convert_parser().parse_args(argv)
    configure_logging("convert", level="WARNING")
    asked = quantization(arguments)
    checkpoint = Checkpoint.open(arguments.source)
    choose_quantization(checkpoint.config, asked)
    signal.signal(signal.SIGTERM, _end)
    # torch takes seconds to import: what is refused is told before.
    from fastchat.models.conversion import convert_checkpoint

    with _progress() as on_progress:
        converted = convert_checkpoint(
            checkpoint,
            expand_home(arguments.destination),
            quantization=asked,
            dtype=arguments.dtype,
            max_shard_bytes=arguments.max_shard_size,
            on_progress=on_progress,
        )
    files = "1 file" if converted.num_shards == 1 else f"{converted.num_shards} files"
    sys.stdout.write(
        f"{arguments.destination}: {size_text(converted.num_bytes)} of weights in {files}; "
        f"serve it with --model-path {shlex.quote(str(arguments.destination))}\n"
    )
    return 0


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, nothing elsewhere."""
    from tqdm import tqdm  # only where there is work to show

    with tqdm(desc="Writing", unit="B", unit_scale=True, disable=not sys.stderr.isatty(), file=sys.stderr) as bar:

        def show(num_done: int, num_all: int) -> None:
            bar.total = num_all
            bar.update(num_done - bar.n)

        yield show


def _end(_number: int, _frame: object) -> NoReturn:
    """As an exception, so that what is half written is removed."""
    sys.exit(EXIT_TERMINATED)


if __name__ == "__main__":
    run_command(main)
