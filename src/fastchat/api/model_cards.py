"""The cards of GET /v1/models, with the fields that FastChat's users read."""

from __future__ import annotations

import hashlib
import string
from collections.abc import Iterable
from typing import Any

_LETTERS = string.digits + string.ascii_letters
_PERMISSION_LETTERS = 22

Json = dict[str, Any]  # Any: JSON has any value


def model_card(name: str, created: int) -> Json:
    """One model; `created` in seconds since 1970. The permission's id is made of the name, so it never changes."""
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "fastchat",
        "root": name,
        "parent": None,
        "permission": [
            {
                "id": f"modelperm-{_letters(name)}",
                "object": "model_permission",
                "created": created,
                "allow_create_engine": False,
                "allow_sampling": True,
                "allow_logprobs": True,
                "allow_search_indices": True,
                "allow_view": True,
                "allow_fine_tuning": False,
                "organization": "*",
                "group": None,
                "is_blocking": False,
            }
        ],
    }


def model_list(models: Iterable[tuple[str, int]]) -> Json:
    """The page of all models, from pairs of name and `created`."""
    return {"object": "list", "data": [model_card(name, created) for name, created in models]}


def _letters(name: str) -> str:
    number = int.from_bytes(hashlib.sha256(name.encode("utf-8")).digest())
    letters = ""
    for _ in range(_PERMISSION_LETTERS):
        number, rest = divmod(number, len(_LETTERS))
        letters += _LETTERS[rest]
    return letters
