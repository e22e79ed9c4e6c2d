"""Shared by the engine's tests."""

from collections.abc import Iterable

import pytest
import torch

from fastchat.engine.engine import Engine
from fastchat.engine.engine_config import EngineConfig
from fastchat.engine.events import SequenceEvent, SequenceRequest
from tests.engine.tiny_models import make_model

KV_BYTES_PER_TOKEN = 2 * 2 * 2 * 16 * 4


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tiny models gain nothing from two, and the machine is shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def glm():
    return make_model("glm")


def make_engine(model, *, num_blocks=400, block_size=8, max_context=256, **config) -> Engine:
    kv_cache_bytes = num_blocks * block_size * KV_BYTES_PER_TOKEN * model.dtype.itemsize // 4
    return Engine(
        model, EngineConfig(max_context=max_context, kv_cache_bytes=kv_cache_bytes, block_size=block_size, **config)
    )


def run_all(engine: Engine, requests: Iterable[SequenceRequest]) -> dict[str, list[SequenceEvent]]:
    """Submit everything at once and step until the engine has nothing left; events by sequence id."""
    events: dict[str, list[SequenceEvent]] = {}
    for request in requests:
        engine.add(request)
        events[request.sequence_id] = []
    while engine.has_work:
        for event in engine.step():
            events[event.sequence_id].append(event)
    assert engine.is_empty
    return events


def answer_ids(events: list[SequenceEvent]) -> list[int]:
    return [token_id for event in events for token_id in event.token_ids]
