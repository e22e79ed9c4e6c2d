"""The resume form of a request: our API server repeats a body whose worker was lost, with the ids its client has got.

The law: whatever was cut where, the text sent before the cut and the text of the resumed answer make the undisturbed
text. The ids decide alone (`choice.py`), so the prompt is not tokenized again and no drawn seed may change: the API
server sends the same `SEED_HEADER`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastchat.api.parameters import validate
from fastchat.api.protocol import ResumeState
from fastchat.api.request_context import RequestContext
from fastchat.errors import InvalidRequestError

RESUME_FIELD = "resume"


@dataclass(frozen=True, slots=True)
class ResumedChoice:
    """What a client has got of one choice."""

    prompt_token_ids: tuple[int, ...]
    emitted_token_ids: tuple[int, ...]
    is_end_told: bool


class Resume:
    """The resumed choices of a request by index; empty for an ordinary request."""

    def __init__(self, state: ResumeState | None) -> None:
        self._state = state

    @classmethod
    def taken_from(cls, document: dict[str, Any], context: RequestContext) -> Resume:  # Any: JSON has any value
        """Take the field out of the body where the header says that it is the API server's; else it stays, unknown."""
        if not context.is_resume or RESUME_FIELD not in document:
            return cls(None)
        value = document.pop(RESUME_FIELD)
        if not isinstance(value, dict):
            raise InvalidRequestError("resume must be an object.", param=RESUME_FIELD, code="invalid_value")
        return cls(validate(ResumeState, value, prefix=f"{RESUME_FIELD}."))

    def check(self, num_choices: int) -> None:
        """Raise `InvalidRequestError` unless there is one entry for each of `num_choices`."""
        state = self._state
        if state and {len(state.prompt_token_ids), len(state.emitted_token_ids)} != {num_choices}:
            raise InvalidRequestError(
                f"resume must have one entry for each of the {num_choices} choices.",
                param=RESUME_FIELD,
                code="invalid_value",
            )

    def choice(self, index: int) -> ResumedChoice | None:
        """What was sent of a choice; None when nothing was."""
        prompt_token_ids = self._state.prompt_token_ids[index] if self._state else None
        if self._state is None or prompt_token_ids is None:
            return None
        return ResumedChoice(
            prompt_token_ids, self._state.emitted_token_ids[index], is_end_told=index in self._state.ended_choices
        )
