"""One test for both ways to reach an engine: a thread, and a spawned process."""

import asyncio
import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from dataclasses import replace

import pytest

from fastchat.engine import wire
from fastchat.engine.client import EngineClient
from fastchat.engine.events import FinishReason, SequenceRequest
from fastchat.engine.process_client import ProcessEngineClient
from fastchat.engine.sampling_params import SamplingParams
from fastchat.engine.thread_client import ThreadEngineClient
from fastchat.errors import CheckpointError, ContextLengthError, EngineError, InvalidRequestError
from tests.engine.conftest import answer_ids, make_engine, run_all
from tests.engine.engine_child import MAX_CONTEXT, make_roomy_engine
from tests.engine.tiny_models import VOCAB_SIZE, make_model

ENDLESS = MAX_CONTEXT - 10
"""Tokens of an answer that is still being computed when something happens to it, however late that is."""
CHILD = (sys.executable, "-m", "tests.engine.engine_child")


def raise_checkpoint_error():
    raise CheckpointError("the folder is empty; copy a model into it")


def make_client(kind: str, *, fails: bool = False) -> EngineClient:
    if kind == "process":
        return ProcessEngineClient([*CHILD, "--behaviour", "fails"] if fails else CHILD)
    return ThreadEngineClient(raise_checkpoint_error if fails else lambda: make_roomy_engine(make_model("glm")))


@contextlib.asynccontextmanager
async def running(kind: str):
    client = make_client(kind)
    await client.start()
    try:
        yield client
    finally:
        await client.close()


def request(name: str, **sampling) -> SequenceRequest:
    return SequenceRequest(name, (5, 6, 7), SamplingParams(**({"max_tokens": 20, "temperature": 0.0} | sampling)))


async def collect(client: EngineClient, asked: SequenceRequest) -> list:
    events = []
    async with client.open(asked) as stream:
        while not events or events[-1].finish_reason is None:
            events += await stream.next_events()
    return events


async def read_to_the_end(stream) -> None:
    while True:
        await asyncio.wait_for(stream.next_events(), 60)


async def until_empty(client: EngineClient) -> None:
    while client.stats.num_free_blocks != client.stats.num_blocks or client.stats.num_running:
        await asyncio.sleep(0.01)


KINDS = ("thread", "process")
both = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def runner():
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module", params=KINDS)
def client(runner, request):
    """One of each kind, for all tests that leave it as it was; it lives on the runner's loop."""
    client = make_client(request.param)
    runner.run(client.start())
    yield client
    runner.run(client.close())


def test_events_are_the_engines_own(runner, client):
    """What comes through a client is what the engine gives, field by field."""
    requests = [
        request("plain"),
        request("full", top_logprobs=2, prompt_logprobs=1, logit_bias=((9, 3.0),), stop_token_ids=frozenset({1})),
        request("seeded", temperature=1.0, seed=2**62, top_p=0.9),
        SequenceRequest("embedding", (5, 6, 7), SamplingParams(max_tokens=0), wants_embedding=True),
    ]

    async def main():
        return [await collect(client, asked) for asked in requests]

    received = runner.run(main())
    for asked, events in zip(requests, received, strict=True):
        assert events == run_all(make_engine(make_model("glm")), [asked])[asked.sequence_id]


def test_many_streams_at_once(runner, client):
    """Each stream gets its own events, in order, to the end."""

    async def main():
        num_before = client.stats.num_generated_tokens
        asked = [request(str(index), temperature=1.0, seed=index) for index in range(32)]
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(collect(client, one)) for one in asked]
        together = [answer_ids(task.result()) for task in tasks]
        alone = [answer_ids(await collect(client, one)) for one in asked]
        assert together == alone
        assert client.stats.num_generated_tokens == num_before + 2 * 32 * 20

    runner.run(main())


