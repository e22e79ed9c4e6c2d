"""Keeps a set of processes running: starts them, starts again what dies, gives up what flaps, stops all in order.

It waits for events alone (a process ends, a link speaks, a signal comes), listens on nothing, and knows neither models
nor HTTP. `serve/launch.py` says which processes there are.

    place of a process:   waiting for its turn -> starting -> ready -> ended -> waiting (back-off) -> starting ...
                                                                          \\-> given up
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

import structlog

from fastchat.supervisor.child_process import ChildProcess, Ended
from fastchat.supervisor.policy import RestartLimits, RestartPolicy

EXIT_FAILURE = 1
EXIT_FORCED = 130
HOPELESS_EXIT_CODES = frozenset({2, 69, 78})
"""A setting, checkpoint or port that cannot be used; before a process was ever ready, no new start mends it."""
STOP_MARGIN_S = 5.0
"""How much longer than its requests in flight a process may take to end."""
UNREADY_STOP_LIMIT_S = 2.0
"""A process that still loads serves nobody and may not listen to signals."""

_log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """One process to keep running.

    `command` is asked for at every start. Those of a lower `stop_rank` are stopped first. A process with `model_names`
    is a worker: workers load one at a time, since two would wait for one disk, and one that flaps does not end the
    others. `environment` is for what must not be seen on a command line.
    """

    name: str
    command: Callable[[], Sequence[str]]
    stop_rank: int
    model_names: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    is_essential: bool = True
    """Whether the others are of no use without it."""

    @property
    def is_worker(self) -> bool:
        """Whether it serves models."""
        return bool(self.model_names)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How supervision ended: the exit code, and the last line where something is to be said."""

    exit_code: int
    error: str | None = None


class _Place:
    """Where one process lives, through all its starts."""

    def __init__(self, spec: ProcessSpec, limits: RestartLimits, stop_limit_s: float) -> None:
        self.spec = spec
        self._stop_limit_s = stop_limit_s
        self.policy = RestartPolicy(limits)
        self.child: ChildProcess | None = None
        self.was_ready = False
        self.is_given_up = False
        self.settled = asyncio.Event()
        """Set when it was ready for the first time, or was given up."""

    def __repr__(self) -> str:
        return f"<_Place {self.spec.name} {self.child} is_given_up={self.is_given_up}>"

    @property
    def has_yet_to_load(self) -> bool:
        return self.spec.is_worker and not self.is_given_up and not (self.child is not None and self.child.is_serving)

    async def stop(self) -> None:
        if self.child is None:
            return
        limit_s = self._stop_limit_s if self.child.is_ready else UNREADY_STOP_LIMIT_S
        if not await self.child.stop(limit_s):
            _log.warning("process was forced to end", process=self.spec.name, after_s=limit_s)


