"""Adapters that come and go while an engine runs: one test for an engine on a thread and one in a process."""

import asyncio
import contextlib
import gc
import sys
import weakref

import pytest

from fastchat.engine.client import EngineClient
from fastchat.engine.events import FinishReason, SequenceRequest
from fastchat.engine.process_client import ProcessEngineClient
from fastchat.engine.sampling_params import SamplingParams
from fastchat.engine.thread_client import ThreadEngineClient
from fastchat.errors import CheckpointError, EngineError
from tests.adapters import modules_of, write_lora
from tests.checkpoints import write_checkpoint
from tests.engine.adapted_child import MAX_CONTEXT, make_adapted_engine

LIMIT_S = 60


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    base = write_checkpoint(root / "base", "qwen2")
    for number, name in enumerate(("one", "two")):
        write_lora(root / name, base, modules_of("qwen2"), seed=number)
    other = write_checkpoint(root / "other", "qwen2", config={"intermediate_size": 64})
    write_lora(root / "misfit", other, modules_of("qwen2"))
    (root / "empty").mkdir()
    return root


def make_client(kind: str, folders) -> EngineClient:
    if kind == "process":
        command = (sys.executable, "-m", "tests.engine.adapted_child", "--folder", str(folders / "base"))
        return ProcessEngineClient(command)
    return ThreadEngineClient(lambda: make_adapted_engine(folders / "base"))


@contextlib.asynccontextmanager
async def running(kind: str, folders):
    client = make_client(kind, folders)
    await client.start()
    try:
        async with asyncio.timeout(LIMIT_S):
            yield client
    finally:
        await client.close()


async def collect(client: EngineClient, name: str, adapter: str = "", max_tokens: int = 24) -> list:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    events = []
    async with client.open(SequenceRequest(name, tuple(range(30, 60)), sampling, adapter=adapter)) as stream:
        while not events or events[-1].finish_reason is None:
            events += await stream.next_events()
    return events


async def answer(client: EngineClient, name: str, adapter: str = "", max_tokens: int = 24) -> list[int]:
    events = await collect(client, name, adapter, max_tokens)
    assert events[-1].finish_reason is FinishReason.LENGTH, events[-1]
    return [token_id for event in events for token_id in event.token_ids]


both = pytest.mark.parametrize("kind", ["thread", "process"])


@both
def test_an_adapter_that_comes_and_goes_leaves_the_base_as_it_was(kind, folders):
    """Token for token: before, beside and after it; and it is the same again when it comes back."""

    async def main():
        async with running(kind, folders) as client:
            before = await answer(client, "before")
            await client.add_adapter("one", str(folders / "one"))
            adapted = await answer(client, "adapted", "one")
            assert adapted != before
            assert await answer(client, "beside") == before
            await client.remove_adapter("one")
            assert await answer(client, "after") == before
            gone = (await collect(client, "gone", "one"))[-1]
            assert gone.finish_reason is FinishReason.ERROR
            assert "removed" in gone.error
            await client.add_adapter("one", str(folders / "one"))
            assert await answer(client, "again", "one") == adapted

    asyncio.run(main())


@both
def test_running_sequences_notice_neither_an_arrival_nor_a_removal(kind, folders):
    """Base and adapter are in one batch while another adapter comes and their own goes: the tokens stay."""

    async def main():
        async with running(kind, folders) as client:
            await client.add_adapter("one", str(folders / "one"))
            has_changed = asyncio.Event()
            async with asyncio.TaskGroup() as group:
                mixed = {name: group.create_task(ids_until(has_changed, client, name)) for name in ("", "one")}
                while client.stats.num_running < 2:
                    await asyncio.sleep(0.001)
                await client.add_adapter("two", str(folders / "two"))
                await client.remove_adapter("one")
                late = await answer(client, "late", "two")
                has_changed.set()
            await client.add_adapter("one", str(folders / "one"))
            for name, task in mixed.items():
                assert await answer(client, f"alone-{name}", name, len(task.result())) == task.result()
            assert await answer(client, "again", "two") == late

    asyncio.run(main())


async def ids_until(happened: asyncio.Event, client: EngineClient, adapter: str) -> list[int]:
    """What an answer that is long enough has said when something has happened."""
    sampling = SamplingParams(max_tokens=MAX_CONTEXT - 30, temperature=0.0)
    ids = []
    request = SequenceRequest(f"mixed-{adapter}", tuple(range(30, 60)), sampling, adapter=adapter)
    async with client.open(request) as stream:
        while not happened.is_set():
            for event in await stream.next_events():
                assert event.finish_reason is None, "too short to be a test"
                ids += event.token_ids
    return ids


@both
def test_what_cannot_be_added_changes_nothing(kind, folders):
    """The reason comes as it was raised, and the name is free for another try."""

    async def main():
        async with running(kind, folders) as client:
            before = await answer(client, "before")
            for folder, reason in (("misfit", "of another model"), ("empty", "no adapter"), ("nowhere", "no adapter")):
                with pytest.raises(CheckpointError, match=reason):
                    await client.add_adapter("one", str(folders / folder))
            assert await answer(client, "after") == before
            await client.add_adapter("one", str(folders / "one"))
            with pytest.raises(CheckpointError, match="loaded already"):
                await client.add_adapter("one", str(folders / "two"))
            await client.remove_adapter("nobody")

    asyncio.run(main())


@both
def test_an_order_to_an_engine_that_ends_is_answered(kind, folders):
    """Whoever waits hears of the end, and whoever comes later does at once."""

    async def main():
        async with running(kind, folders) as client:
            orders = [asyncio.ensure_future(client.add_adapter(f"n{n}", str(folders / "one"))) for n in range(3)]
            await asyncio.sleep(0)
            await client.close()
            outcomes = await asyncio.gather(*orders, return_exceptions=True)
            assert all(outcome is None or isinstance(outcome, EngineError) for outcome in outcomes)
            with pytest.raises(EngineError):
                await client.remove_adapter("n0")

    asyncio.run(main())


def test_a_removed_adapter_s_memory_is_free_when_its_last_sequence_has_ended(folders):
    """Not before, and without waiting for a further step."""

    async def main():
        engines = []
        client = ThreadEngineClient(lambda: engines.append(make_adapted_engine(folders / "base")) or engines[0])
        await client.start()
        try:
            await client.add_adapter("one", str(folders / "one"))
            change = weakref.ref(engines[0].adapters.find("one").change)
            await answer(client, "first", "one")
            await client.remove_adapter("one")
            gc.collect()
            assert change() is None
        finally:
            engines.clear()
            await client.close()

    asyncio.run(main())
