"""What another worker needs to go on with a lost one's stream: the request's body with the ids that the client has.

The form is `api/resume.py`'s, the ids are those of the tags in `api/streaming.py`. Torch-free, and no I/O.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from fastchat.api.resume import RESUME_FIELD


def resume_body(body: bytes, tags: bytes) -> bytes:
    """`body` in the resume form; `tags` are the tag lines of all events that were sent."""
    document = orjson.loads(body)
    prompts: dict[int, list[int]] = {}
    emitted: dict[int, list[int]] = {}
    ended: list[int] = []
    for line in tags.splitlines():
        _, index, kind, ids = line.split(b" ")
        token_ids = [int(each) for each in ids.split(b",") if each]
        if kind == b"prompt":
            prompts[int(index)] = token_ids
        elif kind == b"end":
            ended.append(int(index))
        else:
            emitted.setdefault(int(index), []).extend(token_ids)
    choices = range(_num_choices(document))
    document[RESUME_FIELD] = {
        "prompt_token_ids": [prompts.get(choice) for choice in choices],
        "emitted_token_ids": [emitted.get(choice, []) for choice in choices],
        **({"ended_choices": ended} if ended else {}),  # a worker of the last version does not know it
    }
    return orjson.dumps(document)


def num_emitted_ids(tags: bytes) -> int:
    """How many answer ids of all choices the tag lines tell."""
    fields = (line.split(b" ") for line in tags.splitlines())
    return sum(ids.count(b",") + 1 for _, _, kind, ids in fields if kind.isdigit() and ids)


def _num_choices(document: Mapping[str, Any]) -> int:  # Any: JSON has any value
    """How many choices a request has that a worker has begun to answer, and so has found in order."""
    prompt = document.get("prompt")
    is_batch = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
    return (len(prompt) if is_batch and prompt else 1) * (document.get("n") or 1)
