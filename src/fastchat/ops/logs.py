"""The log of a process: FastChat's line format on stderr, for our own lines and for those of the libraries.

    2026-11-22 12:00:00 | INFO | controller | worker registered worker_id=w1 address=http://127.0.0.1:21002

One event is one line: control characters in messages and values are escaped, and the lines of a traceback are marked,
so that nothing a client sends can forge a line. Secrets are masked by the name of their field.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

MASK = "***"
SECRET_NAMES = frozenset({"api_keys", "api_key", "authorization", "cluster_token", "password", "token"})

_PLAIN = re.compile(r"[^\s\"'=\\]+")
_TIME_FORMAT = "%Y-%m-%d %H:%M:%S"
_TRACEBACK_MARK = "    | "


def configure_logging(process_name: str, *, level: str = "INFO", stream: TextIO | None = None) -> None:
    """Send every log line of this process to `stream` (stderr where not given). Called once, by a command's main.

    `process_name` stands in the third column for our own lines; a library's lines show the library's name.
    """
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt=_TIME_FORMAT, utc=False),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.addFilter(_is_worth_a_line)
    handler.setFormatter(
        _Formatter(
            process_name,
            structlog.stdlib.ProcessorFormatter(
                foreign_pre_chain=shared,
                processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, _LineRenderer(process_name)],
            ),
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    logging.captureWarnings(capture=True)


def log_arguments(arguments: argparse.Namespace) -> None:
    """FastChat's first line, `args: Namespace(host='localhost', ...)`, with secrets masked."""
    shown = {name: _masked(name, value) for name, value in vars(arguments).items()}
    inside = ", ".join(f"{name}={value!r}" for name, value in shown.items())
    structlog.stdlib.get_logger("fastchat").info(f"args: Namespace({inside})")


@dataclass(frozen=True, slots=True)
class FrequentEvent:
    """An event of our own that comes with every request: as a log record's message it skips structlog's machinery."""

    event: str
    facts: Mapping[str, object]


def log_frequent(logger: logging.Logger, level: int, event: str, **facts: object) -> None:
    """One line like any other, for a third of the time. Facts are never secrets and their names never clash."""
    if logger.isEnabledFor(level):
        logger.handle(logging.LogRecord(logger.name, level, "", 0, FrequentEvent(event, facts), None, None))


def escape(text: str) -> str:
    """`text` with everything escaped that could end a line or steer a terminal."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


class _Formatter(logging.Formatter):
    """Lines of frequent events, written here; all others go through structlog."""

    def __init__(self, process_name: str, general: logging.Formatter) -> None:
        super().__init__()
        self._process_name = process_name
        self._general = general
        self._second = 0
        self._time = ""

    def format(self, record: logging.LogRecord) -> str:
        """Implements `logging.Formatter`."""
        message: object = record.msg
        if not isinstance(message, FrequentEvent):
            return self._general.format(record)
        if int(record.created) != self._second:
            self._second = int(record.created)
            self._time = time.strftime(_TIME_FORMAT, time.localtime(record.created))
        facts = "".join([f" {key}={_value_text(value)}" for key, value in message.facts.items()])
        return f"{self._time} | {record.levelname} | {self._process_name} | {message.event}{facts}"


class _LineRenderer:
    """The last processor: an event as one line."""

    def __init__(self, process_name: str) -> None:
        self._process_name = process_name

    def __call__(self, _logger: WrappedLogger, _method: str, event: EventDict) -> str:
        traceback = event.pop("exception", None)
        event.pop("color_message", None)  # uvicorn's second copy of its message
        name = str(event.pop("logger", None) or "fastchat")
        columns = (
            event.pop("timestamp"),
            str(event.pop("level", "info")).upper(),
            self._process_name if name.partition(".")[0] in ("fastchat", "__main__") else name.partition(".")[0],
            escape(str(event.pop("event", ""))),
        )
        facts = "".join(f" {key}={_value_text(_masked(key, value))}" for key, value in event.items())
        return " | ".join(columns) + facts + _marked(traceback)


def _value_text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    text = str(value)
    if text.isprintable() and _PLAIN.fullmatch(text):
        return text
    return '"' + escape(text.replace("\\", "\\\\").replace('"', '\\"')) + '"'


def _marked(traceback: str | None) -> str:
    if not traceback:
        return ""
    return "".join(f"\n{_TRACEBACK_MARK}{escape(line)}" for line in str(traceback).splitlines())


def _masked(name: str, value: object) -> object:
    return MASK if name.lower() in SECRET_NAMES and value else value


def _is_worth_a_line(record: logging.LogRecord) -> bool:
    """Drop uvicorn's lines about single WebSockets: registration says the same, with names."""
    if record.name != "uvicorn.error" or record.levelno != logging.INFO:
        return True
    message = str(record.msg)
    return '"WebSocket %s"' not in message and message not in ("connection open", "connection closed")
