"""Logits to token ids: every option is per sequence, and rows never influence each other.

A token's random number is an integer hash of (seed, choice, position), used by inverse CDF over the vocabulary's
order: nothing else in the process moves it, so a seeded text is the same alone, in a batch and after a preemption.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch
from torch import Tensor

from fastchat.engine import device_sampling
from fastchat.engine.engine_config import max_sampled_rows
from fastchat.engine.events import TokenLogprobs
from fastchat.engine.random_unit import random_unit
from fastchat.engine.sampling_params import SamplingParams
from fastchat.engine.sequence import Sequence
from fastchat.engine.staging import send, send_floats

_NUM_CANDIDATES = (64, 1024)
"""Cut-offs look at so many of the most probable tokens first; sorting a whole vocabulary costs twenty times as much."""
_LARGEST_LOGIT = 1e30
"""What a tiny repetition penalty may make of a logit: a number still when the smallest temperature divides it."""
_SEARCH_WIDTH = 256
"""torch looks for a place ten times as slowly as for a value: a row's largest value is found in parts of this width."""


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The next token of one sequence; `token_id` None means its logits were not numbers."""

    token_id: int | None
    logprobs: TokenLogprobs | None = None


class Sampler:
    """Chooses next tokens. Keeps what penalties need to know of a sequence, from its first token until `forget`."""

    def __init__(self, vocab_size: int, *, waits_once: bool = False) -> None:
        """`waits_once`: choose as `device_sampling.py` does, for a device that runs beside the host."""
        self._vocab_size = vocab_size
        self._waits_once = waits_once
        self._token_counts: dict[str, _TokenCounts] = {}

    def __repr__(self) -> str:
        return f"<Sampler counting for {len(self._token_counts)} sequences>"

    @property
    def num_tracked(self) -> int:
        """Sequences whose tokens are counted for penalties."""
        return len(self._token_counts)

    @torch.inference_mode()
    def sample(self, sequences: Rows[Sequence], logits: Tensor, num_ahead: int = 0) -> list[SampledToken]:
        """One token for each sequence; logits float32 (len(sequences), vocab_size), which are left unchanged.

        With `num_ahead` it is the token so many places further on, behind those that were sampled just before.
        """
        num_rows = max_sampled_rows(logits.device.type)
        starts = range(0, len(sequences), num_rows)
        parts = (self._sample(sequences[at : at + num_rows], logits[at : at + num_rows], num_ahead) for at in starts)
        return [token for part in parts for token in part]

    def forget(self, sequence: Sequence) -> None:
        """Drop what is kept of a sequence that ended."""
        self._token_counts.pop(sequence.sequence_id, None)

    def _sample(self, sequences: Rows[Sequence], logits: Tensor, num_ahead: int) -> list[SampledToken]:
        if logits.device.type == "mps":  # which lacks the float64 that sums over a vocabulary need
            logits = logits.cpu()
        token_ids: Rows[int | None]
        if self._waits_once:
            adjusted = self._adjust(list(sequences), logits, num_ahead)
            token_ids = device_sampling.choose(sequences, logits, adjusted, num_ahead)
        else:
            token_ids = self._choose_sound(sequences, logits, num_ahead)
        return [
            SampledToken(None) if token_id is None else self._note(sequence, token_id, logits, row)
            for row, (sequence, token_id) in enumerate(zip(sequences, token_ids, strict=True))
        ]

    def _note(self, sequence: Sequence, token_id: int, logits: Tensor, row: int) -> SampledToken:
        """Count a sequence's new token, and describe it where that is wanted."""
        if sequence.sequence_id in self._token_counts:
            self._token_counts[sequence.sequence_id].add(token_id)
        num_top = sequence.sampling.top_logprobs
        if num_top is None:
            return SampledToken(token_id)
        return SampledToken(token_id, describe_tokens(logits[row : row + 1], [token_id], num_top)[0])

    def _choose_sound(self, sequences: Rows[Sequence], logits: Tensor, num_ahead: int) -> list[int | None]:
        """A token for each row whose logits are numbers."""
        largest, most_probable = largest_of_rows(logits)
        wanted = [row for row, value in enumerate(largest.tolist()) if math.isfinite(value)]
        if len(wanted) == len(sequences):
            return [*self._choose(list(sequences), logits, most_probable, num_ahead)]
        sound = [sequences[row] for row in wanted]
        chosen: list[int | None] = [None] * len(sequences)
        for row, token_id in zip(
            wanted, self._choose(sound, logits[wanted], most_probable[wanted], num_ahead), strict=True
        ):
            chosen[row] = token_id
        return chosen

    def _choose(self, sequences: list[Sequence], logits: Tensor, most_probable: Tensor, num_ahead: int) -> list[int]:
        if not sequences:
            return []
        adjusted = self._adjust(sequences, logits, num_ahead)
        chosen: list[int] = (most_probable if adjusted is logits else adjusted.argmax(dim=-1)).tolist()
        random_rows = [row for row, sequence in enumerate(sequences) if not sequence.sampling.is_greedy]
        if random_rows:
            drawn = _draw([sequences[row] for row in random_rows], adjusted[random_rows], num_ahead)
            for row, token_id in zip(random_rows, drawn, strict=True):
                chosen[row] = token_id
        return chosen

    def _adjust(self, sequences: list[Sequence], logits: Tensor, num_ahead: int) -> Tensor:
        """Bias, penalties and forbidden ids, for the rows that asked. Copies only if there are any."""
        edited: Tensor | None = None
        for row, sequence in enumerate(sequences):
            sampling = sequence.sampling
            forbids_end = sequence.num_output_tokens + num_ahead < sampling.min_tokens and sampling.ending_token_ids
            if not (sampling.has_penalties or sampling.logit_bias or forbids_end):
                continue
            if edited is None:
                edited = logits.clone()
            if sampling.has_penalties:
                self._penalize(sequence, edited[row])
            if sampling.logit_bias:
                ids, biases = zip(*sampling.logit_bias, strict=True)
                (at,), (values,) = send([ids], logits.device), send_floats([biases], logits.device)
                edited[row].index_add_(0, at, values.float())
            if forbids_end:
                inside = [token_id for token_id in sampling.ending_token_ids if token_id < self._vocab_size]
                (at,) = send([inside], logits.device)
                edited[row].index_fill_(0, at, -torch.inf)
        return logits if edited is None else edited

    def _penalize(self, sequence: Sequence, row: Tensor) -> None:
        """Repetition as in CTRL (arXiv:1909.05858) over prompt and answer; presence and frequency over the answer."""
        counts = self._token_counts.get(sequence.sequence_id)
        if counts is None:
            counts = self._token_counts[sequence.sequence_id] = _TokenCounts.of(sequence, row.device)
        sampling = sequence.sampling
        ids, in_answer = (tensor[: len(counts.places)] for tensor in (counts.ids, counts.in_answer))
        values = row.index_select(0, ids)
        if sampling.repetition_penalty != 1.0:
            penalty = sampling.repetition_penalty
            values = torch.where(values > 0, values / penalty, values * penalty).clamp_(max=_LARGEST_LOGIT)
        values -= sampling.frequency_penalty * in_answer
        values -= sampling.presence_penalty * (in_answer > 0)
        row.index_copy_(0, ids, values)


