"""Which sequences run in the next step, and how many tokens of each. Decides and returns; torch-free, no I/O.

One budget of tokens per step is shared by decoding sequences (one token each, served first, so that a long prompt
never holds up an answer) and by prompts in chunks. When the blocks run out, the sequence that came last gives its
own back and is computed again later (preemption by recompute, as in vLLM).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from fastchat.engine.drafting import Drafter
from fastchat.engine.events import FinishReason
from fastchat.engine.kv_cache import BlockPool, extend_block_hashes
from fastchat.engine.sequence import Sequence, SequenceState
from fastchat.engine.waiting_queue import WaitingQueue


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """Tokens [start, start + num_tokens) of a sequence are computed in this step, and behind them its draft."""

    sequence: Sequence
    start: int
    num_tokens: int
    draft: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        """One past the last of the sequence's own tokens that are computed in this step."""
        return self.start + self.num_tokens

    @property
    def is_last_chunk(self) -> bool:
        """Whether the step reaches the sequence's end, so that its next token can be sampled."""
        return self.end == len(self.sequence.token_ids)

    @property
    def num_rows(self) -> int:
        """Rows of the forward pass."""
        return self.num_tokens + len(self.draft)


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """The decision for one step. Empty when nothing can run."""

    scheduled: tuple[ScheduledSequence, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens of the step's forward pass."""
        return sum(item.num_rows for item in self.scheduled)


class Scheduler:
    """Owns the places of all sequences (waiting, running) and their blocks."""

    def __init__(
        self,
        pool: BlockPool,
        queue: WaitingQueue,
        *,
        max_batch_tokens: int,
        max_running: int,
        prefix_caching: bool = True,
        drafter: Drafter | None = None,
    ) -> None:
        self.pool = pool
        self.queue = queue
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._max_batch_tokens = max_batch_tokens
        self._max_running = max_running
        self._prefix_caching = prefix_caching
        self.drafter = drafter or Drafter(max_rows=1, max_context=1)

    def __repr__(self) -> str:
        return f"<Scheduler running {len(self.running)} waiting {len(self.queue)} {self.pool!r}>"

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self.running) or len(self.queue) > 0

    @property
    def num_queued_tokens(self) -> int:
        """Tokens that waiting and running sequences have yet to compute."""
        return self.queue.num_tokens + sum(sequence.num_uncomputed_tokens for sequence in self.running)

    def add(self, sequence: Sequence) -> None:
        """Put a new sequence into the waiting queue."""
        self.queue.push(sequence)

    def schedule(self, num_sharing: int = 1) -> ScheduledBatch:
        """Choose the next step's tokens; takes blocks for them, preempts and admits as needed.

        Where `num_sharing` engines take turns, prompts get a part of the budget only; decoding sequences all run.
        """
        scheduled: list[ScheduledSequence] = []
        decoding = [sequence for sequence in self.running if sequence.is_decoding]
        budget = min(self._max_batch_tokens, len(decoding) + max(1, self._max_batch_tokens // num_sharing))
        prefilling = [sequence for sequence in self.running if not sequence.is_decoding]
        for sequence in decoding + prefilling:
            num_tokens = min(sequence.num_uncomputed_tokens, budget)
            if num_tokens == 0 or sequence.state is not SequenceState.RUNNING:
                continue  # the budget is spent, or it was preempted for an earlier one
            if self._make_room(sequence, num_tokens, scheduled):
                scheduled.append(ScheduledSequence(sequence, sequence.num_computed_tokens, num_tokens))
                budget -= num_tokens
        budget = self._admit(scheduled, budget)
        if budget > 0 and scheduled and all(item.sequence.is_decoding for item in scheduled):
            scheduled = self._add_drafts(scheduled, budget)
        return ScheduledBatch(tuple(scheduled))

    def advance(self, batch: ScheduledBatch, failed: Iterable[Sequence] = ()) -> None:
        """Note that a step was computed; full blocks become known to the prefix cache, and those of `failed` unknown.

        Sequences have their new tokens already; what was kept of a draft is computed too, the rest was never there.
        """
        excluded = {id(sequence) for sequence in failed}
        for item in batch.scheduled:
            item.sequence.num_computed_tokens = item.end
            if item.draft:
                item.sequence.num_computed_tokens = max(item.end, len(item.sequence.token_ids) - 1)
                num_kept = item.sequence.num_computed_tokens - item.end
                self.drafter.note(item.sequence, len(item.draft), num_kept)
            if id(item.sequence) in excluded:
                self.pool.unpublish(item.sequence.block_ids)  # an earlier chunk may have been wrong already
            elif self._prefix_caching:
                self._publish_full_blocks(item)

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence wherever it is and give its blocks back. A finished one stays as it is."""
        if sequence.state is SequenceState.WAITING:
            self.queue.remove(sequence)
        elif sequence.state is SequenceState.RUNNING:
            self.running.remove(sequence)
            self._release(sequence)
        else:
            return
        self.drafter.forget(sequence)
        sequence.state = SequenceState.FINISHED
        sequence.finish_reason = reason

    def _make_room(self, sequence: Sequence, num_tokens: int, scheduled: list[ScheduledSequence]) -> bool:
        """Hold blocks for the next `num_tokens` tokens; False when the sequence itself had to be preempted."""
        num_missing = self._num_missing_blocks(sequence, sequence.num_computed_tokens + num_tokens)
        while num_missing > self.pool.num_free_blocks:
            victim = max(self.running, key=lambda other: (other.request.priority, other.arrival))
            self._preempt(victim, scheduled)
            if victim is sequence:
                return False
        self._grow(sequence, num_missing)
        return True

    def _preempt(self, sequence: Sequence, scheduled: list[ScheduledSequence]) -> None:
        scheduled[:] = [item for item in scheduled if item.sequence is not sequence]
        self.running.remove(sequence)
        self._release(sequence)
        sequence.num_computed_tokens = 0
        sequence.num_preemptions += 1
        sequence.state = SequenceState.WAITING
        self.num_preemptions += 1
        self.queue.push(sequence)

    def _add_drafts(self, scheduled: list[ScheduledSequence], budget: int) -> list[ScheduledSequence]:
        """Let decoding sequences look ahead where that is free: few of them, and blocks that nobody must give up."""
        max_rows = self.drafter.rows_for_each(len(scheduled), budget)
        if max_rows < 2:
            return scheduled
        drafted = []
        for item in scheduled:
            draft = self.drafter.draft(item.sequence, max_rows)
            num_missing = self._num_missing_blocks(item.sequence, item.end + len(draft))
            has_room = num_missing <= self.pool.num_free_blocks
            self._grow(item.sequence, num_missing if has_room else 0)
            drafted.append(replace(item, draft=draft if has_room else ()))
        return drafted

    def _admit(self, scheduled: list[ScheduledSequence], budget: int) -> int:
        """Start waiting sequences while budget, places and blocks for their whole content last; the budget left.

        A block for each running sequence that may need one more stays free: who took the last ones would be preempted
        by the others' next tokens, and its prompt would have been computed for nothing.
        """
        num_reserved = sum(map(self._may_grow, self.running)) if len(self.queue) else 0
        while budget > 0 and len(self.running) < self._max_running:
            sequence = self.queue.peek()
            if sequence is None:
                break
            prefix = self._find_prefix(sequence)
            num_missing = self._num_missing_blocks(sequence, len(sequence.token_ids)) - len(prefix)
            num_taken = num_missing + self.pool.num_free_among(prefix)
            if num_taken + num_reserved > self.pool.num_free_blocks:
                break
            self.queue.pop()
            self._start(sequence, prefix)
            num_tokens = min(sequence.num_uncomputed_tokens, budget)
            self._grow(sequence, self._num_missing_blocks(sequence, sequence.num_computed_tokens + num_tokens))
            num_reserved += self._may_grow(sequence)
            scheduled.append(ScheduledSequence(sequence, sequence.num_computed_tokens, num_tokens))
            budget -= num_tokens
        return budget

    def _may_grow(self, sequence: Sequence) -> bool:
        """Whether a sequence lacks blocks for the longest that it may get; its last token is never computed."""
        longest = sequence.num_prompt_tokens + max(0, sequence.sampling.max_tokens - 1)
        return self._num_missing_blocks(sequence, longest) > 0

    def _start(self, sequence: Sequence, prefix: list[int]) -> None:
        self.pool.take(prefix)
        sequence.block_ids = prefix
        sequence.num_computed_tokens = max(0, len(prefix) * self.pool.block_size - sequence.num_prefix_slots)
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = min(sequence.num_computed_tokens, sequence.num_prompt_tokens)
        sequence.state = SequenceState.RUNNING
        self.running.append(sequence)

    def _find_prefix(self, sequence: Sequence) -> list[int]:
        """Cached blocks from the sequence's beginning; at least one token is always left to compute."""
        if not self._prefix_caching or not sequence.may_use_cached_prefix:
            return []
        self._extend_hashes(sequence)
        num_slots = sequence.num_prefix_slots
        max_blocks = (num_slots + len(sequence.token_ids) - 1) // self.pool.block_size
        found = self.pool.find_prefix(sequence.block_hashes[:max_blocks])
        return found if len(found) * self.pool.block_size >= num_slots else []

    def _publish_full_blocks(self, item: ScheduledSequence) -> None:
        block_size = self.pool.block_size
        computed = item.sequence.num_computed_tokens
        num_slots = item.sequence.num_prefix_slots
        # The first chunk fills an adapter's prefix too.
        first, last = ((num_slots + place if place else 0) // block_size for place in (item.start, computed))
        if first == last:
            return
        self._extend_hashes(item.sequence)
        for index in range(first, last):
            self.pool.publish(item.sequence.block_ids[index], item.sequence.block_hashes[index])

    def _extend_hashes(self, sequence: Sequence) -> None:
        # The slots of an adapter's prefix count as tokens that no vocabulary has; the salt says whose they are.
        content = [-1] * sequence.num_prefix_slots + sequence.token_ids
        extend_block_hashes(sequence.block_hashes, content, self.pool.block_size, sequence.cache_salt)

    def _num_missing_blocks(self, sequence: Sequence, num_tokens: int) -> int:
        """Blocks to add so that the first `num_tokens` tokens have a place."""
        num_slots = sequence.num_prefix_slots + num_tokens
        return max(0, -(-num_slots // self.pool.block_size) - len(sequence.block_ids))

    def _grow(self, sequence: Sequence, num_blocks: int) -> None:
        for _ in range(num_blocks):
            after = sequence.block_ids[-1] if sequence.block_ids else None
            sequence.block_ids.append(self.pool.allocate(after))

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.block_ids)
        sequence.block_ids = []
