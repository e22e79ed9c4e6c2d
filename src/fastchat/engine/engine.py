"""The engine: token ids in, token ids out. Owns the loop's one step, the scheduler, the runner and the sampler.

Knows no text, no HTTP and no model family. One thread calls it (`engine_loop.py`).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastchat.engine.adapters import AdapterHost, AdapterTable
from fastchat.engine.client import EngineLimits
from fastchat.engine.drafting import Drafter
from fastchat.engine.engine_config import EngineConfig, default_block_size, max_drafted_rows, max_useful_blocks
from fastchat.engine.events import EngineStats, FinishReason, SequenceEvent, SequenceRequest, TokenLogprobs
from fastchat.engine.execution import Execution
from fastchat.engine.kv_cache import BlockPool
from fastchat.engine.model_runner import KVShape, ModelRunner, StepOutput
from fastchat.engine.sampler import SampledToken, Sampler, describe_tokens
from fastchat.engine.scheduler import ScheduledBatch, ScheduledSequence, Scheduler
from fastchat.engine.sequence import Sequence
from fastchat.engine.waiting_queue import PriorityQueue
from fastchat.errors import ConfigError

logger = logging.getLogger(__name__)


class Engine:
    """Runs many sequences over one model, and over its `adapters` where it has a side for them. Not thread-safe."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: EngineConfig,
        host: AdapterHost | None = None,
        execution: Execution | None = None,
    ) -> None:
        """`execution` None is the fastest that the model's device has."""
        self.adapters = AdapterTable(host)
        block_size = config.block_size or default_block_size(model.device.type)
        num_blocks = _num_blocks(model, config, block_size)
        execution = execution or Execution.of(model.device, model.dtype)
        max_context = min(config.max_context, num_blocks * block_size)
        self._runner = ModelRunner(
            model,
            num_blocks=num_blocks,
            block_size=block_size,
            max_running=config.max_running,
            max_context=max_context,
            execution=execution,
            on_layer=self._note_layer,
            host=host,
        )
        self._sampler = Sampler(self._runner.vocab_size, waits_once=execution.waits_once)
        self._scheduler = Scheduler(
            BlockPool(num_blocks, block_size),
            PriorityQueue(),
            max_batch_tokens=config.max_batch_tokens,
            max_running=config.max_running,
            prefix_caching=config.prefix_caching,
            drafter=Drafter(
                max_rows=max_drafted_rows(model.device.type) if config.speculation else 1,
                max_context=max_context,
            ),
        )
        self._sequences: dict[str, Sequence] = {}
        self._hidden_sums: dict[str, Tensor] = {}
        self._num_slots = num_blocks * block_size
        self._num_arrivals = 0
        self._counts = _Counts()
        self.limits = EngineLimits(
            max_context=max_context,
            num_blocks=num_blocks,
            block_size=block_size,
            vocab_size=self._runner.vocab_size,
            embedding_size=model.config.hidden_size,
            device=str(model.device),
            dtype=str(getattr(model, "held_as", model.dtype)).removeprefix("torch."),
        )
        if self.limits.max_context < config.max_context:
            logger.warning(
                "the KV cache holds %d tokens, fewer than the model's context of %d; longer requests are refused",
                self.limits.max_context,
                config.max_context,
            )

    def __repr__(self) -> str:
        return f"<Engine {self._scheduler!r}>"

    @property
    def has_work(self) -> bool:
        """Whether a step would compute something."""
        return self._scheduler.has_work

    @property
    def is_empty(self) -> bool:
        """Whether nothing is held: no sequence, no block, no sampling state."""
        pool = self._scheduler.pool
        num_tracked = self._sampler.num_tracked + self._scheduler.drafter.num_tracked
        return not (self._sequences or self._hidden_sums or num_tracked) and pool.num_free_blocks == pool.num_blocks

    @property
    def progress(self) -> int:
        """Grows with every layer computed; may be read from any thread."""
        return self._counts.layers

    @property
    def stats(self) -> EngineStats:
        """The condition between two steps."""
        return EngineStats(
            num_steps=self._counts.steps,
            progress=self._counts.layers,
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.queue),
            num_queued_tokens=self._scheduler.num_queued_tokens,
            num_free_blocks=self._scheduler.pool.num_free_blocks,
            num_blocks=self._scheduler.pool.num_blocks,
            num_prompt_tokens=self._counts.prompt_tokens,
            num_cached_tokens=self._counts.cached_tokens,
            num_generated_tokens=self._counts.generated_tokens,
            num_preemptions=self._scheduler.num_preemptions,
            num_drafted_tokens=self._scheduler.drafter.num_drafted_tokens,
            num_accepted_tokens=self._scheduler.drafter.num_accepted_tokens,
        )

    def add(self, request: SequenceRequest) -> SequenceEvent | None:
        """Let a sequence wait for its turn. `EngineClient.submit` has checked it against `limits`.

        The event is the end of one whose adapter is not there (any more), or leaves no room for it.
        """
        assert request.sequence_id not in self._sequences, f"{request.sequence_id} was submitted twice"
        adapter = self.adapters.find(request.adapter)
        if adapter is None and request.adapter:
            error = self.adapters.why_not(request.adapter)
            return SequenceEvent(request.sequence_id, finish_reason=FinishReason.ERROR, error=error)
        sequence = Sequence(request, self._num_arrivals, adapter)
        if sequence.num_prefix_slots + len(request.prompt_token_ids) + request.sampling.max_tokens > self._num_slots:
            error = f"the KV cache of {self._num_slots} tokens is too small for this with the prefix of its adapter"
            return SequenceEvent(request.sequence_id, finish_reason=FinishReason.ERROR, error=error)
        self._num_arrivals += 1
        self._sequences[request.sequence_id] = sequence
        self._scheduler.add(sequence)
        return None

    def abort(self, sequence_id: str) -> SequenceEvent | None:
        """End a sequence now; its blocks are free on return. None for an unknown or finished one."""
        sequence = self._sequences.get(sequence_id)
        return None if sequence is None else self._finish(sequence, FinishReason.ABORT)

    def step(self, num_sharing: int = 1) -> list[SequenceEvent]:
        """Schedule, run, sample; one event for every sequence that got a token or ended.

        `num_sharing` engines have work for the device; a step computes only its part of a prompt.
        Raises `torch.AcceleratorError`, after which the device computes nothing any more.
        """
        batch = self._scheduler.schedule(num_sharing)
        if not batch.scheduled:
            return []
        try:
            computed = self._compute(batch)
        except torch.AcceleratorError:
            raise
        except Exception:
            logger.exception("a step failed num_sequences=%d num_tokens=%d", len(batch.scheduled), batch.num_tokens)
            return self._step_one_by_one(batch)
        return self._postprocess(batch, computed)

    def _compute(self, batch: ScheduledBatch) -> _Computed:
        """Everything of a step that may fail. No sequence is changed."""
        output = self._runner.run(batch)
        return _Computed(
            output,
            prompt_logprobs=[self._describe_prompt(item, hidden) for item, hidden in output.prompt_hidden],
            sampled=[] if output.last_hidden is None else self._sample(output.sampling, output.last_hidden),
        )

    def _sample(self, items: list[ScheduledSequence], hidden_states: Tensor) -> list[list[SampledToken]]:
        """The next tokens of each sequence: one, and where a draft held, those behind it."""
        if any(item.draft for item in items):
            parts = [logits for _, logits in self._runner.logits(hidden_states)]  # few rows: drafts are few
            return self._verify(items, torch.cat(parts))
        sampled: list[list[SampledToken]] = []
        for rows, logits in self._runner.logits(hidden_states):
            sequences = [item.sequence for item in items[rows]]
            sampled += [[token] for token in self._sampler.sample(sequences, logits)]
        return sampled

    def _verify(self, items: list[ScheduledSequence], logits: Tensor) -> list[list[SampledToken]]:
        """Sample place after place as if there were no draft, for as long as the draft has foreseen what comes."""
        first_rows = list(accumulate((item.num_rows for item in items), initial=0))
        sampled: list[list[SampledToken]] = [[] for _ in items]
        going_on = list(range(len(items)))
        num_ahead = 0
        while going_on:
            rows = logits[[first_rows[index] + num_ahead for index in going_on]]
            tokens = self._sampler.sample([items[index].sequence for index in going_on], rows, num_ahead)
            foreseen = []
            for index, token in zip(going_on, tokens, strict=True):
                if token.token_id is not None or num_ahead == 0:  # what fails further on fails again as a first place
                    sampled[index].append(token)
                draft = items[index].draft
                if num_ahead < len(draft) and draft[num_ahead] == token.token_id:
                    foreseen.append(index)
            going_on = foreseen
            num_ahead += 1
        return sampled

    def _describe_prompt(self, item: ScheduledSequence, hidden_states: Tensor) -> list[TokenLogprobs]:
        """Row i of `hidden_states` predicts the token after place item.start + i."""
        sequence = item.sequence
        num_top = sequence.sampling.prompt_logprobs
        assert num_top is not None
        predicted = sequence.token_ids[item.start + 1 : min(item.end + 1, sequence.num_prompt_tokens)]
        entries: list[TokenLogprobs] = []
        for rows, logits in self._runner.logits(hidden_states[: len(predicted)]):
            entries += describe_tokens(logits, predicted[rows], num_top)
        return entries

    def _step_one_by_one(self, batch: ScheduledBatch) -> list[SequenceEvent]:
        """The failed step again, each sequence alone: only those that fail alone too are to blame and end."""
        events: list[SequenceEvent] = []
        for item in batch.scheduled:
            self._sampler.forget(item.sequence)  # counted anew from its tokens; the failure may have counted one
            alone = ScheduledBatch((item,))
            try:
                computed = self._compute(alone)
            except torch.AcceleratorError:
                raise
            except Exception:  # one request, one fault
                logger.exception("a sequence failed sequence_id=%s", item.sequence.sequence_id)
                events.append(self._fail(item.sequence, "the engine failed to compute this step"))
            else:
                events += self._postprocess(alone, computed)
        return events

    def _postprocess(self, batch: ScheduledBatch, computed: _Computed) -> list[SequenceEvent]:
        """Take the step's results into the sequences."""
        self._counts.steps += 1
        for (item, _), entries in zip(computed.output.prompt_hidden, computed.prompt_logprobs, strict=True):
            _note_prompt_logprobs(item, entries)
        for item in batch.scheduled:
            if item.start == item.sequence.num_cached_tokens and item.sequence.num_preemptions == 0:
                self._counts.prompt_tokens += item.sequence.num_prompt_tokens
                self._counts.cached_tokens += item.start
        chosen = [
            (item.sequence, sampled, self._append(item.sequence, sampled))
            for item, sampled in zip(computed.output.sampling, computed.sampled, strict=True)
        ]
        self._scheduler.advance(batch, failed=[sequence for sequence, sampled, _ in chosen if _has_failed(sampled)])
        events = [self._report(*entry) for entry in chosen]
        return events + self._embed(batch, computed.output)

    def _append(self, sequence: Sequence, sampled: list[SampledToken]) -> list[SampledToken]:
        """Give a sequence its next tokens, up to the one that ends it; those that it took."""
        taken: list[SampledToken] = []
        if sequence.num_output_tokens >= sequence.sampling.max_tokens:  # only its prompt was wanted
            return taken
        for token in sampled:
            if token.token_id is None:
                break
            sequence.token_ids.append(token.token_id)
            taken.append(token)
            if sequence.finish_reason_after(self.limits.max_context) is not None:
                break
        self._counts.generated_tokens += len(taken)
        return taken

    def _report(self, sequence: Sequence, sampled: list[SampledToken], taken: list[SampledToken]) -> SequenceEvent:
        """Say what a step gave a sequence, and end it if it has ended."""
        if _has_failed(sampled):
            return self._fail(sequence, "the model gave logits that are not numbers")
        if not taken:
            return self._finish(sequence, FinishReason.LENGTH)
        reason = sequence.finish_reason_after(self.limits.max_context)
        if reason is not None:
            self._drop(sequence, reason)
        is_first = sequence.num_output_tokens == len(taken)
        return SequenceEvent(
            sequence.sequence_id,
            token_ids=tuple(token.token_id for token in taken if token.token_id is not None),
            logprobs=tuple(token.logprobs for token in taken if token.logprobs is not None),
            finish_reason=reason,
            num_cached_tokens=sequence.num_cached_tokens or 0,
            prompt_logprobs=tuple(sequence.prompt_logprobs) if is_first else (),
        )

    def _embed(self, batch: ScheduledBatch, output: StepOutput) -> list[SequenceEvent]:
        """Add up the hidden states of embedding sequences; the mean goes out after the last chunk."""
        chunk_of = {item.sequence.sequence_id: item for item in batch.scheduled}
        events = []
        for sequence, hidden_sum in output.hidden_sums:
            item = chunk_of[sequence.sequence_id]
            # At the beginning, and again after a preemption, the sum starts anew.
            total = hidden_sum if item.start == 0 else self._hidden_sums[sequence.sequence_id] + hidden_sum
            self._hidden_sums[sequence.sequence_id] = total
            if item.is_last_chunk:
                mean = (total / len(sequence.token_ids)).float()
                events.append(self._finish(sequence, FinishReason.STOP, embedding=tuple(mean.tolist())))
        return events

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        *,
        embedding: tuple[float, ...] | None = None,
        error: str | None = None,
    ) -> SequenceEvent:
        """End a sequence without a further token."""
        self._drop(sequence, reason)
        return SequenceEvent(
            sequence.sequence_id,
            finish_reason=reason,
            num_cached_tokens=sequence.num_cached_tokens or 0,
            prompt_logprobs=tuple(sequence.prompt_logprobs) if sequence.wants_prompt_logprobs else (),
            embedding=embedding,
            error=error,
        )

    def _fail(self, sequence: Sequence, error: str) -> SequenceEvent:
        return self._finish(sequence, FinishReason.ERROR, error=error)

    def _drop(self, sequence: Sequence, reason: FinishReason) -> None:
        """Free all that is held for a sequence."""
        self._scheduler.finish(sequence, reason)
        self._sampler.forget(sequence)
        self._hidden_sums.pop(sequence.sequence_id, None)
        del self._sequences[sequence.sequence_id]

    def _note_layer(self) -> None:
        self._counts.layers += 1


