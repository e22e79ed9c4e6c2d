"""The flags that both terminal commands share, and the session that they ask for. FastChat's names and defaults."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Callable

from fastchat.errors import ConfigError
from fastchat.serve.arguments import EXIT_FAILURE, flag_type
from fastchat.serve.worker_arguments import positive
from fastchat.terminal.screen import ProgrammaticScreen, Screen, SimpleScreen, make_plain_streams
from fastchat.terminal.session import ChatSession, SessionConfig
from fastchat.terminal.talker import AnswerOptions, Talker

EPILOG = (
    "Commands in the conversation: !!exit or an empty line ends, !!reset begins anew, !!remove takes the last exchange "
    "back, !!regen answers again, !!save FILE and !!load FILE keep a conversation. Ctrl-C stops an answer and drops "
    "that exchange; where nothing is typed it ends the session."
)


def add_session_flags(parser: argparse.ArgumentParser, *, max_new_tokens: int | None) -> None:
    """What is said and how it is shown. `max_new_tokens` is the default, None for what is left of the context."""
    parser.add_argument("--conv-system-msg", metavar="TEXT", default="", help="system message (default: the format's)")
    add_sampling_flags(parser, max_new_tokens)
    parser.add_argument(
        "--no-history", action="store_true", help="send each question alone, without what was said (default: off)"
    )
    parser.add_argument(
        "--style",
        choices=["simple", "rich", "programmatic"],
        default="simple",
        help="plain lines, live Markdown with an edited input line, or for programs (default: simple)",
    )
    parser.add_argument(
        "--multiline",
        action="store_true",
        help="with --style rich: Enter begins a new line; Escape, then Enter sends (default: off)",
    )
    parser.add_argument(
        "--mouse", action="store_true", help="with --style rich: the mouse moves the cursor (default: off)"
    )
    parser.add_argument(
        "--debug", action="store_true", help="show each prompt, its tokens and the speed on stderr (default: off)"
    )


def add_sampling_flags(parser: argparse.ArgumentParser, max_new_tokens: int | None) -> None:
    """How answers are made, in FastChat's words."""
    parser.add_argument(
        "--temperature",
        type=flag_type(number_from(0, 2)),
        metavar="X",
        help="0 takes the most probable token, more is more varied, up to 2 (default: the model's, else 0.7)",
    )
    parser.add_argument(
        "--top-p",
        type=flag_type(number_from(0, 1, is_open=True)),
        metavar="X",
        help="choose among the most probable tokens of this share, above 0 to 1 (default: the model's, else 1)",
    )
    parser.add_argument(
        "--repetition_penalty",
        "--repetition-penalty",
        type=flag_type(number_from(0, 10, is_open=True)),
        metavar="X",
        help="above 1 makes repetition rarer, up to 10 (default: the model's, else 1)",
    )
    left = "what is left of the context" if max_new_tokens is None else f"{max_new_tokens}"
    parser.add_argument(
        "--max-new-tokens",
        type=flag_type(positive),
        default=max_new_tokens,
        metavar="N",
        help=f"longest answer in tokens, less where the context leaves less (default: {left})",
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", help="makes the same conversation go the same way (default: by chance)"
    )


def run_session(arguments: argparse.Namespace, screen: Screen, talker: Talker) -> int:
    """Talk until the input ends; returns the exit code. Raises what starting the talker raises."""
    config = SessionConfig(
        options=AnswerOptions(
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            repetition_penalty=arguments.repetition_penalty,
            max_tokens=arguments.max_new_tokens,
            seed=arguments.seed,
        ),
        system_message=arguments.conv_system_msg,
        has_history=not arguments.no_history,
        is_debug=arguments.debug,
    )
    with asyncio.Runner() as runner:
        try:
            runner.run(talker.start())
            ChatSession(talker, screen, config, runner.run).run()
        except BrokenPipeError:
            return _end_quietly()
        finally:
            runner.run(talker.close())
    return 0


def create_screen(arguments: argparse.Namespace) -> Screen:
    """The screen of `--style`. Raises `ConfigError` for a flag of the rich style without it."""
    make_plain_streams()
    if arguments.style == "rich":
        return _rich_screen(arguments)
    for flag, is_given in (("--multiline", arguments.multiline), ("--mouse", arguments.mouse)):
        if is_given:
            raise ConfigError(f"{flag} works with --style rich only.")
    return SimpleScreen() if arguments.style == "simple" else ProgrammaticScreen()


def _rich_screen(arguments: argparse.Namespace) -> Screen:
    # rich and prompt_toolkit take a moment to import, and only this style needs them.
    from fastchat.terminal import rich_screen

    if rich_screen.is_possible():
        return rich_screen.RichScreen(is_multiline=arguments.multiline, has_mouse=arguments.mouse)
    sys.stderr.write("--style rich needs a terminal that can move its cursor; the style is simple now\n")
    return SimpleScreen()


def number_from(low: float, high: float, *, is_open: bool = False) -> Callable[[str], float]:
    """A parser for a number from `low` to `high`; `is_open`: more than `low`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise ConfigError(f"{text!r} is not a number.") from None
        if not (low < value if is_open else low <= value) or not value <= high:
            raise ConfigError(f"{text} is not {'above' if is_open else 'from'} {low} to {high}.")
        return value

    return parse


def _end_quietly() -> int:
    """Whoever read the output has left (`| head`): nothing more can be said there, also not at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_FAILURE