def test_leaving_the_block_aborts(runner, client):
    """However the block is left, the sequence ends and its blocks are free."""

    async def main():
        num_before = client.stats.num_generated_tokens
        with contextlib.suppress(ZeroDivisionError):
            async with client.open(request("left", max_tokens=ENDLESS)) as stream:
                await stream.next_events()
                raise ZeroDivisionError
        await asyncio.wait_for(until_empty(client), 60)
        assert client.stats.num_generated_tokens < num_before + ENDLESS
        assert len(answer_ids(await collect(client, request("next")))) == 20

    runner.run(main())


def test_abort_from_outside_is_told_to_the_stream(runner, client):
    """Who reads a sequence that somebody else aborts hears of it."""

    async def main():
        async with client.open(request("a", max_tokens=ENDLESS)) as stream:
            events = await stream.next_events()
            client.abort("a")
            while events[-1].finish_reason is None:
                events = await stream.next_events()
            assert events[-1].finish_reason is FinishReason.ABORT

    runner.run(main())


@both
def test_what_loading_raises_start_raises(kind):
    """A folder that cannot be loaded is the same error on this side."""

    async def main():
        client = make_client(kind, fails=True)
        with pytest.raises(CheckpointError, match="copy a model"):
            await client.start()
        await client.close()
        assert not client.is_alive

    asyncio.run(main())


def test_requests_that_cannot_fit_are_refused_before_the_engine_sees_them(runner, client):
    """Ids outside the vocabulary, no ids, too many ids."""

    async def main():
        sampling = SamplingParams(max_tokens=4)
        for ids in ((), (VOCAB_SIZE,), (-1,)):
            with pytest.raises(InvalidRequestError):
                client.submit(SequenceRequest("bad", ids, sampling))
        with pytest.raises(ContextLengthError) as caught:
            client.submit(SequenceRequest("long", (5,) * (MAX_CONTEXT - 3), sampling))
        assert (caught.value.num_prompt_tokens, caught.value.max_context) == (MAX_CONTEXT - 3, MAX_CONTEXT)
        with pytest.raises(InvalidRequestError, match="logit_bias"):
            client.submit(request("bias", logit_bias=((VOCAB_SIZE, 1.0),)))

    runner.run(main())


@both
def test_a_closed_engine_ends_its_streams(kind):
    """Nobody waits for an engine that was closed."""

    async def main():
        async with running(kind) as client:
            stream = client.submit(request("a", max_tokens=ENDLESS))
            await stream.next_events()
            await client.close()
            with pytest.raises(EngineError, match="was closed"):
                await read_to_the_end(stream)
            with pytest.raises(EngineError, match="was closed"):
                client.submit(request("b"))

    asyncio.run(main())


def test_an_answer_that_is_whole_already_is_not_resumed(runner, client):
    """There is nothing left to compute: neither behind an id that ends it nor behind its last allowed token."""

    async def main():
        ends = SamplingParams(max_tokens=9, eos_token_ids=frozenset({7}))
        for sampling, emitted in ((SamplingParams(max_tokens=2), (5, 6)), (ends, (5, 7))):
            with pytest.raises(InvalidRequestError, match="whole answer"):
                client.submit(SequenceRequest("over", (3, 4), sampling, emitted_token_ids=emitted))
        held_off = replace(ends, min_tokens=5)
        assert await collect(client, SequenceRequest("on", (3, 4), held_off, emitted_token_ids=(5, 7)))

    runner.run(main())


class Blocking:
    """Something in an engine's way until it is let go; on another thread of this process."""

    def __init__(self):
        self.has_begun = threading.Event()
        self.may_go_on = threading.Event()
        self.model = None

    def block(self, *_):
        self.has_begun.set()
        assert self.may_go_on.wait(60)

    def load_slowly(self):
        self.block()
        return self.load()

    def load(self):
        model = make_model("glm")
        self.model = weakref.ref(model)
        return make_engine(model)

    def load_and_hang(self):
        model = make_model("glm")
        model.get_input_embeddings().register_forward_pre_hook(self.block)
        return make_engine(model)