@dataclass(frozen=True, slots=True)
class _Computed:
    """One step's results: `prompt_logprobs` beside `output.prompt_hidden`, `sampled` beside `output.sampling`."""

    output: StepOutput
    prompt_logprobs: list[list[TokenLogprobs]]
    sampled: list[list[SampledToken]]


@dataclass(slots=True)
class _Counts:
    """Totals since the engine began."""

    steps: int = 0
    layers: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0


def _num_blocks(model: PreTrainedModel, config: EngineConfig, block_size: int) -> int:
    """Blocks that fit the memory, but no more than all running sequences could use."""
    bytes_per_block = KVShape.of(model).bytes_per_token * block_size
    num_blocks = config.kv_cache_bytes // bytes_per_block
    if num_blocks < 1:
        raise ConfigError(
            f"the KV cache of {config.kv_cache_bytes} bytes holds no block of {block_size} tokens "
            f"({bytes_per_block} bytes); give it more memory"
        )
    return min(num_blocks, max_useful_blocks(config.max_context, config.max_running, block_size))


def _has_failed(sampled: list[SampledToken]) -> bool:
    return sampled[0].token_id is None


def _note_prompt_logprobs(item: ScheduledSequence, entries: list[TokenLogprobs]) -> None:
    if item.start == 0:  # also after a preemption
        item.sequence.prompt_logprobs = [TokenLogprobs(item.sequence.token_ids[0], None)]
    item.sequence.prompt_logprobs += entries
