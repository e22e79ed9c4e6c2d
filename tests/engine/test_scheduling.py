"""Laws of blocks and scheduling, over random histories. No tensors."""

import time
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fastchat.engine.events import FinishReason, SequenceRequest
from fastchat.engine.kv_cache import BlockPool, extend_block_hashes
from fastchat.engine.sampling_params import SamplingParams
from fastchat.engine.scheduler import Scheduler
from fastchat.engine.sequence import Sequence, SequenceState
from fastchat.engine.waiting_queue import PriorityQueue

BLOCK_SIZE = 4
NUM_BLOCKS = 12
MAX_CONTEXT = BLOCK_SIZE * NUM_BLOCKS
MAX_BATCH_TOKENS = 10
MAX_RUNNING = 4


class SchedulerMachine(RuleBasedStateMachine):
    """Any mix of adding, stepping, finishing, aborting and failing keeps the books right."""

    def __init__(self):
        super().__init__()
        self.scheduler = Scheduler(
            BlockPool(NUM_BLOCKS, BLOCK_SIZE),
            PriorityQueue(),
            max_batch_tokens=MAX_BATCH_TOKENS,
            max_running=MAX_RUNNING,
        )
        self.alive: list[Sequence] = []
        self.arrivals = 0
        self.token = 0

    @rule(
        length=st.integers(1, MAX_CONTEXT - 1),
        priority=st.integers(0, 1),
        salt=st.sampled_from(["", "a"]),
        shared=st.booleans(),
        embeds=st.booleans(),
    )
    def add(self, length, priority, salt, shared, embeds):
        self.token += 1
        prompt = tuple(range(length)) if shared else (self.token, *range(1, length))
        request = SequenceRequest(
            str(self.arrivals),
            prompt,
            SamplingParams(max_tokens=MAX_CONTEXT - length),
            cache_salt=salt,
            priority=priority,
            wants_embedding=embeds,
        )
        sequence = Sequence(request, self.arrivals)
        self.arrivals += 1
        self.alive.append(sequence)
        self.scheduler.add(sequence)

    @precondition(lambda self: self.alive)
    @rule(choice=st.integers(0, 100), finishes=st.integers(0, 9))
    def step(self, choice, finishes):
        batch = self.scheduler.schedule()
        assert batch.scheduled, "sequences are there, but nothing runs"
        assert batch.num_tokens <= MAX_BATCH_TOKENS
        sampling = []
        for item in batch.scheduled:
            assert item.sequence.state is SequenceState.RUNNING
            assert item.num_tokens > 0
            assert item.start == item.sequence.num_computed_tokens
            assert len(item.sequence.block_ids) * BLOCK_SIZE >= item.end
            if item.is_last_chunk:
                sampling.append(item.sequence)
        failed = [batch.scheduled[choice % len(batch.scheduled)].sequence] if finishes == 9 else []
        self.scheduler.advance(batch, failed)
        for index, sequence in enumerate(sampling):
            if sequence in failed or sequence.request.wants_embedding:
                self.end(sequence, FinishReason.ERROR if sequence in failed else FinishReason.STOP)
                continue
            sequence.token_ids.append(1000 + self.token)
            if (
                len(sequence.token_ids) >= MAX_CONTEXT
                or sequence.num_output_tokens >= sequence.sampling.max_tokens
                or (finishes == index)
            ):
                self.end(sequence, FinishReason.STOP)

    @precondition(lambda self: self.alive)
    @rule(choice=st.integers(0, 100))
    def abort(self, choice):
        self.end(self.alive[choice % len(self.alive)], FinishReason.ABORT)

    def end(self, sequence, reason):
        self.scheduler.finish(sequence, reason)
        self.scheduler.finish(sequence, FinishReason.ERROR)
        assert sequence.finish_reason is reason
        self.alive.remove(sequence)

    @invariant()
    def held_blocks_are_those_of_running_sequences(self):
        pool = self.scheduler.pool
        held = Counter(block_id for sequence in self.scheduler.running for block_id in sequence.block_ids)
        assert [held[block_id] for block_id in range(NUM_BLOCKS)] == pool._reference_counts
        assert pool.num_free_blocks == NUM_BLOCKS - len(held)
        assert not set(pool._empty) & set(pool._cached)
        assert set(pool._empty) | set(pool._cached) | set(held) == set(range(NUM_BLOCKS))

    @invariant()
    def every_sequence_is_in_one_place(self):
        places = [*self.scheduler.running, *self.scheduler.queue._waiting.values()]
        assert sorted(map(id, places)) == sorted(map(id, self.alive))
        assert len(self.scheduler.running) <= MAX_RUNNING

    @invariant()
    def queued_tokens_are_those_to_compute(self):
        assert self.scheduler.num_queued_tokens == sum(sequence.num_uncomputed_tokens for sequence in self.alive)

    @invariant()
    def shared_blocks_hold_the_same_tokens(self):
        contents: dict[int, tuple] = {}
        for sequence in self.scheduler.running:
            for index, block_id in enumerate(sequence.block_ids):
                end = (index + 1) * BLOCK_SIZE
                if end <= sequence.num_computed_tokens:
                    content = (sequence.request.cache_salt, tuple(sequence.token_ids[:end]))
                    assert contents.setdefault(block_id, content) == content

    def teardown(self):
        for sequence in list(self.alive):
            self.end(sequence, FinishReason.ABORT)
        assert self.scheduler.pool.num_free_blocks == NUM_BLOCKS
        assert not self.scheduler.has_work


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=150, stateful_step_count=40)


