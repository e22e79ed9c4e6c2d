"""Controller, workers and watchers as real processes and real connections."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from fastchat.cluster.contract import TableSnapshot
from fastchat.cluster.watcher import TableWatcher
from tests.processes import ServerProcess, free_port, start_command

TOKEN = "the-token-of-this-test-cluster"
AT_ONCE_S = 15.0
"""For what takes no time at all, on a machine that may stall."""
TINY_WORKER = Path(__file__).with_name("tiny_worker.py")


class Cluster:
    """A controller that can be killed and started again on its port, and tiny workers."""

    def __init__(self, stack: ExitStack, state_dir: Path) -> None:
        self._stack = stack
        self._state_dir = state_dir
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def start_controller(self) -> ServerProcess:
        process = start_command(
            "controller",
            "--port",
            str(self.port),
            state_dir=self._state_dir,
            environment={"FASTCHAT_CLUSTER_TOKEN": TOKEN},
        )
        self._stack.enter_context(process)
        return process

    def start_worker(self, *flags: str, token: str = TOKEN) -> ServerProcess:
        command = [sys.executable, TINY_WORKER, "--controller-address", self.url, "--token", token, *flags]
        process = ServerProcess(command)
        self._stack.enter_context(process)
        return process

    def usage(self) -> list[dict]:
        request = urllib.request.Request(f"{self.url}/cluster/usage", headers={"Authorization": f"Bearer {TOKEN}"})
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)["totals"]


@pytest.fixture
def cluster(tmp_path):
    with ExitStack() as stack:
        yield Cluster(stack, tmp_path)


async def until(watcher: TableWatcher, holds: Callable[[TableSnapshot], bool], limit_s: float = 30) -> float:
    """Wait until the table is as wished; returns the seconds that took."""
    began = time.monotonic()
    snapshot = watcher.snapshot
    async with asyncio.timeout(limit_s):
        while not holds(snapshot):
            snapshot = await watcher.wait_for_change(snapshot)
    return time.monotonic() - began


def ids(snapshot: TableSnapshot) -> list[str]:
    return sorted(worker.worker_id for worker in snapshot.workers)


def test_any_start_order_and_a_killed_worker_is_gone_at_once(cluster):
    """Watcher and worker wait quietly for the controller; a killed worker leaves the table at once."""

    async def law() -> None:
        watcher = TableWatcher(controller_address=cluster.url, token=TOKEN)
        async with watcher.keep_open():
            worker = cluster.start_worker()
            worker.wait_for_line("waiting for the controller")
            cluster.start_controller()
            await until(watcher, lambda table: ids(table) == ["w1"])
            (entry,) = watcher.snapshot.workers
            assert (entry.state, entry.models[0].name, entry.is_external) == ("ready", "tiny", False)
            await until(watcher, lambda table: table.workers[0].load.progress > 0)
            worker.kill()
            assert await until(watcher, lambda table: table.workers == ()) < AT_ONCE_S
            assert worker.log.count("waiting for the controller") == 1

    asyncio.run(law())


def test_restarted_controller_has_its_table_back_and_no_record_is_lost_or_doubled(cluster):
    """As soon as it listens; the watcher never shows an empty table; records made meanwhile arrive once."""

    async def law() -> None:
        watcher = TableWatcher(controller_address=cluster.url, token=TOKEN)
        async with watcher.keep_open():
            controller = cluster.start_controller()
            worker = cluster.start_worker()
            second = cluster.start_worker("--worker-id", "w2")
            await until(watcher, lambda table: ids(table) == ["w1", "w2"])
            worker.send_line("records 50")
            controller.kill()
            worker.send_line("records 50")
            second.send_line("records 10")
            first_epoch = watcher.snapshot.epoch
            shown: set[tuple[str, ...]] = set()

            def is_back(table: TableSnapshot) -> bool:
                shown.add(tuple(ids(table)))
                return table.epoch != first_epoch

            restarted = cluster.start_controller()
            await asyncio.to_thread(restarted.wait_for_line, "Uvicorn running on")
            listening_at = time.monotonic()
            for worker_id in ("w1", "w2"):
                await asyncio.to_thread(restarted.wait_for_line, f"worker registered worker_id={worker_id}")
            assert time.monotonic() - listening_at < AT_ONCE_S
            await until(watcher, is_back)
            assert shown == {("w1", "w2")}
            while sum(total["num_requests"] for total in await asyncio.to_thread(cluster.usage)) < 110:
                await asyncio.sleep(0.05)  # a worker that ends waits two seconds for what is not yet acknowledged
            worker.send_line("stop")
            second.send_line("stop")
            await asyncio.gather(asyncio.to_thread(worker.wait), asyncio.to_thread(second.wait))
            (total,) = await asyncio.to_thread(cluster.usage)
            assert (total["num_requests"], total["num_generated_tokens"]) == (110, 220)

    asyncio.run(law())


def test_worker_that_drains_says_so_in_the_table(cluster):
    """Goodbye makes it draining at once; closing in order makes it gone."""

    async def law() -> None:
        cluster.start_controller()
        worker = cluster.start_worker()
        watcher = TableWatcher(controller_address=cluster.url, token=TOKEN)
        async with watcher.keep_open():
            await until(watcher, lambda table: ids(table) == ["w1"])
            worker.send_line("drain")
            assert await until(watcher, lambda table: table.workers[0].state == "draining") < AT_ONCE_S
            worker.send_line("stop")
            await until(watcher, lambda table: table.workers == ())
            assert await asyncio.to_thread(worker.wait) == 0

    asyncio.run(law())


def test_stopped_worker_is_hung_until_it_goes_on(cluster):
    """Its connection is open and says nothing: after 5 s nobody sends it requests, and it comes back by itself."""

    async def law() -> None:
        cluster.start_controller()
        worker = cluster.start_worker()
        watcher = TableWatcher(controller_address=cluster.url, token=TOKEN)
        async with watcher.keep_open():
            await until(watcher, lambda table: ids(table) == ["w1"])
            began = time.monotonic()
            worker.signal(signal.SIGSTOP)
            await until(watcher, lambda table: table.workers[0].state == "hung")
            assert 3 < time.monotonic() - began < 5 + AT_ONCE_S
            worker.signal(signal.SIGCONT)
            assert await until(watcher, lambda table: table.workers[0].state == "ready") < AT_ONCE_S

    asyncio.run(law())


def test_refused_worker_is_told_why(cluster):
    """A wrong token, an id that is taken, an address that is not the worker's: each one line, and no entry."""
    controller = cluster.start_controller()
    cluster.start_worker().wait_for_line("registered with the controller")
    wrong_token = cluster.start_worker("--worker-id", "w2", token="not-the-token-of-this-cluster")
    wrong_token.wait_for_line("does not accept this cluster token; .*FASTCHAT_CLUSTER_TOKEN")
    taken_id = cluster.start_worker()
    taken_id.wait_for_line("w1 is connected from")
    impostor = cluster.start_worker("--worker-id", "w3", "--answers-as", "w1")
    impostor.wait_for_line("tried GET .*/livez and got: the answer of something else.*--worker-address")
    nowhere = cluster.start_worker("--worker-id", "w4", "--worker-address", f"http://127.0.0.1:{free_port()}")
    nowhere.wait_for_line("within 5 s; start the worker with --worker-address")
    assert controller.log.count("worker registered") == 1
    for process in (wrong_token, controller):
        assert TOKEN not in process.log
        assert "not-the-token-of-this-cluster" not in process.log
