"""Which models are in memory: the laws of the policy, over chosen and over random histories."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fastchat.errors import ConflictError, EngineError, ModelNotFoundError, UnavailableError
from fastchat.worker.residency import Load, Place, Residency, Ticket, Unload


class Clock:
    """Seconds that only the test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def residency(clock: Clock, sizes: dict[str, int], budget: int, **options) -> Residency:
    made = Residency(budget, clock, **options)
    for key, size in sizes.items():
        made.add(key, size)
    return made


def load(made: Residency, key: str) -> Ticket:
    """Ask for a model and let it load; its ticket is granted."""
    ticket = made.take(key)
    assert made.next_actions() == [Load(key)]
    made.loaded(key)
    assert ticket.is_granted
    return ticket


def test_a_request_wakes_its_model(clock):
    """The ticket waits, the model loads, the ticket is granted; the next one is granted at once."""
    made = residency(clock, {"a": 5}, 10)
    ticket = made.take("a")
    assert not ticket.is_granted
    assert made.next_actions() == [Load("a")]
    assert made.next_actions() == []
    made.loaded("a")
    assert ticket.is_granted
    assert made.take("a").is_granted


def test_the_least_recently_used_idle_model_leaves(clock):
    """Only as many leave as are in the way."""
    made = residency(clock, {"a": 4, "b": 4, "c": 4}, 10)
    for key in ("a", "b"):
        clock.now += 1
        made.give_back(load(made, key))
    made.give_back(made.take("a"))
    clock.now += 1
    made.give_back(made.take("a"))
    ticket = made.take("c")
    assert made.next_actions() == [Unload("b")]
    assert made.next_actions() == []
    made.unloaded("b")
    assert made.next_actions() == [Load("c")]
    made.loaded("c")
    assert ticket.is_granted
    assert made.find("a").place is Place.AWAKE


def test_a_busy_model_is_closed_only_after_some_patience_and_leaves_when_it_is_done(clock):
    """Nobody who runs is thrown out; newcomers wait, and get their turn afterwards."""
    made = residency(clock, {"a": 8, "b": 8}, 10)
    running = load(made, "a")
    wanting = made.take("b")
    assert made.next_actions() == []
    second = made.take("a")
    assert second.is_granted  # within the patience newcomers are still let in
    clock.now = made.next_look_at()
    assert made.next_actions() == []
    newcomer = made.take("a")
    assert not newcomer.is_granted
    made.give_back(running)
    assert made.next_actions() == []  # the second one still runs
    made.give_back(second)
    assert made.next_actions() == [Unload("a")]
    made.unloaded("a")
    assert made.next_actions() == [Load("b")]
    made.loaded("b")
    assert wanting.is_granted
    made.give_back(wanting)
    assert made.next_actions() == [Unload("b")]
    made.unloaded("b")
    assert made.next_actions() == [Load("a")]
    made.loaded("a")
    assert newcomer.is_granted


def test_a_closed_model_opens_again_when_its_memory_is_no_longer_wanted(clock):
    """The one who waited gave up: whoever waits for the closed model goes on at once."""
    made = residency(clock, {"a": 8, "b": 8}, 10)
    load(made, "a")
    wanting = made.take("b")
    clock.now = 100
    made.next_actions()
    newcomer = made.take("a")
    made.give_back(wanting)
    assert made.next_actions() == []
    assert newcomer.is_granted


def test_a_failed_load_tells_everybody_and_takes_nothing(clock):
    """Memory is back to before, and the next request tries again."""
    made = residency(clock, {"a": 5}, 10)
    tickets = [made.take("a"), made.take("a")]
    made.next_actions()
    failure = EngineError("the file is damaged")
    made.load_failed("a", failure)
    assert [ticket.failure for ticket in tickets] == [failure, failure]
    assert made.used_bytes == 0
    made.take("a")
    assert made.next_actions() == [Load("a")]


def test_what_can_never_fit_is_refused_at_once(clock):
    """Too large alone, or beside what is pinned; unpinning makes it possible."""
    made = residency(clock, {"a": 8, "b": 8, "huge": 11}, 10)
    with pytest.raises(UnavailableError, match="huge needs"):
        made.take("huge")
    waiting = made.take("b")
    made.pin("a")
    assert isinstance(waiting.failure, UnavailableError)
    with pytest.raises(UnavailableError, match="pinned"):
        made.take("b")
    with pytest.raises(UnavailableError):
        made.pin("b")
    made.unpin("a")
    made.take("b")