def make_scheduler(num_blocks=100, **limits) -> Scheduler:
    limits = {"max_batch_tokens": 16, "max_running": 8} | limits
    return Scheduler(BlockPool(num_blocks, BLOCK_SIZE), PriorityQueue(), **limits)


def add(scheduler, name, length, arrival, priority=0, max_tokens=50) -> Sequence:
    prompt = tuple(range(1000 * arrival, 1000 * arrival + length))
    request = SequenceRequest(name, prompt, SamplingParams(max_tokens=max_tokens), priority=priority)
    sequence = Sequence(request, arrival)
    scheduler.add(sequence)
    return sequence


def run_step(scheduler) -> list[tuple[str, int]]:
    batch = scheduler.schedule()
    last = [item.sequence for item in batch.scheduled if item.is_last_chunk]
    scheduler.advance(batch)
    for sequence in last:
        sequence.token_ids.append(7)
    return [(item.sequence.sequence_id, item.num_tokens) for item in batch.scheduled]


def test_decoding_goes_before_a_long_prompt():
    """A long prompt takes what the budget leaves; an answer that has begun gets its token in every step."""
    scheduler = make_scheduler()
    add(scheduler, "short", 3, 0)
    assert run_step(scheduler) == [("short", 3)]
    add(scheduler, "long", 40, 1)
    assert [run_step(scheduler) for _ in range(4)] == [
        [("short", 1), ("long", 15)],
        [("short", 1), ("long", 15)],
        [("short", 1), ("long", 10)],
        [("short", 1), ("long", 1)],
    ]


def test_lower_priority_number_is_admitted_first_and_preempted_last():
    """The queue's policy decides both ways."""
    scheduler = make_scheduler(num_blocks=5, max_batch_tokens=64)
    late = add(scheduler, "late", 7, 0, priority=5)
    urgent = add(scheduler, "urgent", 7, 1, priority=0)
    assert run_step(scheduler) == [("urgent", 7), ("late", 7)]
    for _ in range(3):
        run_step(scheduler)
    assert late.state is SequenceState.WAITING
    assert urgent.state is SequenceState.RUNNING
    assert late.num_preemptions == 1


def test_a_crowd_that_leaves_the_queue_costs_as_much_as_one_that_is_served():
    """Twenty thousand waiting sequences are aborted in about the time it took to add them; the order stays."""
    scheduler = make_scheduler(num_blocks=4)
    first = add(scheduler, "first", 7, 0)
    crowd = [add(scheduler, str(index), 2, index) for index in range(1, 20_001)]
    last = add(scheduler, "last", 7, 20_001)
    assert len(scheduler.queue) == 20_002
    began_at = time.process_time()
    for sequence in reversed(crowd[1:]):
        scheduler.finish(sequence, FinishReason.ABORT)
    assert time.process_time() - began_at < 2
    assert (len(scheduler.queue), scheduler.num_queued_tokens) == (3, 7 + 2 + 7)
    assert len(scheduler.queue._heap) < 200
    assert [scheduler.queue.pop() for _ in range(3)] == [first, crowd[0], last]
    assert scheduler.queue.peek() is None


