"""Laws of a round: both sides at once, framed and tagged; one vote; nothing told before it."""

import re

import pytest

from tests.arena.conftest import MESSAGES, text_of

WORDS = "Hello，世界!"
NAMES = ["apple-7b", "berry-9b"]
TELLTALES = ("apple", "berry", "chatcmpl", '"model":"', "fingerprint", "usage", '"id"', "created")


def test_a_named_round_streams_both_models_side_by_side(client):
    """One call, both answers whole, each event tagged with its side."""
    events = client.begin(models=NAMES)
    opening, *rest = events
    assert opening.type == "round"
    assert [side["model"] for side in opening.data["sides"]] == NAMES
    assert {event.type for event in rest} == {"chunk", "done", "end"}
    for label, name in zip("ab", NAMES, strict=True):
        assert text_of(events, label) == WORDS
        assert {e.data["chunk"]["model"] for e in rest if e.type == "chunk" and e.data["side"] == label} == {name}
    assert rest[-1].data == {"type": "end", "can_vote": True, "error": None}


def test_a_blind_stream_tells_nothing_of_its_models(client):
    """No name, id, fingerprint or count stands in any byte before the vote; the vote's answer has the names."""
    events, raw = client.stream("/api/v1/arena/rounds", {"messages": MESSAGES})
    for telltale in TELLTALES:
        assert telltale not in re.sub(r'"(round_id|vote_token)":"[^"]*"|"model":null', "", raw.decode())
    status, vote = client.vote(events, "a")
    assert status == 200
    assert sorted(vote["models"].values()) == NAMES
    assert text_of(events, "a") == text_of(events, "b") == WORDS


def test_blind_pairs_are_drawn_and_shuffled(client):
    """Both orders come up; two different models always."""
    orders = set()
    for _ in range(40):
        _, vote = client.vote(client.begin(), "tie")
        orders.add(tuple(vote["models"].values()))
        if len(orders) == 2:
            break
    assert orders == {("apple-7b", "berry-9b"), ("berry-9b", "apple-7b")}


def test_one_side_failing_does_not_end_the_other(client, workers):
    """The failed side gets an error event, the other its whole answer; the round cannot be voted on until a retry."""
    workers["berry-9b"].acts["berry-9b"] = "die_in_stream"
    events = client.begin(models=NAMES)
    assert text_of(events, "a") == WORDS
    (error,) = [event.data for event in events if event.type == "error"]
    assert (error["side"], error["index"], error["error"]["type"]) == ("b", 1, "server_error")
    assert events[-1].data["can_vote"] is False
    status, document = client.vote(events, "a")
    assert (status, document["error"]["code"]) == (409, "turn_not_complete")
    workers["berry-9b"].acts.clear()
    again, _ = client.stream(
        f"/api/v1/arena/rounds/{events[0].data['round_id']}/turns",
        {"messages": MESSAGES, "retry": True, "vote_token": events[0].data["vote_token"]},
    )
    assert (again[0].data["turn"], again[0].data["attempt"]) == (1, 2)
    assert client.vote(events, "a")[0] == 200


def test_a_blind_error_says_nothing_of_the_model(client, workers):
    """A worker's message may name anything; a blind round replaces it."""
    for worker, name in zip(workers.values(), NAMES, strict=True):
        worker.acts[name] = "bad_value"
    events = client.begin()
    errors = [event.data["error"] for event in events if event.type == "error"]
    assert len(errors) == 2
    assert {error["message"] for error in errors} == {"This side failed; retry the turn."}


@pytest.mark.parametrize("vote", ["a", "b", "tie", "both_bad"])
def test_a_round_is_voted_on_once(client, vote):
    """The first vote counts and the second is a 409, whatever it says."""
    events = client.begin(models=NAMES)
    status, document = client.vote(events, vote)
    assert (status, document["models"]) == (200, {"a": "apple-7b", "b": "berry-9b"})
    status, document = client.vote(events, vote)
    assert (status, document["error"]["code"]) == (409, "already_voted")
    assert client.get("/api/v1/leaderboard")[1]["num_votes"] == 1
