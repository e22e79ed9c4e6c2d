"""Engines of one process share a device step by step."""

import threading
import time
from contextlib import contextmanager
from itertools import pairwise

import pytest

from fastchat.engine.engine_loop import EngineLoop, Stop
from fastchat.engine.events import SequenceRequest
from fastchat.engine.sampling_params import SamplingParams
from fastchat.engine.turns import Turns
from tests.engine.conftest import make_engine
from tests.engine.tiny_models import make_model


def greedy(name: str, num_prompt_tokens: int, max_tokens: int) -> SequenceRequest:
    return SequenceRequest(
        name, tuple(range(3, 3 + num_prompt_tokens)), SamplingParams(max_tokens=max_tokens, temperature=0.0)
    )


class WatchedTurns(Turns):
    """A step begins when the other engine waits for its turn, however late its thread is woken; whose each step was."""

    def __init__(self):
        super().__init__()
        self.order = []

    @contextmanager
    def turn(self):
        with super().turn():
            deadline = time.monotonic() + 60
            while not self._waiting and (self.num_busy == 2 or not self.order) and time.monotonic() < deadline:
                time.sleep(0.001)
            self.order.append(threading.current_thread().name)
            yield


def test_a_long_prompt_holds_up_another_model_for_one_step_at_a_time():
    """While one engine computes a prompt of many steps, every second step is the other's."""
    turns, loops, engines = WatchedTurns(), {}, {}
    for name, request in (("prompt", greedy("prompt", 400, 1)), ("answer", greedy("answer", 3, 40))):
        engines[name] = make_engine(make_model("glm"), max_batch_tokens=16, max_context=500, speculation=False)

        def emit(events, stats, name=name):
            if any(event.finish_reason is not None for event in events):
                loops[name].inbox.put(Stop())

        loops[name] = EngineLoop(engines[name], emit, turns)
        loops[name].inbox.put(request)
    threads = [threading.Thread(target=loop.run, name=name) for name, loop in loops.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    order = turns.order
    assert {name: order.count(name) for name in engines} == {
        name: engine.stats.num_steps for name, engine in engines.items()
    }
    last_together = min(len(order) - 1 - order[::-1].index(name) for name in loops)
    together = order[: last_together + 1]
    assert all(one != other for one, other in pairwise(together))
    assert len(together) > 40
    assert turns.num_busy == 0


def test_others_share_the_tokens_of_a_step(glm):
    """With two engines at work each step computes half as much of a prompt; decoding sequences all run."""
    engine = make_engine(glm, max_batch_tokens=32)
    for index in range(12):
        engine.add(greedy(f"{index}", 1, 8))
    assert len(engine.step()) == 12
    engine.add(greedy("prompt", 40, 1))
    assert len(engine.step(num_sharing=2)) == 12
    assert engine.stats.num_queued_tokens == 12 + 40 - 16
    assert len(engine.step()) == 12
    assert engine.stats.num_queued_tokens == 12 + 40 - 16 - 20


def test_a_step_that_raises_passes_the_turn_on():
    """A model that breaks leaves the others computing."""
    turns = Turns()
    with pytest.raises(ZeroDivisionError), turns.turn():
        raise ZeroDivisionError
    taken = threading.Event()

    def take():
        with turns.turn():
            taken.set()

    with turns.turn():
        thread = threading.Thread(target=take)
        thread.start()
        assert not taken.is_set()
    thread.join(60)
    assert taken.is_set()


def test_an_engine_says_that_it_waits_for_its_turn(glm):
    """While another has the device, and no longer."""
    turns, is_done = Turns(), threading.Event()
    loop = EngineLoop(make_engine(glm), lambda events, _: is_done.set() if events else None, turns)
    thread = threading.Thread(target=loop.run)
    with turns.turn():
        thread.start()
        assert not loop.awaits_turn
        loop.inbox.put(greedy("r1", 5, 1))
        deadline = time.monotonic() + 60
        while not loop.awaits_turn and time.monotonic() < deadline:
            time.sleep(0.001)
        assert loop.awaits_turn
        assert not is_done.is_set()
    assert is_done.wait(60)
    assert not loop.awaits_turn
    loop.inbox.put(Stop())
    thread.join(60)