@dataclass(slots=True)
class _TokenCounts:
    """The different ids of a sequence, by their `places`: few of a vocabulary's. Tensors may have room for more."""

    places: dict[int, int]
    ids: Tensor
    """# (at least len(places),)"""
    in_answer: Tensor
    """How often the answer has each, in float32. # (at least len(places),)"""

    @classmethod
    def of(cls, sequence: Sequence, device: torch.device) -> _TokenCounts:
        places = {token_id: place for place, token_id in enumerate(dict.fromkeys(sequence.token_ids))}
        counts = Counter(sequence.token_ids[sequence.num_prompt_tokens :])
        (ids,) = send([list(places)], device)
        (in_answer,) = send_floats([[counts[token_id] for token_id in places]], device)
        return cls(places, ids, in_answer.float())

    def add(self, token_id: int) -> None:
        """The answer goes on with it."""
        place = self.places.setdefault(token_id, len(self.places))
        if place == len(self.ids):
            self.ids, self.in_answer = (
                torch.cat((each, torch.zeros_like(each))) for each in (self.ids, self.in_answer)
            )
        self.ids[place].fill_(token_id)
        self.in_answer[place].add_(1.0)


def describe_tokens(logits: Tensor, token_ids: Rows[int], num_top: int) -> list[TokenLogprobs]:
    """Log probabilities of `token_ids` under the model's own distribution; logits (len(token_ids), vocab_size)."""
    logprobs = logits.log_softmax(dim=-1)
    chosen = logprobs.gather(1, torch.tensor(token_ids, device=logits.device).unsqueeze(1)).squeeze(1).tolist()
    if num_top == 0:
        return [TokenLogprobs(token_id, logprob) for token_id, logprob in zip(token_ids, chosen, strict=True)]
    top = logprobs.topk(min(num_top, logprobs.shape[1]), dim=-1)
    return [
        TokenLogprobs(token_id, logprob, tuple(zip(ids, values, strict=True)))
        for token_id, logprob, ids, values in zip(
            token_ids, chosen, top.indices.tolist(), top.values.tolist(), strict=True
        )
    ]


