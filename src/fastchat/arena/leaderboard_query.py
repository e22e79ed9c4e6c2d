"""The query of a leaderboard, from a URL: which votes count. What is not understood is refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Literal

from fastchat.arena.language import LANGUAGES
from fastchat.arena.vote_log import VoteFilter
from fastchat.errors import InvalidRequestError

NAMES = ("since", "until", "language", "anonymous")
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
_MAX_CHARACTERS = 64


def parse_vote_filter(items: Sequence[tuple[str, str]]) -> VoteFilter:
    """The filter of names and values; an empty value is none. Raises `InvalidRequestError`."""
    given: dict[str, str] = {}
    for name, value in items:
        if name not in NAMES:
            raise _invalid(name[:_MAX_CHARACTERS], f"is not known; there are {', '.join(NAMES)}")
        if name in given:
            raise _invalid(name, "is there twice")
        given[name] = value.strip()
    since, until = _time("since", given.get("since")), _time("until", given.get("until"))
    if since is not None and until is not None and since >= until:
        raise _invalid("until", "must be after since")
    language = next((known for known in LANGUAGES if known == given.get("language")), None)
    if given.get("language") and language is None:
        raise _invalid("language", f"must be one of {', '.join(LANGUAGES)}")
    anonymous = given.get("anonymous") or None
    if anonymous is not None and anonymous not in _BOOLEANS:
        raise _invalid("anonymous", "must be true (blind rounds only) or false (named rounds only)")
    return VoteFilter(since, until, language, None if anonymous is None else _BOOLEANS[anonymous])


def _time(name: Literal["since", "until"], text: str | None) -> float | None:
    """Seconds since 1970, or an ISO 8601 date or time; UTC where it names no zone."""
    if not text:
        return None
    try:
        if text.isascii() and text.replace(".", "", 1).isdecimal() and len(text) <= 20 and "-" not in text:
            return float(text)
        # In a URL, a plus sign that was not escaped has become a space.
        moment = datetime.fromisoformat(text.replace(" ", "+") if "T" in text else text)
    except ValueError:
        raise _invalid(
            name, "must be a date (2026-01-31), a time (2026-01-31T12:00:00Z) or seconds since 1970"
        ) from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _invalid(param: str, rule: str) -> InvalidRequestError:
    return InvalidRequestError(f"{param} {rule}.", param=param, code="invalid_value")
