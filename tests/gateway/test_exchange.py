"""One call to one worker while the table changes."""

import asyncio
from contextlib import contextmanager

import orjson
import pytest

from fastchat.cluster.contract import Load, TableSnapshot, WorkerEntry
from fastchat.errors import UnavailableError
from fastchat.gateway.exchange import Exchanges
from fastchat.gateway.worker_http import WorkerHttp
from tests.gateway.canned_worker import CannedWorker

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


def test_a_lost_worker_that_still_sends_is_read_on(thread):
    """Only silence ends an exchange: the worker may have lost nothing but its controller."""
    with served_worker(thread) as (worker, entry):
        worker.pause_s = DOUBT_S / 3
        got = thread.run(read_after_change(worker, entry, "steady_stream", [table()], 7))
        assert got.count(b"data: ") >= 6


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
