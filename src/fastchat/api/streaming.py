"""The bytes of a streamed answer: chunks as server-sent events, and the tags that only our API server reads.

A chunk is one event, `data: {json}`. Tags are comment lines in front of the data line of the same event, so an event
and its tags are never apart. They are written when `TAGS_HEADER` asks for them:

    event      = [prompt-tag LF] [ids-tag LF] [end-tag LF] "data: " json LF LF
    prompt-tag = ": " choice " prompt " ids            the first event of a choice only; not on a resumed choice
    ids-tag    = ": " choice " " offset " " ids        every event of a choice
    end-tag    = ": " choice " end "                   the event with the choice's `finish_reason`
    choice     = decimal                               `choices[0].index` of this event
    offset     = decimal                               how many answer ids came in this choice's earlier events
    ids        = "" / decimal *("," decimal)           token ids; may be empty

An event of one choice holds one choice. The events without a tag are those of no choice: the usage chunk, an error and
`data: [DONE]`. The text that a client has is a function of the ids in the tags it got: this is what a resume rests on
(`resume.py`). A choice whose prompt tag was never seen has sent nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

DONE_EVENT = b"data: [DONE]\n\n"


def waiting_comment(model: str, *, is_loading: bool) -> bytes:
    """A comment that says why nothing comes yet. Clients pass over it; proxies see that the connection lives."""
    name = " ".join(model.split()) if model.isprintable() else "this model"
    return f": waiting for {name} to be loaded\n\n".encode() if is_loading else b": waiting for the first token\n\n"


def chunk_event(chunk: Mapping[str, Any], tags: bytes = b"") -> bytes:  # Any: JSON
    """One chunk as an event, behind its tags."""
    return tags + b"data: " + orjson.dumps(chunk) + b"\n\n"


def prompt_tag(choice: int, prompt_token_ids: Sequence[int]) -> bytes:
    """The tag that tells the prompt's ids, once for a choice."""
    return b": %d prompt %s\n" % (choice, _comma_separated(prompt_token_ids))


def ids_tag(choice: int, offset: int, token_ids: Sequence[int]) -> bytes:
    """The tag that tells which answer ids an event brings."""
    return b": %d %d %s\n" % (choice, offset, _comma_separated(token_ids))


def end_tag(choice: int) -> bytes:
    """The tag that tells that an event ends its choice."""
    return b": %d end \n" % choice


def _comma_separated(token_ids: Sequence[int]) -> bytes:
    return ",".join(map(str, token_ids)).encode("ascii")
