"""The supervisor over real small processes that speak its link: restarts, giving up, stopping, leaving nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time

import psutil
import pytest
import structlog

from fastchat.supervisor.child_process import ChildProcess
from fastchat.supervisor.policy import RestartLimits
from fastchat.supervisor.supervisor import Outcome, ProcessSpec, Supervisor
from tests.processes import ROOT, ServerProcess

PRELUDE = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT / "src")!r})
from fastchat.supervisor.parent_link import tell_error, tell_ready, watch_parent
watch_parent()
"""
SERVES = PRELUDE + "tell_ready(); signal.pause()"
FLAPS = PRELUDE + "tell_ready()"
NEVER_READY = PRELUDE + "sys.exit(1)"
HOPELESS = PRELUDE + "tell_error('no such folder; give another'); sys.exit(2)"
STUBBORN = PRELUDE + "signal.signal(signal.SIGTERM, signal.SIG_IGN); tell_ready()\nwhile True: signal.pause()"
LOADS_FOR_EVER = PRELUDE + "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: signal.pause()"
FAST = RestartLimits(first_delay_s=0.01, max_delay_s=0.05)
RANKS = {"api": 0, "controller": 2}
PATIENCE_S = 10.0
"""Less than what an orderly stop gives a process that has been ready: 15 s."""


def spec(name, program, *, on_start=lambda name: None):
    """A process; one whose name starts with `worker` serves a model of that name."""

    def command():
        on_start(name)
        return [sys.executable, "-c", program]

    is_worker = name.startswith("worker")
    return ProcessSpec(name, command, RANKS.get(name, 1), (name,) if is_worker else ())


class Run:
    """One supervisor at work; `ready` is set with the models when all have started."""

    def __init__(self, *specs):
        self.supervisor = Supervisor(specs, on_ready=self._note_ready, limits=FAST)
        self.ready = asyncio.get_running_loop().create_future()

    async def _note_ready(self, names):
        self.ready.set_result(list(names))

    async def __aenter__(self):
        self.others = psutil.Process().children(recursive=True)
        self.task = asyncio.create_task(self.supervisor.run())
        return self

    async def __aexit__(self, *error):
        if not self.task.done():
            self.supervisor.stop()
            self.supervisor.stop()
        await self.task
        assert not [child for child in psutil.Process().children(recursive=True) if child not in self.others]

    async def child(self, *, other_than=None):
        """The pid of a process it started, waited for; the test run may have other children."""
        return await child_of(os.getpid(), but=[*(other.pid for other in self.others), other_than])

    async def outcome(self):
        return await asyncio.wait_for(asyncio.shield(self.task), 60)


def run(scenario):
    """A scenario on its own loop, within a limit."""
    asyncio.run(asyncio.wait_for(scenario, 60))


async def child_of(pid, *, but=()):
    """The pid of a child of this process, waited for."""
    while True:
        pids = [child.pid for child in psutil.Process(pid).children() if child.pid not in but]
        if pids:
            return pids[0]
        await asyncio.sleep(0.01)


def test_killed_process_is_started_again():
    """Another process takes the place, and stopping in order is exit code 0."""

    async def scenario():
        starts = asyncio.Queue()
        async with Run(spec("worker a", SERVES, on_start=starts.put_nowait)) as at_work:
            assert await at_work.ready == ["worker a"]
            await starts.get()
            first = await at_work.child()
            os.kill(first, signal.SIGKILL)
            await starts.get()
            assert await at_work.child(other_than=first) != first
            at_work.supervisor.stop()
            assert await at_work.outcome() == Outcome(0)

    run(scenario())


def test_what_runs_goes_on_although_it_cannot_be_announced():
    """Whatever went wrong in telling it, nobody who is served must lose a model for it."""

    def told():
        return [line for line in lines if "could not be announced" in line["event"]]

    async def scenario():
        async with Run(spec("worker a", SERVES)) as at_work:
            at_work.ready.set_result(None)  # so that telling it again fails
            while not told() and not at_work.task.done():
                await asyncio.sleep(0.01)
            assert psutil.Process(await at_work.child()).is_running()
            at_work.supervisor.stop()
            assert await at_work.outcome() == Outcome(0)

    with structlog.testing.capture_logs() as lines:
        run(scenario())


def test_worker_that_flaps_is_given_up_and_the_rest_goes_on():
    """It is started five times, not more; the others are announced without it."""

    async def scenario():
        starts = []
        flapping = spec("worker bad", NEVER_READY, on_start=starts.append)
        async with Run(spec("controller", SERVES), flapping, spec("worker good", SERVES)) as at_work:
            assert await at_work.ready == ["worker good"]
            assert len(starts) == 5
            assert not at_work.task.done()

    run(scenario())


@pytest.mark.parametrize("names", [["controller", "worker a"], ["worker a", "controller"]])
def test_nothing_left_to_serve_is_exit_code_1(names):
    """The controller or the API server flaps, or the last worker does."""

    async def scenario():
        async with Run(spec(names[0], FLAPS), spec(names[1], SERVES)) as at_work:
            outcome = await at_work.outcome()
            assert outcome.exit_code == 1
            assert outcome.error.startswith(f"{names[0]} keeps ending (exit code 0)")

    run(scenario())


