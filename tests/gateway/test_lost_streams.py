"""A real API server and controller around canned workers: what becomes of a stream whose worker is lost or stops."""

import orjson
import pytest

from fastchat.gateway.resumption import resume_body
from tests.gateway.canned_worker import WORDS, CannedWorker
from tests.gateway.conftest import TOKEN
from tests.gateway.questions import CHAT, QUESTION, data_of, error_of


def ask_the_bad_one_first(cluster, api, bad, good):
    """Status and body of a stream that the bad worker was asked for; whichever is chosen first is not known."""
    bad.received.clear()
    while not bad.received:
        good.received.clear()
        status, _, body = cluster.post(api, CHAT, QUESTION | {"stream": True})
    return status, body


@pytest.mark.parametrize("good_act", ["answer", "bad_value", "die"])
@pytest.mark.parametrize(
    ("bad_act", "code"), [("die_in_stream", "worker_lost"), ("shut_down_in_stream", "shutting_down")]
)
def test_a_lost_stream_goes_on_with_another_worker(cluster, api, bad_act, code, good_act):
    """Lost, or ended early by a worker that shuts down. The other one gets the body and what the client has, with the
    same id, time and seed; where it fails too, an error stands at the end of the stream."""
    with cluster.worker("bad", tiny=bad_act) as bad:
        cluster.wait_for_models(api, "tiny")
        with cluster.worker("good", ("tiny", "other"), tiny=good_act) as good:
            cluster.wait_for_models(api, "other", "tiny")
            status, body = ask_the_bad_one_first(cluster, api, bad, good)
        (lost,), (resumed,) = bad.received, good.received
        document = orjson.loads(resumed.body)
        assert document.pop("resume") == {"prompt_token_ids": [[1, 2, 3]], "emitted_token_ids": [[100, 101]]}
        assert document == orjson.loads(lost.body)
        assert resumed.headers["x-fastchat-resume"] == "1"
        # A worker that shuts down tells what its part cost, a lost one does not.
        assert resumed.headers.get("x-fastchat-counted") == ("2" if code == "shutting_down" else None)
        for name in ("x-fastchat-request-id", "x-fastchat-created", "x-fastchat-seed", "x-fastchat-tags"):
            assert resumed.headers[name] == lost.headers[name]
        assert status == 200
        assert b": 0" not in body
        assert body.count(WORDS[0].encode()) == (2 if good_act == "answer" else 1)
        last = data_of(body)[-1]
        if good_act == "answer":
            assert last == b"[DONE]"
        else:
            assert error_of(last)["code"] == ("worker_lost" if good_act == "die" else code)
    cluster.wait_for_models(api)


@pytest.mark.parametrize("bad_act", ["die_waiting", "shut_down_waiting"])
def test_a_stream_that_had_only_comments_is_answered_by_another_worker(cluster, api, bad_act):
    """They are sent while a model is loaded or a long prompt is computed."""
    with cluster.worker("bad", tiny=bad_act) as bad:
        cluster.wait_for_models(api, "tiny")
        with cluster.worker("good", ("tiny", "other")) as good:
            cluster.wait_for_models(api, "other", "tiny")
            _, body = ask_the_bad_one_first(cluster, api, bad, good)
        (resumed,) = good.received
        resume = orjson.loads(resumed.body)["resume"]
        assert resume == {"prompt_token_ids": [None], "emitted_token_ids": [[]]}
        assert [body.count(word.encode()) for word in WORDS[:2]] == [1, 1]
        assert data_of(body)[-1] == b"[DONE]"
    cluster.wait_for_models(api)


