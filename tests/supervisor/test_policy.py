"""When a process that died is started again, and when it is given up."""

from __future__ import annotations

import pytest

from fastchat.supervisor.policy import RestartLimits, RestartPolicy


@pytest.fixture
def policy():
    return RestartPolicy(RestartLimits())


def test_delay_doubles_from_half_a_second_to_thirty(policy):
    """A process that becomes ready and dies 20 s later costs less and less."""
    now, delays = 0.0, []
    for _ in range(9):
        ready_at, now = now, now + 20.0
        delays.append(policy.note_death(now, ready_at=ready_at))
        now += delays[-1]
    assert delays == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]


def test_sixty_seconds_of_health_begin_anew(policy):
    """An old misfortune is forgotten, and the next death is again the first."""
    for now in (1.0, 2.0, 4.0, 7.0):
        policy.note_death(now, ready_at=now - 0.5)
    assert policy.note_death(70.0, ready_at=10.0) == 0.5
    assert policy.note_death(71.0, ready_at=70.6) == 1.0


def test_fifth_death_within_sixty_seconds_is_the_last(policy):
    """A process that dies every few seconds is given up, however ready it was in between."""
    times = (3.0, 6.5, 10.5, 15.5, 22.5)
    assert [policy.note_death(now, ready_at=now - 3) for now in times] == [0.5, 1, 2, 4, None]


def test_five_deaths_in_more_than_sixty_seconds_are_not_flapping(policy):
    """The window moves on."""
    assert None not in [policy.note_death(16.0 * number, ready_at=16.0 * number - 5) for number in range(20)]


def test_process_that_never_becomes_ready_is_given_up_however_slow_it_is(policy):
    """A model that takes minutes to load and is killed for its memory each time would else be loaded for ever."""
    assert [policy.note_death(300.0 * number, ready_at=None) for number in range(5)] == [0.5, 1, 2, 4, None]
    policy = RestartPolicy(RestartLimits())
    outcomes = [policy.note_death(300.0 * n, ready_at=300.0 * n - 30 if n == 3 else None) for n in range(8)]
    assert [outcome is None for outcome in outcomes] == [False] * 8