def test_bad_setting_ends_everything_at_once_with_its_own_words():
    """Exit code 2 before a process was ever ready: no second start mends it."""

    async def scenario():
        starts = []
        async with Run(spec("controller", SERVES), spec("worker a", HOPELESS, on_start=starts.append)) as at_work:
            assert await at_work.outcome() == Outcome(2, "no such folder; give another")
            assert len(starts) == 1

    run(scenario())


def test_workers_load_one_at_a_time():
    """In the order they were given; one that is started again loads beside those that serve."""

    async def scenario():
        started = asyncio.Queue()
        specs = [spec(f"worker {letter}", SERVES, on_start=started.put_nowait) for letter in "abc"]
        async with Run(*specs) as at_work:
            assert await at_work.ready == ["worker a", "worker b", "worker c"]
            assert [started.get_nowait() for _ in range(3)] == ["worker a", "worker b", "worker c"]
            os.kill(await at_work.child(), signal.SIGKILL)
            assert await started.get() in {"worker a", "worker b", "worker c"}

    run(scenario())


def test_api_server_ends_before_workers_and_they_before_the_controller():
    """So that what is relayed can finish; each is gone before the next is asked."""

    async def scenario():
        ended = "signal.signal(signal.SIGTERM, lambda *_: (os.write(int(sys.argv[1]), b'{}'), os._exit(0)))\n"
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        os.set_inheritable(writer, True)

        def saying(name, letter):
            program = PRELUDE + ended.format(letter) + "tell_ready()\nwhile True: signal.pause()"
            rank = RANKS.get(name, 1)
            models = (name,) if rank == 1 else ()
            # pass_fds names only the link: the word goes to this process's own descriptor instead
            path = f"/proc/{os.getpid()}/fd/{writer}"
            program = program.replace("int(sys.argv[1])", f"os.open({path!r}, os.O_WRONLY)")
            return ProcessSpec(name, lambda: [sys.executable, "-c", program], rank, models)

        async with Run(saying("controller", "C"), saying("worker a", "W"), saying("api", "A")) as at_work:
            await at_work.ready
            at_work.supervisor.stop()
            assert await at_work.outcome() == Outcome(0)
        assert os.read(reader, 10) == b"AWC"
        os.close(reader)
        os.close(writer)

    if sys.platform != "linux":
        pytest.skip("needs /proc")
    run(scenario())


def test_second_stop_ends_by_force():
    """Exit code 130, at once, whatever the processes do with SIGTERM."""

    async def scenario():
        async with Run(spec("api", STUBBORN), spec("worker a", STUBBORN)) as at_work:
            await at_work.ready
            began = time.monotonic()
            at_work.supervisor.stop()
            await asyncio.sleep(0)
            at_work.supervisor.stop()
            assert await at_work.outcome() == Outcome(130)
            assert time.monotonic() - began < PATIENCE_S

    run(scenario())


def test_stop_while_a_model_loads_does_not_wait_for_it():
    """A process that was never ready has no requests in flight."""

    async def scenario():
        async with Run(spec("worker a", LOADS_FOR_EVER), spec("worker b", SERVES)) as at_work:
            await at_work.child()
            began = time.monotonic()
            at_work.supervisor.stop()
            assert await at_work.outcome() == Outcome(0)
            assert time.monotonic() - began < PATIENCE_S

    run(scenario())


def test_orphan_ends_by_itself_even_when_it_ignores_sigterm():
    """The supervisor is killed with SIGKILL: its children see their link end, siblings notwithstanding."""
    program = f"""
import asyncio, sys
from fastchat.supervisor.child_process import ChildProcess

async def main():
    children = [await ChildProcess.start([sys.executable, "-c", {STUBBORN!r}]) for _ in range(3)]
    for child in children:
        await child.wait_settled()
    print("pids", *(child.pid for child in children), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""
    with ServerProcess([sys.executable, "-c", program]) as process:
        pids = [int(word) for word in process.wait_for_line(r"pids (.*)")[1].split()]
        orphans = [psutil.Process(pid) for pid in pids]
        process.kill()
        deadline = time.monotonic() + 60  # else they would go on for ever
        while any(orphan.is_running() and orphan.status() != psutil.STATUS_ZOMBIE for orphan in orphans):
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_terminal_signals_do_not_reach_the_children():
    """Ctrl-C goes to the whole process group; what it means is the supervisor's to say."""

    async def scenario():
        child = await ChildProcess.start([sys.executable, "-c", SERVES])
        assert await child.wait_settled()
        os.kill(child.pid, signal.SIGINT)
        os.kill(child.pid, signal.SIGHUP)
        child.terminate()
        ended = await child.wait()
        assert str(ended) == "SIGTERM"
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())

    run(scenario())