@pytest.mark.parametrize("bad_act", ["die_behind_usage", "shut_down_behind_usage"])
def test_a_stream_that_lacks_only_its_end_gets_it_and_no_second_usage(cluster, api, bad_act):
    """Its worker told the usage and died, or ended it there: nobody else is asked."""
    with cluster.worker("bad", tiny=bad_act) as bad:
        cluster.wait_for_models(api, "tiny")
        with cluster.worker("good", ("tiny", "other")) as good:
            cluster.wait_for_models(api, "other", "tiny")
            status, body = ask_the_bad_one_first(cluster, api, bad, good)
        assert status == 200
        assert not good.received
        assert body.count(b'"usage"') == 1
        assert data_of(body)[-1] == b"[DONE]"
    cluster.wait_for_models(api)


@pytest.mark.parametrize("bad_act", ["die_behind_done", "shut_down_behind_done"])
def test_a_stream_that_was_told_to_its_end_is_whole_however_its_connection_ends(cluster, api, bad_act):
    """Its worker died or shut down behind `[DONE]`: nobody tells the end again, and it is no error."""
    with cluster.worker("bad", tiny=bad_act) as bad:
        cluster.wait_for_models(api, "tiny")
        with cluster.worker("good", ("tiny", "other")) as good:
            cluster.wait_for_models(api, "other", "tiny")
            _, body = ask_the_bad_one_first(cluster, api, bad, good)
        assert not good.received
        assert body.endswith(b"data: [DONE]\n\n")
        assert body.count(b"[DONE]") == 1
    cluster.wait_for_models(api)


def test_a_lost_stream_does_not_begin_again_on_a_server_of_another_kind(cluster, api):
    """Which would answer the whole request, behind what the client has already."""
    other = CannedWorker("other", ("tiny", "other"))
    with cluster.worker("bad", tiny="die_in_stream") as bad, cluster.thread.serve(other.app) as address:
        status = {"model_names": ["tiny", "other"], "speed": 1, "queue_length": 0}
        registration = {"worker_name": address, "check_heart_beat": False, "worker_status": status}
        token = {"Authorization": f"Bearer {TOKEN}"}
        assert cluster.post(cluster.controller_url, "/register_worker", registration, headers=token)[0] == 200
        cluster.wait_for_models(api, "other", "tiny")
        while not bad.received:  # whichever is chosen first
            other.received.clear()
            _, _, body = cluster.post(api, CHAT, QUESTION | {"stream": True})
        assert not other.received
        assert body.count(WORDS[0].encode()) == 1
        assert orjson.loads(data_of(body)[-1])["error"]["code"] == "worker_lost"
    assert cluster.post(cluster.controller_url, "/refresh_all_workers", {}, headers=token)[0] == 200
    cluster.wait_for_models(api)


@pytest.mark.parametrize(
    ("asked", "num_choices"),
    [
        ({"messages": [], "n": 2}, 2),
        ({"prompt": "a"}, 1),
        ({"prompt": [5, 6, 7]}, 1),
        ({"prompt": ["a", "b"], "n": 2}, 4),
        ({"prompt": [[5], [6]], "n": None}, 2),
    ],
)
def test_a_resume_form_has_an_entry_for_each_choice(asked, num_choices):
    """Null where nothing was sent of it."""
    document = orjson.loads(resume_body(orjson.dumps(asked), b": 0 prompt 5,6\n: 0 0 7\r\n: 0 1 \n: 0 1 8,9\n"))
    assert document["resume"] == {
        "prompt_token_ids": [[5, 6], *[None] * (num_choices - 1)],
        "emitted_token_ids": [[7, 8, 9], *[[]] * (num_choices - 1)],
    }
    assert asked.items() <= document.items()


def test_a_resume_form_tells_whose_end_was_sent():
    tags = b": 1 prompt 5\n: 1 0 7\n: 0 prompt 5\n: 0 0 8\n: 1 1 9\n: 1 end \r\n: 0 1 6\n"
    resume = orjson.loads(resume_body(b'{"prompt":"a","n":2}', tags))["resume"]
    assert resume["ended_choices"] == [1]
    assert resume["emitted_token_ids"] == [[8, 6], [7, 9]]
