"""Laws of who may vote, what is kept and shown, and what a broken file may break: the arena alone."""

import sqlite3
from contextlib import closing

import orjson
import pytest

from tests.arena.conftest import MESSAGES, events_of, serving, text_of
from tests.processes import run_command

NAMES = ["apple-7b", "berry-9b"]
ROUNDS = "/api/v1/arena/rounds"
TURN = {"messages": MESSAGES, "retry": True}


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
def keyed(cluster, workers, tmp_path):
    """A client with the first of two keys, of an arena that needs one."""
    with serving(cluster, tmp_path / "arena.sqlite", api_keys=("key-one", "key-two")) as client:
        client.headers = bearer("key-one")
        cluster.wait_for_models(client.url, *NAMES, headers=client.headers)
        yield client


@pytest.mark.parametrize("path", [ROUNDS, f"{ROUNDS}/round-x/turns", f"{ROUNDS}/round-x/vote", "/api/v1/feedback"])
def test_no_route_is_reached_without_a_key(keyed, path):
    """Nor are the ones that only read."""
    keyed.headers = None
    assert keyed.post(path, {})[0] == 401
    for read in ("/api/v1/leaderboard", "/api/v1/arena/votes.jsonl"):
        assert keyed.get(read)[0] == 401


def test_another_key_neither_sees_nor_votes_on_a_round(keyed):
    """For it there is no such round, even with the token; its export is its own, the leaderboard is everyone's."""
    events = keyed.begin(models=NAMES)
    keyed.headers = bearer("key-two")
    assert keyed.vote(events, "a")[0] == 404
    turn = {**TURN, "vote_token": events[0].data["vote_token"]}
    assert keyed.post(f"{ROUNDS}/{events[0].data['round_id']}/turns", turn)[0] == 404
    keyed.headers = bearer("key-one")
    assert keyed.vote(events, "a")[0] == 200
    assert keyed.cluster.get(keyed.url, "/api/v1/arena/votes.jsonl", headers=bearer("key-two"))[2] == b""
    (line,) = keyed.cluster.get(keyed.url, "/api/v1/arena/votes.jsonl", headers=bearer("key-one"))[2].splitlines()
    assert orjson.loads(line)["models"] == {"a": "apple-7b", "b": "berry-9b"}
    keyed.headers = bearer("key-two")
    assert keyed.get("/api/v1/leaderboard")[1]["num_votes"] == 1


def test_a_vote_needs_the_token_of_its_round(client):
    """Round ids and tokens cannot be guessed, and one round's token opens no other."""
    first, second = client.begin(), client.begin()
    ids = [events[0].data["round_id"] for events in (first, second)]
    tokens = [events[0].data["vote_token"] for events in (first, second)]
    assert len({*ids, *tokens}) == 4
    assert all(len(each) >= 24 for each in (*ids, *tokens))
    status, document = client.post(f"{ROUNDS}/{ids[0]}/vote", {"vote": "a", "vote_token": tokens[1]})
    assert (status, document["error"]["code"]) == (403, "permission_denied")
    assert client.post(f"{ROUNDS}/{ids[0]}/turns", {**TURN, "vote_token": tokens[1]})[0] == 403
    assert client.post(f"{ROUNDS}/round-none/vote", {"vote": "a", "vote_token": tokens[0]})[0] == 404


def test_a_blind_round_stays_blind_and_keeps_its_models(client):
    """Further turns go to the same sides; each side hears its own conversation; no name is told."""
    opening, token = (events := client.begin())[0].data, events[0].data["vote_token"]
    own = {label: [*MESSAGES, {"role": "user", "content": f"You are {label}."}] for label in "ab"}
    body = {"vote_token": token, "side_messages": own, "temperature": 0.5}
    turn, raw = client.stream(f"{ROUNDS}/{opening['round_id']}/turns", body)
    assert (turn[0].data["turn"], turn[0].data["blind"]) == (2, True)
    assert not any(name.encode() in raw for name in NAMES)
    assert "vote_token" not in turn[0].data
    _, vote = client.vote(events, "b")
    status, document = client.post(f"{ROUNDS}/{opening['round_id']}/turns", body)
    assert (status, document["error"]["code"]) == (409, "already_voted")
    assert sorted(vote["models"].values()) == NAMES


