"""Cuts a worker's stream of bytes at event boundaries and takes the tags out. It parses no JSON and does no I/O.

    bytes from the worker   : 0 7 345 LF  data: {...} LF LF  : 0 8 12 LF  data: {.
    to the client, now                    data: {...} LF LF
    kept as tags            : 0 7 345 LF
    waits for more bytes                                     : 0 8 12 LF  data: {.

What a client gets is the worker's bytes without the tag lines, however the network cut them. Lines may end in LF or in
CR LF. Comments that are no tags (keep-alives) pass.
"""

from __future__ import annotations

import re

MAX_EVENT_BYTES = 4 * 1024 * 1024
"""The longest event that is waited for; a prompt's ids in a tag may be a million bytes."""
MAX_TAG_BYTES = 4 * 1024 * 1024
"""Tags beyond this are dropped, and with them the stream's ability to be resumed."""
_MAX_BLANK_BYTES = 64 * 1024

# The tags of `api/streaming.py`: choice, then `prompt`, `end` or the offset, then ids.
_TAG_LINE = re.compile(rb"^(: \d+ (?:prompt|end|\d+) [\d,]*\r?\n)", re.MULTILINE)
_USAGE_EVENT = re.compile(rb'data: \{.*"choices":\[\]')  # within a string the quotes would be escaped
_DATA_LINE = re.compile(rb"^data:", re.MULTILINE)
_LAST_LINE = re.compile(rb'data: ?(?:\[DONE\]|\{"error":)')
_SHUT_DOWN_CODE = b'"code":"shutting_down"'
_SHUT_DOWN_EVENT = re.compile(rb'^data: \{"error":.*"code":"shutting_down".*\n\n\Z', re.MULTILINE)


class BrokenStreamError(Exception):
    """The bytes are no event stream; the message says why, for the log."""


class EventFramer:
    """The framing of one stream. `tags` holds the raw tag lines so far, None where they became too many.

    `is_shut_down`: our worker has said that it ends the answer early, which is kept from the client: another one may go
    on with it.
    """

    def __init__(self, *, has_tags: bool) -> None:
        self.tags: bytearray | None = bytearray() if has_tags else None
        self.is_shut_down = False
        self._has_tags = has_tags
        self._rest = b""
        self._num_blank_bytes = 0
        self._last_events = b""
        self._has_data = False

    def feed(self, chunk: bytes) -> bytes:
        """The whole events that are complete now, to be sent in one write; b"" where none is.

        Raises `BrokenStreamError` for an event without an end and for endless blank lines.
        """
        begin_of_search = max(len(self._rest) - 2, 0)
        pending = self._rest + chunk if self._rest else chunk
        end = _end_of_last_event(pending, begin_of_search)
        self._rest = pending[end:]
        if len(self._rest) > MAX_EVENT_BYTES:
            raise BrokenStreamError(f"an event has more than {MAX_EVENT_BYTES} bytes")
        if not end:
            return b""
        events = self._without_farewell(pending[:end])
        if not events:
            return b""
        if events.isspace():
            self._num_blank_bytes += len(events)
            if self._num_blank_bytes > _MAX_BLANK_BYTES:
                raise BrokenStreamError("it sends nothing but blank lines")
        else:
            self._num_blank_bytes = 0
            self._last_events = events
            self._has_data = self._has_data or bool(_DATA_LINE.search(events))
        return self._without_tags(events)

    def finish(self) -> bytes:
        """What is left at the end of the worker's bytes. Raises `BrokenStreamError` where the answer is not whole.

        A whole answer ends with `data: [DONE]` or with an error event; one that ends otherwise was cut.
        """
        rest, self._rest = self._rest, b""
        if not _LAST_LINE.match(_last_line(rest) or _last_line(self._last_events)):
            raise BrokenStreamError("it ended before its last event")
        return self._without_tags(rest.rstrip() + b"\n\n") if rest.strip() else rest

    def can_go_on(self) -> bool:
        """Whether the tags tell all that the client has of the answer, maybe nothing yet."""
        return self.tags is not None and (bool(self.tags) or not self._has_data)

    def has_ended(self) -> bool:
        """Whether the last event so far ends the answer: nothing is missing but the end of the connection."""
        return not self._rest.strip() and bool(_LAST_LINE.match(_last_line(self._last_events)))

    def lacks_only_done(self) -> bool:
        """Whether the last event so far was our worker's usage, behind which comes nothing but `data: [DONE]`."""
        return self._has_tags and bool(_USAGE_EVENT.match(_last_line(self._last_events)))

    def _without_farewell(self, events: bytes) -> bytes:
        if self._has_tags and _SHUT_DOWN_CODE in events and (farewell := _SHUT_DOWN_EVENT.search(events)):
            self.is_shut_down = True
            return events[: farewell.start()]
        return events

    def _without_tags(self, events: bytes) -> bytes:
        if not self._has_tags:
            return events
        pieces = _TAG_LINE.split(events)  # text, tag, text, tag, ..., text
        if len(pieces) == 1:
            return events
        if self.tags is not None:
            self.tags += b"".join(pieces[1::2])
            if len(self.tags) > MAX_TAG_BYTES:
                self.tags = None
        return b"".join(pieces[::2])


def _last_line(events: bytes) -> bytes:
    return events.rstrip().rpartition(b"\n")[2]


def _end_of_last_event(pending: bytes, begin: int) -> int:
    """The position after the last boundary at or after `begin`; 0 where there is none."""
    last_lf = pending.rfind(b"\n\n", begin)
    last_crlf = pending.rfind(b"\n\r\n", begin)
    if last_lf < 0 and last_crlf < 0:
        return 0
    return max(last_lf + 2, last_crlf + 3)
