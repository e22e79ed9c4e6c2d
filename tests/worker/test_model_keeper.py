"""Models that come and go: requests wait for their model, nobody is thrown out, a failed load tells everybody."""

import asyncio
import time
from contextlib import asynccontextmanager

import pytest

from fastchat.engine.client import EngineClient, EngineLimits
from fastchat.engine.events import EngineStats, FinishReason, SequenceEvent, SequenceRequest
from fastchat.engine.sampling_params import SamplingParams
from fastchat.errors import CheckpointError, EngineError, FastChatError
from fastchat.worker.model_keeper import ModelKeeper
from fastchat.worker.on_demand_engine import OnDemandEngine
from fastchat.worker.residency import Place, Residency

LIMITS = EngineLimits(
    max_context=64, num_blocks=8, block_size=8, vocab_size=100, embedding_size=8, device="cpu", dtype="float32"
)


pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    return "asyncio"


class Machine:
    """What the fake engines share: who holds memory, and what goes wrong."""

    def __init__(self) -> None:
        self.awake: list[str] = []
        self.most_awake = 0
        self.fails_with: Exception | None = None
        self.may_load = asyncio.Event()
        self.may_load.set()
        self.may_abort = asyncio.Event()
        self.may_abort.set()
        self.may_close = asyncio.Event()
        self.may_close.set()


class Counting(EngineClient):
    """An engine that answers every sequence with the ids 1, 2, 3, one per turn of the event loop."""

    def __init__(self, key: str, machine: Machine) -> None:
        super().__init__()
        self.limits = LIMITS
        self._key, self._machine = key, machine
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._num_tokens = 0

    async def start(self) -> None:
        await self._machine.may_load.wait()
        if self._machine.fails_with is not None:
            raise self._machine.fails_with
        self._machine.awake.append(self._key)
        self._machine.most_awake = max(self._machine.most_awake, len(self._machine.awake))
        self._failure = None

    async def close(self) -> None:
        await self._machine.may_close.wait()
        if self._key in self._machine.awake:
            self._machine.awake.remove(self._key)
        self._fail(EngineError("closed"))

    def _send(self, request: SequenceRequest) -> None:
        task = asyncio.get_running_loop().create_task(self._answer(request.sequence_id))
        self._tasks[request.sequence_id] = task

    def _send_abort(self, sequence_id: str) -> None:
        self._tasks[sequence_id].cancel()
        self._tasks[sequence_id] = asyncio.get_running_loop().create_task(self._abort(sequence_id))

    async def _abort(self, sequence_id: str) -> None:
        await self._machine.may_abort.wait()
        self._deliver([SequenceEvent(sequence_id, finish_reason=FinishReason.ABORT)], self._last_stats)

    async def _answer(self, sequence_id: str) -> None:
        for token_id in (1, 2, 3):
            await asyncio.sleep(0)
            self._num_tokens += 1
            reason = FinishReason.STOP if token_id == 3 else None
            event = SequenceEvent(sequence_id, token_ids=(token_id,), finish_reason=reason)
            self._deliver([event], EngineStats(num_steps=self._num_tokens, num_generated_tokens=self._num_tokens))


@asynccontextmanager
async def kept(machine: Machine, sizes: dict[str, int], budget: int = 10, **options):
    residency = Residency(budget, time.monotonic, **options)
    for key, size in sizes.items():
        residency.add(key, size)
    keeper = ModelKeeper(residency, {key: lambda key=key: Counting(key, machine) for key in sizes})
    async with keeper.running():
        yield keeper, {key: OnDemandEngine(key, keeper, LIMITS) for key in sizes}


def request(number: int) -> SequenceRequest:
    return SequenceRequest(f"request-{number}", (5, 6), SamplingParams(max_tokens=3))


async def ask(engine: EngineClient, number: int = 0) -> list[int]:
    """One whole answer."""
    token_ids: list[int] = []
    async with engine.open(request(number)) as stream:
        while True:
            for event in await stream.next_events():
                token_ids += event.token_ids
                if event.finish_reason is not None:
                    return token_ids


async def test_a_sleeping_model_answers_and_stays():
    """The first request wakes it, the second finds it awake."""
    machine = Machine()
    async with kept(machine, {"a": 5}) as (_, engines):
        assert machine.awake == []
        assert await ask(engines["a"]) == [1, 2, 3]
        assert machine.awake == ["a"]
        assert await ask(engines["a"]) == [1, 2, 3]
        assert engines["a"].stats.num_generated_tokens == 6
    assert machine.awake == []


