"""Final records on their way into the ledger: a ledger that cannot be written holds nobody up."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import asynccontextmanager, closing

import pytest

from fastchat.cluster.contract import FinalRecord, Hello, Load, ModelEntry
from fastchat.cluster.registration import MAX_RECORDS, ControlConnection
from fastchat.cluster.usage import UsageLedger
from fastchat.gateway.controller_app import ControllerConfig, create_controller_app
from fastchat.gateway.record_inbox import RecordInbox
from tests.gateway.canned_worker import CannedWorker
from tests.gateway.conftest import TOKEN

RECORD = {
    "request_id": "r",
    "tenant": "t",
    "model": "m",
    "num_prompt_tokens": 3,
    "num_cached_tokens": 0,
    "num_generated_tokens": 2,
    "reason": "stop",
}


def locked(path):
    """A connection that holds the file: the ledger waits five seconds for it and then gives up."""
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")
    return closing(other)


def test_worker_is_no_silent_one_while_the_ledger_is_locked(thread, tmp_path):
    """Its life signs come behind a record that waits; the record is kept as soon as it can be."""
    path = tmp_path / "usage.sqlite3"
    app = create_controller_app(ControllerConfig(cluster_token=TOKEN, usage_path=path, silent_after_s=3))
    controller = app.state.controller
    states = []

    async def law(worker, url, address):
        load = Load()

        def get_load():
            nonlocal load
            load = Load(progress=load.progress + 1)
            return load

        hello = Hello(worker_id="w1", address=address, models=(ModelEntry(name="m", max_context=8, created=1),))
        connection = ControlConnection(controller_address=url, token=TOKEN, hello=hello, get_load=get_load)
        controller.table.add_listener(lambda _: states.extend(each.state for each in workers()))
        async with asyncio.timeout(60), connection.keep_open():
            while not workers():
                await asyncio.sleep(0.01)
            with locked(path):
                connection.add_record(**RECORD)
                began_at = load.progress
                while workers()[0].load.progress < began_at + 3:
                    connection.report_now()
                    await asyncio.sleep(0.05)
                assert controller.ledger.num_added == 0
            await connection._settled.wait()
        assert "hung" not in states

    def workers():
        return controller.table.snapshot().workers

    worker = CannedWorker()
    with thread.serve(worker.app) as address, thread.serve(app, on_stop=controller.stop) as url:
        thread.run(law(worker, url, address))
        assert controller.ledger.totals()[0].num_requests == 1


@asynccontextmanager
async def inbox_of(ledger):
    """An open inbox, and the numbers that it acknowledged."""
    acknowledged = []

    async def acknowledge(number):
        acknowledged.append(number)

    inbox = RecordInbox(ledger, asyncio.Lock(), "w1", acknowledge)
    async with inbox.keep_open():
        yield inbox, acknowledged


@pytest.mark.parametrize("number", [1, 7])
def test_what_came_before_the_end_is_kept(number):
    """The worker may be gone, and nobody else has its last records."""
    ledger = UsageLedger()

    async def law():
        async with inbox_of(ledger) as (inbox, acknowledged):
            for each in range(number):
                inbox.put(FinalRecord(number=each + 1, **RECORD))
        return acknowledged

    assert asyncio.run(law()) == [number]
    assert ledger.totals()[0].num_requests == number
    ledger.close()


def test_what_waits_for_a_full_disk_is_bounded():
    """As many as the worker holds itself; and the end is not waited for."""
    ledger = UsageLedger()
    ledger._database.execute("PRAGMA query_only=ON")

    async def law():
        async with inbox_of(ledger) as (inbox, acknowledged):
            for each in range(2 * MAX_RECORDS):
                inbox.put(FinalRecord.model_construct(number=each + 1, **RECORD))
            assert repr(inbox) == f"<RecordInbox worker_id=w1 num_records={MAX_RECORDS}>"
        return acknowledged

    assert asyncio.run(law()) == []
    ledger.close()