def _draw(sequences: list[Sequence], logits: Tensor, num_ahead: int) -> list[int]:
    """Temperature, cut-offs, then one draw per row. logits (len(sequences), vocab_size)."""
    params = [sequence.sampling for sequence in sequences]
    temperatures = torch.tensor([sampling.temperature for sampling in params], device=logits.device)
    weights = (logits / temperatures.unsqueeze(1)).softmax(dim=-1)
    units = [random_unit(s.sampling.seed, s.sampling.choice, s.num_output_tokens + num_ahead) for s in sequences]
    return [
        _draw_among_likely(row, sampling, unit) if _cuts_off(sampling) else _draw_place(row, unit)
        for row, sampling, unit in zip(weights, params, units, strict=True)
    ]


def _cuts_off(sampling: SamplingParams) -> bool:
    return bool(sampling.top_k) or sampling.top_p < 1.0 or sampling.min_p > 0.0


def _draw_place(weights: Tensor, unit: float) -> int:
    """The place that `unit` of the whole weight falls on. weights (N,)."""
    cumulative = weights.double().cumsum(dim=0)
    place = torch.searchsorted(cumulative, unit * cumulative[-1], right=True)
    return min(int(place), len(weights) - 1)


def _draw_among_likely(weights: Tensor, sampling: SamplingParams, unit: float) -> int:
    """A draw among the tokens that no cut-off takes, in the vocabulary's order. weights (vocab_size,)."""
    vocab_size = len(weights)
    for size in (*_NUM_CANDIDATES, vocab_size):
        candidates, token_ids = weights.topk(min(max(size, sampling.top_k + 1), vocab_size))  # falling
        smallest = _smallest_kept(candidates, sampling)
        # Equal weights are kept or cut off together, so one that is less likely must be in sight.
        if candidates[-1] < smallest or len(candidates) == vocab_size:
            break
    kept = candidates >= smallest
    in_order, order = token_ids[kept].sort()
    return int(in_order[_draw_place(candidates[kept][order], unit)])


def _smallest_kept(candidates: Tensor, sampling: SamplingParams) -> Tensor:
    """The weight below which a token is cut off by top_k, then top_p of the rest, then min_p.

    `candidates` are the largest weights, falling; where top_p reaches beyond them, it cuts off none of them.
    """
    likeliest, mass = candidates[0], 1.0
    smallest = likeliest * sampling.min_p
    if sampling.top_k:
        candidates = candidates[: sampling.top_k]
        mass = float(candidates.double().sum())
        smallest = torch.maximum(smallest, candidates[-1])
    if sampling.top_p < 1.0:
        cumulative = candidates.double().cumsum(dim=0)
        num_kept = int((cumulative < sampling.top_p * mass).sum()) + 1
        smallest = torch.maximum(smallest, candidates[min(num_kept, len(candidates)) - 1])
    return smallest


def largest_of_rows(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest value of each row and its first place, as `logits.max(dim=-1)`, (num_rows,) each."""
    width, size = _SEARCH_WIDTH, logits.shape[1]
    if logits.device.type != "cpu" or size < width:
        return logits.max(dim=-1)
    whole = size // width * width
    parts = logits[:, :whole].view(len(logits), -1, width).amax(dim=-1)
    if whole < size:
        parts = torch.cat([parts, logits[:, whole:].amax(dim=-1, keepdim=True)], dim=-1)
    values, part = parts.max(dim=-1)
    begin = (part * width).clamp_(max=size - width).unsqueeze(1)
    places = begin + torch.arange(width)
    return values, begin.squeeze(1) + logits.gather(1, places).argmax(dim=-1)
