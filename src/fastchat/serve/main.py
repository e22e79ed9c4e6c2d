"""`fastchat <command>`: a table of commands, each a module with a `main(argv)`, imported only when it runs.

A command that FastChat has too is the same module as its `python3 -m fastchat.serve.<module>`, flags and all.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from fastchat import __version__

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Command:
    """One command: what is typed, the module whose `main(argv)` runs it, and its line of the help."""

    name: str
    module: str
    summary: str


COMMANDS: tuple[Command, ...] = (
    Command("serve", "fastchat.serve.launch", "start everything: controller, API server, workers and the page"),
    Command(
        "web", "fastchat.serve.gradio_web_server", "the page: chat in the browser with the models of a running server"
    ),
    Command("chat", "fastchat.serve.chat", "talk in the terminal with a model of a running server"),
    Command("compare", "fastchat.serve.compare", "show two models' answers side by side, and vote"),
    Command("cli", "fastchat.serve.cli", "talk in the terminal with a model that is loaded there, without a server"),
    Command(
        "models",
        "fastchat.serve.models_command",
        "list, load, free and pin the models of a running server; look into a folder",
    ),
    Command("plan", "fastchat.serve.plan_command", "say what models will take of the memory, and whether it fits"),
    Command("config", "fastchat.serve.config_command", "show every setting of `serve` and where it came from"),
    Command("keys", "fastchat.serve.keys_command", "make, list and revoke the API keys that clients send"),
    Command("votes", "fastchat.serve.votes_command", "write all votes on compared models as JSON lines"),
    Command("convert", "fastchat.serve.convert_command", "write a checkpoint anew: safetensors, int8 or int4"),
    Command("controller", "fastchat.serve.controller", "the process that knows all workers"),
    Command("model-worker", "fastchat.serve.model_worker", "a worker with one model"),
    Command("multi-model-worker", "fastchat.serve.multi_model_worker", "a worker with several models"),
    Command("openai-api-server", "fastchat.serve.openai_api_server", "the OpenAI API over all workers"),
)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command that `argv` (the process's own where not given) names, and leave the process."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(_help_text())
        sys.exit(0)
    if words[0] in ("-V", "--version"):
        sys.stdout.write(f"fastchat {__version__}\n")
        sys.exit(0)
    command = next((command for command in COMMANDS if command.name == words[0]), None)
    if command is None:
        sys.stderr.write(f"error: {_unknown_text(words[0])}\n")
        sys.exit(EXIT_USAGE)
    _run(command, words[1:])


def _run(command: Command, flags: list[str]) -> NoReturn:
    # A command's imports cost most of a second; only the one that runs is paid for.
    from importlib import import_module

    try:
        from fastchat.serve.arguments import run_command
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    run_command(lambda _: int(import_module(command.module).main(flags)))


def _help_text() -> str:
    width = max(len(command.name) for command in COMMANDS)
    lines = [f"  {command.name:<{width}}  {command.summary}" for command in COMMANDS]
    return "\n".join(
        (
            "usage: fastchat [--help] [--version] <command> [flags]",
            "",
            "Chat with, compare and serve open language models through the OpenAI API.",
            "",
            *lines,
            "",
            "`fastchat serve` alone serves a small demo model; `fastchat <command> --help` shows a command's flags.",
            "",
        )
    )


def _unknown_text(word: str) -> str:
    from difflib import get_close_matches  # only on a mistake

    names = [command.name for command in COMMANDS]
    close = get_close_matches(word.replace("_", "-"), names, n=1)
    hint = f"did you mean `fastchat {close[0]}`?" if close else f"the commands are {', '.join(names)}."
    return f"{word!r} is not a command of fastchat; {hint}"


if __name__ == "__main__":
    main()