class Supervisor:
    """Runs the processes of `specs`. `on_ready` is awaited once, with the models to expect, when all have started.

    `environment` is that of all processes (this one's where not given); each gives its requests in flight `drain_s`
    seconds when it is stopped.
    """

    def __init__(
        self,
        specs: Sequence[ProcessSpec],
        *,
        on_ready: Callable[[Sequence[str]], Awaitable[None]],
        limits: RestartLimits | None = None,
        environment: Mapping[str, str] | None = None,
        drain_s: float = 10.0,
    ) -> None:
        stop_limit_s = drain_s + STOP_MARGIN_S
        self._places = [_Place(spec, limits or RestartLimits(), stop_limit_s) for spec in specs]
        self._environment = os.environ if environment is None else environment
        self._on_ready = on_ready
        self._start_turn = asyncio.Lock()
        self._loading_turn = asyncio.Lock()
        self._ending = asyncio.Event()
        self._outcome = Outcome(0)

    def __repr__(self) -> str:
        return f"<Supervisor is_ending={self._ending.is_set()} {self._places}>"

    async def run(self) -> Outcome:
        """Keep everything running until `stop`, or until nothing is left that could serve. Leaves no process behind."""
        try:
            async with asyncio.TaskGroup() as group:
                announcing = group.create_task(self._announce())
                for place in self._places:
                    group.create_task(self._keep(place))
                await self._ending.wait()
                announcing.cancel()
                await self._stop_all()
        finally:
            self._kill_all()
        return self._outcome

    def stop(self) -> None:
        """Stop everything in order; called again, by force."""
        if not self._ending.is_set():
            _log.info("stopping; once more stops at once")
            self._end(Outcome(0))
        else:
            self._outcome = Outcome(EXIT_FORCED)
            self._kill_all()

    def replace(self, name: str, *, reason: str, is_stuck: bool) -> None:
        """End the process `name`, which is of no more use, so that it is started again; one that is stuck by force."""
        for place in self._places:
            if place.spec.name == name and place.child is not None and not self._ending.is_set():
                _log.error("process is of no use and is replaced", process=name, reason=reason)
                (place.child.kill if is_stuck else place.child.terminate)()

    async def _keep(self, place: _Place) -> None:
        """Start, wait for the end, decide, wait, and again."""
        while not self._ending.is_set():
            ended = await self._run_once(place)
            if ended is None or self._ending.is_set():
                return
            delay_s = self._judge(place, ended)
            if delay_s is None:
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), delay_s)

    async def _run_once(self, place: _Place) -> Ended | None:
        """From start to end; None where all is ending before it was started."""
        async with contextlib.AsyncExitStack() as turns:
            if place.spec.is_worker:
                await turns.enter_async_context(self._loading_turn)
            if self._ending.is_set():
                return None
            child = place.child = await self._start(place.spec)
            if self._ending.is_set():
                child.kill()
            if await child.wait_settled():
                self._note_ready(place)
        return await child.wait()

    async def _start(self, spec: ProcessSpec) -> ChildProcess:
        num_after = sum(place.has_yet_to_load and place.spec is not spec for place in self._places)
        async with self._start_turn:
            child = await ChildProcess.start(spec.command(), {**self._environment, **spec.environment})
        _log.info("process started", process=spec.name, pid=child.pid)
        if spec.is_worker:
            _log.info("waiting for the model", model=",".join(spec.model_names), models_after_it=num_after)
        return child

    def _note_ready(self, place: _Place) -> None:
        if place.was_ready:
            _log.info("process is back", process=place.spec.name)
        place.was_ready = True
        place.settled.set()

    def _judge(self, place: _Place, ended: Ended) -> float | None:
        """The seconds until the next start, None for never; what never means for the others is decided here too."""
        if ended.exit_code in HOPELESS_EXIT_CODES and not place.was_ready:
            self._end(Outcome(ended.exit_code, ended.error or f"{place.spec.name} could not start; its lines say why."))
            return None
        delay_s = place.policy.note_death(asyncio.get_running_loop().time(), ready_at=ended.ready_at)
        facts = {"process": place.spec.name, "how": str(ended), **({"error": ended.error} if ended.error else {})}
        if delay_s is None:
            self._give_up(place, facts)
        else:
            _log.warning("process ended and is started again", restart_in_s=delay_s, **facts)
        return delay_s

    def _give_up(self, place: _Place, facts: dict[str, str]) -> None:
        place.is_given_up = True
        place.settled.set()
        if not place.spec.is_essential:
            _log.error(f"GIVEN UP: the {place.spec.name} keeps ending; everything else goes on", **facts)
            return
        has_workers = any(other.spec.is_worker and not other.is_given_up for other in self._places)
        if place.spec.is_worker and has_workers:
            names = ",".join(place.spec.model_names)
            _log.error(f"GIVEN UP: {names} is not served any more, its process keeps ending", **facts)
            return
        cause = facts.get("error", "its lines above say why")
        self._end(Outcome(EXIT_FAILURE, f"{place.spec.name} keeps ending ({facts['how']}): {cause}"))

    async def _announce(self) -> None:
        for place in self._places:
            await place.settled.wait()
        names = [name for place in self._places if not place.is_given_up for name in place.spec.model_names]
        try:
            await self._on_ready(names)
        except Exception:  # noqa: BLE001 - no reason to end what serves
            _log.exception("everything runs, but that could not be announced")

    def _end(self, outcome: Outcome) -> None:
        if not self._ending.is_set():
            self._outcome = outcome
            self._ending.set()

    async def _stop_all(self) -> None:
        """Rank after rank; those of one rank together."""
        for rank in sorted({place.spec.stop_rank for place in self._places}):
            async with asyncio.TaskGroup() as group:
                for place in self._places:
                    if place.spec.stop_rank == rank:
                        group.create_task(place.stop())

    def _kill_all(self) -> None:
        for place in self._places:
            if place.child is not None:
                place.child.kill()