def test_each_side_hears_its_own_conversation(client, workers):
    """What `side_messages` says goes to that side's worker, with the shared parameters."""
    own = {label: [{"role": "user", "content": f"You are {label}."}] for label in "ab"}
    client.stream(ROUNDS, {"models": NAMES, "side_messages": own, "seed": 7})
    for label, name in zip("ab", NAMES, strict=True):
        sent = orjson.loads(workers[name].received[-1].body)
        assert (sent["messages"], sent["seed"], sent["stream"]) == (own[label], 7, True)
        assert not {"models", "blind", "side_messages", "vote_token"} & set(sent)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"models": ["apple-7b"]}, "models"),
        ({"models": ["apple-7b", "apple-7b"]}, "models"),
        ({"models": list("abcde")}, "models"),
        ({"models": NAMES, "n": 2}, "n"),
        ({"models": NAMES, "stream": False}, "stream"),
        ({"models": NAMES, "model": "apple-7b"}, "model"),
        ({"models": NAMES, "temperature": 3}, "temperature"),
        ({"models": NAMES, "messages": []}, "messages"),
        ({"models": NAMES, "messages": None}, "messages"),
        ({"models": NAMES, "side_messages": {"a": MESSAGES, "b": MESSAGES}}, "messages"),
        ({"models": NAMES, "messages": None, "side_messages": {"a": MESSAGES}}, "side_messages"),
        ({"models": NAMES, "vote_token": "x"}, "vote_token"),
        ({"blind": False}, "models"),
        ({"blind": "yes"}, "blind"),
        ({"logprobs": True}, "logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
    ],
)
def test_a_wrong_field_is_one_plain_400(client, workers, change, param):
    """It names the field, and no worker is asked."""
    status, document = client.post(ROUNDS, {"messages": MESSAGES, **change})
    assert (status, document["error"]["param"].partition("[")[0]) == (400, param)
    assert not any(worker.received for worker in workers.values())


def test_an_unknown_model_is_a_404_and_an_unknown_name_is_reported(client):
    """As on the chat route."""
    status, document = client.post(ROUNDS, {"messages": MESSAGES, "models": ["apple-7b", "cherry"]})
    assert (status, document["error"]["code"]) == (404, "model_not_found")
    _, headers, raw = client.cluster.post(client.url, ROUNDS, {"messages": MESSAGES, "models": NAMES, "frobnicate": 1})
    assert headers["x-fastchat-ignored"] == "frobnicate"
    assert text_of(events_of(raw), "a")


def test_an_answer_is_judged_once(client):
    """The same again changes nothing and is no error; another judgement is a 409."""
    feedback = {"id": "chatcmpl-1", "model": "apple-7b", "vote": "up"}
    assert client.post("/api/v1/feedback", feedback)[1]["is_new"] is True
    assert client.post("/api/v1/feedback", feedback) == (200, {"object": "feedback", **feedback, "is_new": False})
    status, document = client.post("/api/v1/feedback", {**feedback, "vote": "flag"})
    assert (status, document["error"]["code"]) == (409, "already_voted")
    assert client.post("/api/v1/feedback", {**feedback, "model": "cherry"})[0] == 404
    assert client.post("/api/v1/feedback", {**feedback, "vote": "sideways"})[0] == 400
    assert client.post("/api/v1/feedback", {**feedback, "id": "a b"})[0] == 400
    assert client.post("/api/v1/feedback", {**feedback, "comment": "!" * 20_000})[0] == 413
    (line,) = client.cluster.get(client.url, "/api/v1/arena/votes.jsonl")[2].splitlines()
    assert {"type": "feedback", **feedback}.items() <= orjson.loads(line).items()


def test_a_stopped_turn_takes_no_vote_and_frees_its_workers(client, workers):
    """Both connections close when the reader leaves."""
    for worker, name in zip(workers.values(), NAMES, strict=True):
        worker.acts[name] = "hang_in_stream"
    session = client.cluster.session

    async def leave_in_the_middle():
        async with session.post(client.url + ROUNDS, json={"messages": MESSAGES, "models": NAMES}) as response:
            opening = orjson.loads((await response.content.readuntil(b"\n\n")).partition(b"data: ")[2])
            for worker in workers.values():
                await (await worker.wait_for_request()).began.wait()
            response.close()
        for worker in workers.values():
            await worker.received[-1].left.wait()
        return opening

    opening = client.cluster.thread.run(leave_in_the_middle())
    vote = {"vote": "a", "vote_token": opening["vote_token"]}
    status, document = client.post(f"{ROUNDS}/{opening['round_id']}/vote", vote)
    assert (status, document["error"]["code"]) == (409, "turn_not_complete")


@pytest.fixture(params=["damaged", "folder"])
def unusable(request, tmp_path):
    """A place where no database can be opened."""
    path = tmp_path / "arena.sqlite"
    if request.param == "damaged":
        path.write_bytes(b"this is no database" * 100)
    else:
        path.mkdir()
    return path