def test_little_is_computed_twice_where_blocks_are_scarce():
    """Sixty sequences of 100 to 160 tokens over blocks for eight: preemption throws away little of the work."""
    scheduler = make_scheduler(num_blocks=240, max_batch_tokens=512, max_running=256, prefix_caching=False)
    for arrival in range(60):
        add(scheduler, str(arrival), 70 + arrival % 7 * 5, arrival)
    num_computed = 0
    while scheduler.has_work:
        batch = scheduler.schedule()
        num_computed += batch.num_tokens
        last = [item.sequence for item in batch.scheduled if item.is_last_chunk]
        scheduler.advance(batch)
        for sequence in last:
            sequence.token_ids.append(7)
            if sequence.num_output_tokens > 30 + sequence.arrival % 11 * 3:
                scheduler.finish(sequence, FinishReason.LENGTH)
    num_needed = sum(70 + arrival % 7 * 5 + 30 + arrival % 11 * 3 for arrival in range(60))
    assert num_needed < num_computed < 1.2 * num_needed, num_computed / num_needed


def test_sequences_that_fit_to_their_ends_run_together():
    """Nothing is kept free for those that will never need it: all blocks are in use, and nobody is preempted."""
    num_sequences, num_prompt, num_answer = 8, 2 * BLOCK_SIZE, BLOCK_SIZE + 1
    scheduler = make_scheduler(num_blocks=num_sequences * 3, max_batch_tokens=4 * num_prompt)
    for arrival in range(num_sequences):
        add(scheduler, str(arrival), num_prompt, arrival, max_tokens=num_answer)
    num_running = []
    while scheduler.has_work:
        batch = scheduler.schedule()
        num_running.append(len(batch.scheduled))
        scheduler.advance(batch)
        for item in batch.scheduled:
            item.sequence.token_ids.append(7)
            if item.sequence.num_output_tokens == num_answer:
                scheduler.finish(item.sequence, FinishReason.LENGTH)
    assert max(num_running) == num_sequences
    assert scheduler.num_preemptions == 0


def test_a_preempted_sequence_is_not_taken_back_in_the_same_step():
    """What gave its blocks to another would take them back at once and lose them again."""
    scheduler = make_scheduler(num_blocks=5, max_batch_tokens=64)
    early = add(scheduler, "early", 7, 0)
    late = add(scheduler, "late", 7, 1)
    for _ in range(4):
        run_step(scheduler)
    assert late.state is SequenceState.WAITING
    for _ in range(3):
        assert run_step(scheduler) == [("early", 1)]
    scheduler.finish(early, FinishReason.STOP)
    assert run_step(scheduler)[0][0] == "late"


def test_neighbouring_blocks_are_preferred():
    """A sequence that grows alone stays adjacent, so its keys are read in place."""
    pool = BlockPool(10, BLOCK_SIZE)
    first = pool.allocate()
    assert [pool.allocate(after=first), pool.allocate(after=first + 1)] == [first + 1, first + 2]


def test_oldest_prefix_is_evicted_first_and_from_its_end():
    """Least recently used goes first; of one prefix the end goes before the beginning."""
    pool = BlockPool(4, BLOCK_SIZE)
    hashes: list[bytes] = []
    extend_block_hashes(hashes, list(range(16)), BLOCK_SIZE, "")
    blocks = [pool.allocate() for _ in range(4)]
    for block_id, block_hash in zip(blocks, hashes, strict=True):
        pool.publish(block_id, block_hash)
    pool.release(blocks[:2])
    pool.release(blocks[2:])
    assert [pool.allocate() for _ in range(4)] == [blocks[1], blocks[0], blocks[3], blocks[2]]
    assert pool.find_prefix(hashes) == []


def test_a_block_cannot_be_given_back_twice():
    """Giving back what is not held is our own bug and is not hidden."""
    pool = BlockPool(2, BLOCK_SIZE)
    block_id = pool.allocate()
    pool.release([block_id])
    with pytest.raises(AssertionError, match="released twice"):
        pool.release([block_id])
