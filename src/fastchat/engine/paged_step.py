"""The spans of a step as `attend_triton` takes them: decoding sequences, then chunks of prompts."""

from __future__ import annotations

import torch

from fastchat.engine.attention import SequenceSpan
from fastchat.engine.staging import send
from fastchat.native.paged_queries import PagedQueries


def paged_queries(spans: list[SequenceSpan], block_size: int, device: torch.device) -> tuple[PagedQueries, ...]:
    """One for the sequences with one new token, one for those with more; neither where there are none."""
    decoding = [span for span in spans if span.num_queries == 1]
    chunks = [span for span in spans if span.num_queries > 1]
    return tuple(_paged_queries(group, block_size, device) for group in (decoding, chunks) if group)


def _paged_queries(spans: list[SequenceSpan], block_size: int, device: torch.device) -> PagedQueries:
    width = max(len(span.block_ids) for span in spans)
    starts, counts, lengths, tables = send(
        [
            [span.query_start for span in spans],
            [span.num_queries for span in spans],
            [span.context_length for span in spans],
            [number for span in spans for number in span.block_ids + [0] * (width - len(span.block_ids))],
        ],
        device,
    )
    max_count = max(span.num_queries for span in spans)
    return PagedQueries(starts, counts, lengths, tables.view(len(spans), width), block_size, max_count)
