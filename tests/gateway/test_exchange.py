"""One call to one worker while the table changes."""

import asyncio
from contextlib import closing, contextmanager

import orjson
import pytest

from fastchat.cluster.contract import Load, TableSnapshot, WorkerEntry
from fastchat.errors import UnavailableError
from fastchat.gateway.exchange import Exchanges
from fastchat.gateway.worker_http import WorkerHttp
from tests.gateway.canned_worker import CannedWorker
from tests.gateway.loop_thread import LoopThread

DOUBT_S = 0.3


def table(*workers):
    return TableSnapshot(epoch="e", version=1, workers=workers)


@contextmanager
def served_worker(thread):
    worker = CannedWorker()
    with thread.serve(worker.app) as address:
        entry = WorkerEntry(worker_id="w1", address=address, models=(), load=Load(), state="ready")
        yield worker, entry


async def read_after_change(worker, entry, act, changes, num_reads):
    """What `num_reads` reads gave while the table went through `changes`, one between two reads."""
    exchanges = Exchanges(DOUBT_S)
    body = orjson.dumps({"model": "tiny", "act": act})
    async with WorkerHttp() as http:
        with exchanges.open(entry) as exchange:
            await exchange.start(http, "/v1/completions", {}, body)
            await (await worker.wait_for_request()).began.wait()
            for change in changes:
                exchanges.heed(change)
            got = [await exchange.read() for _ in range(num_reads)]
        assert repr(exchanges) == "<Exchanges 0 under way>"
    return b"".join(got)


@pytest.mark.parametrize("state", ["gone", "hung"])
def test_a_wait_for_a_lost_worker_ends(thread, state):
    """A worker that the table lost sight of, and that sends nothing, ends the wait; the connection is closed."""
    with served_worker(thread) as (worker, entry):
        lost = table() if state == "gone" else table(entry.model_copy(update={"state": "hung"}))
        with pytest.raises(UnavailableError, match="lost"):
            thread.run(read_after_change(worker, entry, "hang_in_stream", [lost], 3))
        thread.run(worker.received[0].left.wait())


class MovedLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock the test moves: a patience of a minute needs none, and a stall is little beside it."""

    ahead_s = 0.0

    def time(self):
        return super().time() + self.ahead_s

    async def until_done(self, coroutine):
        """Its result; meanwhile a second passes in each turn."""
        task = self.create_task(coroutine)
        while not task.done():
            self.ahead_s += 1
            await asyncio.sleep(0.01)
        return task.result()


def test_a_lost_worker_that_still_sends_is_read_on():
    """Only silence ends an exchange: the worker may have lost nothing but its controller."""
    loop = MovedLoop()

    async def read(worker, entry):
        exchanges = Exchanges(60)
        async with WorkerHttp() as http:
            with exchanges.open(entry) as exchange:
                await exchange.start(
                    http, "/v1/completions", {}, orjson.dumps({"model": "tiny", "act": "steady_stream"})
                )
                exchanges.heed(table())
                return b"".join([await loop.until_done(exchange.read()) for _ in range(7)])

    with closing(LoopThread(loop)) as thread, served_worker(thread) as (worker, entry):
        worker.pause_s = 20
        assert thread.run(read(worker, entry)).count(b"data: ") >= 6
    assert loop.ahead_s > 2 * 60, "the silences together are longer than the patience"


def test_a_worker_that_is_back_is_waited_for(thread):
    """After a restart of the controller nothing that is under way is disturbed."""

    async def run(worker, entry):
        read = asyncio.ensure_future(read_after_change(worker, entry, "hang_in_stream", [table(), table(entry)], 3))
        done, _ = await asyncio.wait({read}, timeout=3 * DOUBT_S)
        read.cancel()
        await asyncio.wait({read})
        return done

    with served_worker(thread) as (worker, entry):
        assert not thread.run(run(worker, entry))
