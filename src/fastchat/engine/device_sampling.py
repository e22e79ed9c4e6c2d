"""The choice of next tokens where the device runs beside the host: all rows at once, and the host waits once.

The same tokens as `sampler.py` chooses row by row on a CPU (there is an equality test): there it pays to look at few
candidates and to leave early, here to ask the device nothing before the ids.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from fastchat.engine.random_unit import random_unit
from fastchat.engine.sequence import Sequence
from fastchat.engine.staging import send, send_floats


def choose(sequences: Rows[Sequence], logits: Tensor, adjusted: Tensor, num_ahead: int) -> list[int | None]:
    """A token id for each row, None where `logits` are not numbers; both float32 (len(sequences), vocab_size).

    `adjusted` are the logits after bias and penalties. The answer's `tolist` is the one place where the host waits.
    """
    chosen = adjusted.argmax(dim=-1)
    random_rows = [row for row, sequence in enumerate(sequences) if not sequence.sampling.is_greedy]
    if random_rows:
        (at,) = send([random_rows], logits.device)
        drawn = _draw([sequences[row] for row in random_rows], adjusted.index_select(0, at), num_ahead)
        chosen = chosen.index_copy(0, at, drawn)
    is_sound = torch.isfinite(logits.amax(dim=-1))
    token_ids: list[int] = torch.where(is_sound, chosen, -1).tolist()
    return [None if token_id < 0 else token_id for token_id in token_ids]


def _draw(sequences: Rows[Sequence], logits: Tensor, num_ahead: int) -> Tensor:
    """Temperature, cut-offs, then one draw per row by inverse CDF. -> (len(sequences),)."""
    params = [sequence.sampling for sequence in sequences]
    units = [random_unit(s.sampling.seed, s.sampling.choice, s.num_output_tokens + num_ahead) for s in sequences]
    vocab_size = logits.shape[1]
    temperatures, top_ps, min_ps, targets = send_floats(
        [
            [sampling.temperature for sampling in params],
            [sampling.top_p for sampling in params],
            [sampling.min_p for sampling in params],
            units,
        ],
        logits.device,
    )
    weights = (logits / temperatures.float().unsqueeze(1)).softmax(dim=-1)
    if any(sampling.top_k or sampling.top_p < 1.0 or sampling.min_p > 0.0 for sampling in params):
        (top_ks,) = send([[min(sampling.top_k or vocab_size, vocab_size) for sampling in params]], logits.device)
        weights = weights * (weights >= _smallest_kept(weights, top_ks, top_ps, min_ps.float()))
    cumulative = weights.double().cumsum(dim=-1)
    drawn = torch.searchsorted(cumulative, (targets * cumulative[:, -1]).unsqueeze(1), right=True).squeeze(1)
    return drawn.clamp_(max=vocab_size - 1)


def _smallest_kept(weights: Tensor, top_ks: Tensor, top_ps: Tensor, min_ps: Tensor) -> Tensor:
    """The weight below which a row's tokens are cut off by top_k, then top_p of the rest, then min_p. # (rows, 1)."""
    falling = weights.sort(dim=-1, descending=True).values
    places = torch.arange(weights.shape[1], device=weights.device)
    among_top = falling.double() * (places < top_ks.unsqueeze(1))
    cumulative = among_top.cumsum(dim=-1)
    # Without top_k the mass is 1 by definition, which the sum may miss by its rounding.
    mass = torch.where(top_ks < weights.shape[1], cumulative[:, -1], 1.0)
    is_below = cumulative < (top_ps * mass).unsqueeze(1)
    num_kept = torch.where(top_ps < 1.0, is_below.sum(dim=-1) + 1, weights.shape[1])
    last_kept = torch.minimum(num_kept, top_ks) - 1
    return torch.maximum(falling.gather(1, last_kept.unsqueeze(1)), falling[:, :1] * min_ps.unsqueeze(1))