async def test_models_that_do_not_fit_together_take_turns():
    """100 requests to three models with room for one: all are answered, never two in memory, totals only grow."""
    machine = Machine()
    async with kept(machine, {"a": 8, "b": 8, "c": 8}, patience_s=0.01) as (_, engines):
        asked = [ask(engines["abc"[number % 3]], number) for number in range(100)]
        async with asyncio.timeout(60):
            answers = await asyncio.gather(*asked)
        assert answers == [[1, 2, 3]] * 100
        assert machine.most_awake == 1
        assert sum(engine.stats.num_generated_tokens for engine in engines.values()) == 300


async def test_a_slow_reader_keeps_no_model_in_memory_that_has_said_all():
    """What is said already needs no model: its memory goes to who waits, and the reader still gets everything."""
    machine = Machine()
    async with kept(machine, {"a": 8, "b": 8}) as (_, engines), engines["a"].open(request(0)) as stream:
        async with asyncio.timeout(60):
            assert await ask(engines["b"]) == [1, 2, 3]
        assert machine.awake == ["b"]
        assert [token_id for event in await stream.next_events() for token_id in event.token_ids] == [1, 2, 3]


async def test_a_model_stays_until_the_step_is_over_that_a_client_has_left():
    """Its memory is not free before, however long the step takes; who waits for it would load into taken memory."""
    machine = Machine()
    async with kept(machine, {"a": 8, "b": 8}) as (keeper, engines):
        await keeper.wake("a")
        machine.may_abort.clear()
        async with engines["a"].open(request(0)):
            pass
        asked = asyncio.get_running_loop().create_task(ask(engines["b"]))
        for _ in range(20):
            await asyncio.sleep(0)
        assert machine.awake == ["a"]
        machine.may_abort.set()
        assert await asked == [1, 2, 3]
        assert machine.awake == ["b"]


async def test_totals_do_not_fall_while_a_model_leaves():
    """Whoever looks while its engine is being closed would count everything twice afterwards."""
    machine = Machine()
    async with kept(machine, {"a": 5}) as (keeper, engines):
        await ask(engines["a"])
        machine.may_close.clear()
        sent_away = asyncio.get_running_loop().create_task(keeper.send_away("a"))
        while keeper.engine("a") is not None:
            await asyncio.sleep(0)
        assert engines["a"].stats.num_generated_tokens == 3
        machine.may_close.set()
        await sent_away
        assert engines["a"].stats.num_generated_tokens == 3


@pytest.mark.parametrize("failure", [CheckpointError("the file is damaged"), RuntimeError("no such device")])
async def test_a_failed_load_reaches_everybody_who_waits_and_the_next_request_tries_again(failure):
    """Its reason where we know it, a plain sentence otherwise."""
    machine = Machine()
    machine.fails_with = failure
    async with kept(machine, {"a": 5}) as (keeper, engines):
        answers = await asyncio.gather(*(ask(engines["a"], n) for n in range(3)), return_exceptions=True)
        assert all(isinstance(answer, FastChatError) for answer in answers)
        assert keeper.residency.used_bytes == 0
        machine.fails_with = None
        assert await ask(engines["a"]) == [1, 2, 3]


async def test_a_client_that_leaves_while_its_model_loads_leaves_nothing_behind():
    """The load goes on, the ticket is gone, and the model may leave again."""
    machine = Machine()
    machine.may_load.clear()
    async with kept(machine, {"a": 5}) as (keeper, engines):
        asked = asyncio.get_running_loop().create_task(ask(engines["a"]))
        while engines["a"].stats.num_waiting == 0:
            await asyncio.sleep(0)
        assert not engines["a"].is_computing
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert engines["a"].stats.num_waiting == 0
        machine.may_load.set()
        await keeper.wake("a")
        assert keeper.residency.find("a").can_leave


async def test_an_idle_model_goes_to_sleep_by_itself():
    """After its timeout, without anybody asking."""
    machine = Machine()
    async with kept(machine, {"a": 5}, idle_timeout_s=0.02) as (keeper, engines):
        await ask(engines["a"])
        async with asyncio.timeout(60):
            while keeper.residency.find("a").place is not Place.ASLEEP:
                await asyncio.sleep(0.005)
        assert await ask(engines["a"]) == [1, 2, 3]


async def test_closing_during_a_load_ends_every_wait():
    """Nothing hangs at the end."""
    machine = Machine()
    machine.may_load.clear()
    async with kept(machine, {"a": 5}) as (_, engines):
        asked = asyncio.get_running_loop().create_task(ask(engines["a"]))
        while engines["a"].stats.num_waiting == 0:
            await asyncio.sleep(0)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
    assert machine.awake == []
