"""Which tokens probably come next: what followed the last time that the sequence said the same. Torch-free.

Prompt lookup (a draft from the sequence's own tokens): good for text that quotes, edits or lists. The engine computes
a draft's tokens together with the sequence's next one and keeps those that its sampler chooses anyway, so a draft
changes no token of the text, only when it comes. A sequence whose drafts fail pauses for longer and longer.
"""

from __future__ import annotations

from fastchat.engine.sequence import Sequence

_MATCH_TOKENS = 3
"""A draft follows a repetition of so many tokens."""
_MAX_INDEXED = 16_384
"""Tokens of a prompt that are looked up, the last ones."""
_MAX_PAUSE = 64
"""The longest pause after drafts of which nothing was kept, in tokens."""


class DraftSource:
    """The drafts of one sequence, from its first decode step until it ends."""

    def __init__(self, sequence: Sequence) -> None:
        self._sequence = sequence
        self._ends: dict[tuple[int, ...], int] = {}  # where the tokens that follow each run of tokens begin
        self._num_indexed = max(0, len(sequence.token_ids) - _MAX_INDEXED)
        self._pause = 0
        self._resumes_at = 0

    def draft(self, max_tokens: int) -> tuple[int, ...]:
        """At most `max_tokens` tokens that may come next; none while it pauses or nothing matches."""
        token_ids = self._sequence.token_ids
        if max_tokens < 1 or len(token_ids) < self._resumes_at:
            return ()
        self._index(len(token_ids))
        place = self._ends.get(tuple(token_ids[-_MATCH_TOKENS:]))
        if place is None:
            return ()
        # A run that repeats itself goes on as it began: beyond the last token comes what the draft itself begins with.
        drafted = token_ids[place : place + max_tokens]
        period = len(drafted)
        return tuple(drafted[i % period] for i in range(max_tokens))

    def note(self, num_kept: int) -> None:
        """Learn how much of the last draft was kept."""
        self._pause = 0 if num_kept else min(_MAX_PAUSE, max(1, 2 * self._pause))
        self._resumes_at = len(self._sequence.token_ids) + self._pause

    def _index(self, end: int) -> None:
        """Know every run of tokens that ends before the last token."""
        token_ids = self._sequence.token_ids
        for place in range(max(self._num_indexed, _MATCH_TOKENS), end):
            self._ends[tuple(token_ids[place - _MATCH_TOKENS : place])] = place
        self._num_indexed = end


class Drafter:
    """The drafts of all sequences of one engine.

    `max_rows` is how many rows a decode step may have and still cost what one row costs; 1 means no drafts.
    """

    def __init__(self, max_rows: int, max_context: int) -> None:
        self._max_rows = max_rows
        self._max_context = max_context
        self._sources: dict[str, DraftSource] = {}
        self.num_drafted_tokens = 0
        self.num_accepted_tokens = 0

    def __repr__(self) -> str:
        return f"<Drafter {self.num_accepted_tokens}/{self.num_drafted_tokens} accepted>"

    def draft(self, sequence: Sequence, max_rows: int) -> tuple[int, ...]:
        """A draft for a decoding sequence that may have `max_rows` rows; no longer than its answer may still be."""
        left = min(
            sequence.sampling.max_tokens - sequence.num_output_tokens, self._max_context - len(sequence.token_ids)
        )
        max_tokens = min(max_rows, left) - 1
        if max_tokens < 1:
            return ()
        source = self._sources.get(sequence.sequence_id)
        if source is None:
            source = self._sources[sequence.sequence_id] = DraftSource(sequence)
        return source.draft(max_tokens)

    def rows_for_each(self, num_decoding: int, budget: int) -> int:
        """The rows that each of the decoding sequences of a step may have, with `budget` rows to spare in all."""
        return min(self._max_rows // num_decoding, 1 + budget // num_decoding)

    def note(self, sequence: Sequence, num_drafted: int, num_kept: int) -> None:
        """Learn how much of a sequence's draft was kept."""
        self.num_drafted_tokens += num_drafted
        self.num_accepted_tokens += num_kept
        self._sources[sequence.sequence_id].note(num_kept)

    def forget(self, sequence: Sequence) -> None:
        """Drop what is kept of a sequence that ended."""
        self._sources.pop(sequence.sequence_id, None)

    @property
    def num_tracked(self) -> int:
        """Sequences whose tokens are indexed."""
        return len(self._sources)