def test_an_unusable_file_breaks_the_arena_alone(cluster, workers, unusable):
    """The server starts and chats; every arena route is a 503 in OpenAI's shape that tells no path."""
    with serving(cluster, unusable) as client:
        cluster.wait_for_models(client.url, *NAMES)
        chat = {"model": "apple-7b", "messages": MESSAGES}
        assert client.post("/v1/chat/completions", chat)[0] == 200
        feedback = {"id": "x", "model": "apple-7b", "vote": "up"}
        answers = [
            client.post(ROUNDS, {"messages": MESSAGES}),
            client.post(f"{ROUNDS}/round-x/vote", {"vote": "a", "vote_token": "t"}),
            client.post("/api/v1/feedback", feedback),
            client.get("/api/v1/leaderboard"),
            client.get("/api/v1/arena/votes.jsonl"),
        ]
        for status, document in answers:
            assert (status, document["error"]["code"]) == (503, "arena_unavailable")
            assert str(unusable.parent) not in document["error"]["message"]


def test_a_locked_file_is_a_503_until_it_is_free(client, tmp_path):
    """Reading goes on meanwhile, and so does chat."""
    locker = sqlite3.connect(tmp_path / "arena.sqlite", isolation_level=None)
    locker.execute("BEGIN IMMEDIATE")
    status, document = client.post(ROUNDS, {"messages": MESSAGES})
    assert (status, document["error"]["code"]) == (503, "arena_unavailable")
    assert client.get("/api/v1/leaderboard")[0] == 200
    assert client.post("/v1/chat/completions", {"model": "apple-7b", "messages": MESSAGES})[0] == 200
    locker.execute("ROLLBACK")
    locker.close()
    assert client.vote(client.begin(), "tie")[0] == 200


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_was_taken_away_takes_no_vote(client, tmp_path, replaced):
    """Nobody is thanked for a vote that no file has; moved back, it is used again."""
    path = tmp_path / "arena.sqlite"
    events = client.begin()
    path.rename(tmp_path / "elsewhere")
    if replaced:
        path.touch()
    for status, document in (client.vote(events, "a"), client.get("/api/v1/leaderboard")):
        assert (status, document["error"]["code"]) == (503, "arena_unavailable")
    (tmp_path / "elsewhere").rename(path)
    assert client.vote(events, "a")[0] == 200


def test_another_program_s_file_is_read_as_no_votes_and_left_as_it_is(tmp_path):
    """`fastchat votes` makes no tables in it."""
    path = tmp_path / "other.sqlite"
    with closing(sqlite3.connect(path)) as other, other:
        other.execute("CREATE TABLE things (name)")
    before = path.read_bytes()
    ended = run_command("votes_command", "--file", path, state_dir=tmp_path)
    assert (ended.returncode, ended.stdout) == (69, "")
    assert ended.stderr.splitlines()[-1] == f"error: {path} cannot be read as votes; the line above has the cause."
    assert path.read_bytes() == before


def test_votes_outlive_the_server_and_the_file_is_private(cluster, workers, tmp_path):
    """A restarted server has the votes, and takes the vote of a round that was answered before."""
    path = tmp_path / "arena.sqlite"
    with serving(cluster, path) as client:
        cluster.wait_for_models(client.url, *NAMES)
        events, later = client.begin(models=NAMES), client.begin(models=NAMES)
        assert client.vote(events, "a")[0] == 200
    assert path.stat().st_mode & 0o777 == 0o600
    with serving(cluster, path) as client:
        assert client.vote(events, "a")[0] == 409
        assert client.vote(later, "b")[0] == 200
        assert client.get("/api/v1/leaderboard")[1]["num_votes"] == 2


def test_the_document_of_the_api_shows_the_arena(client):
    """Every route with its body, its query and its kind of answer."""
    document = client.get("/openapi.json")[1]
    paths, schemas = document["paths"], document["components"]["schemas"]
    body = paths[f"{ROUNDS}/{{round_id}}/vote"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["$ref"].rpartition("/")[2] in schemas
    assert "text/event-stream" in paths[ROUNDS]["post"]["responses"]["200"]["content"]
    query = [each["name"] for each in paths["/api/v1/leaderboard"]["get"]["parameters"]]
    assert query == ["since", "until", "language", "anonymous"]
    assert "application/x-ndjson" in paths["/api/v1/arena/votes.jsonl"]["get"]["responses"]["200"]["content"]