def test_closing_does_not_wait_for_a_step_that_hangs():
    """A thread is left behind, a process is killed; the streams end, and both in the time allowed."""

    async def main():
        blocking = Blocking()
        thread = ThreadEngineClient(blocking.load_and_hang, close_timeout_s=0.1)
        process = ProcessEngineClient([*CHILD, "--behaviour", "hangs"], close_timeout_s=0.1)
        for client in (thread, process):
            await client.start()
            stream = client.submit(request("a"))
            await asyncio.wait_for(client.close(), 30)
            with pytest.raises(EngineError, match=r"closed|died"):
                await read_to_the_end(stream)
            assert not client.is_alive
        with pytest.raises(ProcessLookupError):
            os.kill(process.process_id, 0)
        blocking.may_go_on.set()
        await asyncio.to_thread(thread._thread.join, 60)

    asyncio.run(main())


def test_closing_while_a_thread_loads_frees_what_it_loads():
    """Nobody waits for the model, and nothing of it stays when it comes."""

    async def main():
        blocking = Blocking()
        client = ThreadEngineClient(blocking.load_slowly)
        starting = asyncio.create_task(client.start())
        await asyncio.to_thread(blocking.has_begun.wait, 60)
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await asyncio.wait_for(client.close(), 30)
        assert not client.is_alive
        blocking.may_go_on.set()
        await asyncio.to_thread(client._thread.join, 60)
        await asyncio.sleep(0)  # its last crossing
        gc.collect()
        assert blocking.model() is None

    asyncio.run(main())


def test_a_closed_client_holds_no_weights():
    """Whoever keeps the client keeps no model."""

    async def main():
        blocking = Blocking()
        client = ThreadEngineClient(blocking.load)
        await client.start()
        await collect(client, request("a"))
        await client.close()
        gc.collect()
        assert blocking.model() is None
        await client.close()

    asyncio.run(main())


@pytest.mark.parametrize("way", ["closed", "killed"])
def test_an_engine_process_that_is_loading_can_be_ended(way, capfd):
    """`close` kills it at once; a death of its own is an error that says so. No process is left."""

    async def main():
        client = ProcessEngineClient([*CHILD, "--behaviour", "loads for ever"])
        starting = asyncio.create_task(client.start())
        async with asyncio.timeout(60):
            while "loading" not in capfd.readouterr().out:
                await asyncio.sleep(0.02)
        if way == "closed":
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            await asyncio.wait_for(client.close(), 30)
        else:
            os.kill(client.process_id, signal.SIGKILL)
            with pytest.raises(EngineError, match="before it was ready"):
                await asyncio.wait_for(starting, 60)
        with pytest.raises(ProcessLookupError):
            os.kill(client.process_id, 0)

    asyncio.run(main())


def test_a_killed_engine_process_ends_its_streams():
    """The death of the child is seen by its socket, at once."""

    async def main():
        async with running("process") as client:
            stream = client.submit(request("a", max_tokens=ENDLESS))
            await stream.next_events()
            os.kill(client.process_id, signal.SIGKILL)
            with pytest.raises(EngineError, match="died"):
                await read_to_the_end(stream)
            assert not client.is_alive

    asyncio.run(main())


def test_an_engine_process_that_hangs_ends_with_its_worker():
    """Nobody else would end it, and it holds the device's memory."""
    ours, theirs = socket.socketpair()
    with theirs:
        command = [*CHILD, "--behaviour", "hangs", "--engine-fd", str(theirs.fileno())]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdout=subprocess.PIPE, text=True)
    with process:
        try:
            with ours:
                ours.sendall(wire.pack(["add", wire.encode_request(request("a"))]))
                assert process.stdout.readline() == "hanging\n"
            assert process.wait(60) == 1
        finally:
            process.kill()


def test_progress_grows_within_a_step(runner, client):
    """A long step shows signs of life: one per layer."""

    async def main():
        before = client.stats.progress
        await collect(client, request("a"))
        assert client.stats.progress >= before + 2 * 20

    runner.run(main())