def test_an_idle_model_leaves_after_its_timeout_and_a_pinned_one_never(clock):
    """Time alone sends it away; `next_look_at` says when."""
    made = residency(clock, {"a": 4, "b": 4}, 10, idle_timeout_s=60)
    for key in ("a", "b"):
        made.give_back(load(made, key))
    made.pin("b")
    assert made.next_actions() == []
    assert made.next_look_at() == 60
    clock.now = 60
    assert made.next_actions() == [Unload("a")]


def test_what_comes_due_while_somebody_looks_is_seen(clock):
    """Between the actions and the question when to look again time goes on."""
    made = residency(clock, {"a": 8, "b": 8}, 10, idle_timeout_s=60)
    made.give_back(load(made, "a"))
    clock.now = 59
    assert made.next_actions() == []
    clock.now = 61
    assert made.next_look_at() == 60
    assert made.next_actions() == [Unload("a")]
    assert made.next_look_at() is None


def test_unloading_waits_for_the_stream_that_runs(clock):
    """An operator's unload ends nobody; who asks meanwhile gets the model back afterwards."""
    made = residency(clock, {"a": 4}, 10)
    running = load(made, "a")
    made.unload("a")
    assert made.next_actions() == []
    newcomer = made.take("a")
    made.give_back(running)
    assert made.next_actions() == [Unload("a")]
    made.unloaded("a")
    assert made.next_actions() == [Load("a")]
    made.loaded("a")
    assert newcomer.is_granted
    made.pin("a")
    with pytest.raises(ConflictError, match="unpin"):
        made.unload("a")


def test_whoever_waited_for_a_load_gets_it_even_if_it_is_to_leave_again(clock):
    """An unload during a load does not load the model twice."""
    made = residency(clock, {"a": 4}, 10)
    waiting = made.take("a")
    assert made.next_actions() == [Load("a")]
    made.unload("a")
    made.loaded("a")
    assert waiting.is_granted
    assert made.next_actions() == []
    made.give_back(waiting)
    assert made.next_actions() == [Unload("a")]


def test_a_model_grows_where_there_is_room_and_shrinks_again(clock):
    """Asleep it is loaded first; awake it grows at once; what it gives back is there for others."""
    made = residency(clock, {"a": 4, "b": 4}, 10)
    growing = made.take("a", more_bytes=2)
    assert made.next_actions() == [Load("a")]
    made.loaded("a")
    assert not growing.is_granted
    assert made.next_actions() == []
    assert growing.is_granted
    assert made.used_bytes == 6
    made.give_back(load(made, "b"))
    made.give_back(growing)
    made.shrink("a", 2)
    assert made.used_bytes == 8


def test_idle_models_leave_for_one_that_grows_and_it_stays_itself(clock):
    """Those who came later do not get the room that is made."""
    made = residency(clock, {"a": 4, "b": 5, "c": 1}, 10)
    for key in ("a", "b"):
        made.give_back(load(made, key))
    growing, later = made.take("a", more_bytes=3), made.take("c")
    assert made.next_actions() == [Unload("b")]
    assert not growing.is_granted
    made.unloaded("b")
    assert made.next_actions() == [Load("c")]
    assert growing.is_granted
    made.loaded("c")
    assert later.is_granted
    assert made.used_bytes == 8


def test_what_can_never_grow_so_far_is_refused(clock):
    """At once, or as soon as another one has taken the room for good."""
    made = residency(clock, {"a": 4, "b": 4}, 10)
    with pytest.raises(UnavailableError, match="a with the adapter needs"):
        made.take("a", more_bytes=7)
    first, second = (made.take("a", more_bytes=4) for _ in range(2))
    made.next_actions()
    made.loaded("a")
    made.next_actions()
    assert first.is_granted
    assert isinstance(second.failure, UnavailableError)


def test_an_unknown_model_is_named(clock):
    """With what there is."""
    with pytest.raises(ModelNotFoundError):
        residency(clock, {"a": 1}, 10).take("b")


class AnyHistory(RuleBasedStateMachine):
    """Requests, operators, time and loads in any order; loads and unloads may be slow and may fail."""

    @initialize(
        sizes=st.lists(st.integers(1, 12), min_size=1, max_size=5),
        idle_timeout_s=st.one_of(st.none(), st.floats(1, 20)),
    )
    def begin(self, sizes, idle_timeout_s):
        self.sizes = sizes
        self.clock = Clock()
        self.keys = [f"model-{number}" for number in range(len(sizes))]
        self.made = residency(self.clock, dict(zip(self.keys, sizes, strict=True)), 12, idle_timeout_s=idle_timeout_s)
        self.tickets: list[Ticket] = []
        self.under_way: list[Load | Unload] = []

    def act(self) -> None:
        """Start what the policy asks for; it ends whenever `finish` is called."""
        for action in self.made.next_actions():
            resident = self.made.find(action.key)
            if isinstance(action, Unload):
                assert resident.num_granted == 0
                assert not resident.is_pinned
            self.under_way.append(action)
        assert self.made.next_actions() == []

    @rule(data=st.data())
    def take(self, data):
        key = data.draw(st.sampled_from(self.keys))
        try:
            self.tickets.append(self.made.take(key))
        except UnavailableError:
            pinned = sum(each.num_bytes for each in self.made if each.is_pinned and each.key != key)
            assert pinned + self.made.find(key).num_bytes > 12
        self.act()

    @rule(data=st.data(), more_bytes=st.integers(1, 6))
    def grow(self, data, more_bytes):
        key = data.draw(st.sampled_from(self.keys))
        try:
            self.tickets.append(self.made.take(key, more_bytes=more_bytes))
        except UnavailableError:
            pinned = sum(each.num_bytes for each in self.made if each.is_pinned and each.key != key)
            assert pinned + self.made.find(key).num_bytes + more_bytes > 12
        self.act()

    @precondition(lambda self: self.tickets)
    @rule(data=st.data(), shrinks=st.booleans())
    def give_back(self, data, shrinks):
        ticket = data.draw(st.sampled_from(self.tickets))
        self.tickets.remove(ticket)
        self.made.give_back(ticket)
        if ticket.is_granted and shrinks:
            self.made.shrink(ticket.key, ticket.more_bytes)
        self.act()

    @precondition(lambda self: self.under_way)
    @rule(data=st.data(), fails=st.booleans())
    def finish(self, data, fails):
        action = data.draw(st.sampled_from(self.under_way))
        self.under_way.remove(action)
        if isinstance(action, Unload):
            self.made.unloaded(action.key)
        elif fails:
            self.made.load_failed(action.key, EngineError("no"))
        else:
            self.made.loaded(action.key)
        self.act()

    @rule(data=st.data(), does=st.sampled_from(["pin", "unpin", "unload"]))
    def operate(self, data, does):
        key = data.draw(st.sampled_from(self.keys))
        try:
            getattr(self.made, does)(key)
        except UnavailableError:
            assert does == "pin"
        except ConflictError:
            assert does == "unload"
            assert self.made.find(key).is_pinned
        self.act()

    @rule(seconds=st.floats(0.1, 10))
    def wait(self, seconds):
        self.clock.now += seconds
        self.act()

    @invariant()
    def memory_stays_within_the_budget(self):
        assert self.made.used_bytes <= 12

    @invariant()
    def a_model_is_never_smaller_than_it_was(self):
        for resident, size in zip(self.made, self.sizes, strict=True):
            assert resident.num_bytes >= size

    @invariant()
    def a_granted_ticket_has_its_model(self):
        for resident in self.made:
            granted = sum(ticket.is_granted for ticket in self.tickets if ticket.key == resident.key)
            assert resident.num_granted == granted
            assert granted == 0 or resident.place is Place.AWAKE

    def teardown(self):
        """Once everybody behaves, everybody is served: no history leaves a ticket waiting for ever."""
        if not hasattr(self, "made"):
            return
        for resident in self.made:
            resident.is_pinned = False
        for _ in range(200):
            for ticket in [ticket for ticket in self.tickets if ticket.is_settled]:
                self.tickets.remove(ticket)
                self.made.give_back(ticket)
            self.act()
            for action in self.under_way:
                (self.made.loaded if isinstance(action, Load) else self.made.unloaded)(action.key)
            self.under_way.clear()
            self.clock.now = self.made.next_look_at() or self.clock.now
            self.act()
        assert not self.tickets


TestAnyHistory = AnyHistory.TestCase
TestAnyHistory.settings = settings(max_examples=150, stateful_step_count=40)
