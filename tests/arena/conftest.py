"""A real controller and a real API server with its arena, around canned workers."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass

import orjson
import pytest

from fastchat.arena.routes import ArenaConfig
from fastchat.gateway.app import create_api_app
from fastchat.gateway.config import ApiServerConfig
from fastchat.serve.openai_api_server import mounted_arena
from tests.gateway.conftest import TOKEN, Cluster
from tests.gateway.loop_thread import LoopThread

MESSAGES = [{"role": "user", "content": "Who are you?"}]


@dataclass(frozen=True)
class Event:
    """One event of a round."""

    type: str
    data: dict


class ArenaClient:
    """Speaks to the arena of one API server."""

    def __init__(self, cluster, url, headers=None):
        self.cluster = cluster
        self.url = url
        self.headers = headers

    def post(self, path, body):
        """Status and document."""
        status, _, raw = self.cluster.post(self.url, path, body, headers=self.headers)
        return status, orjson.loads(raw)

    def get(self, path):
        """Status and document."""
        status, _, raw = self.cluster.get(self.url, path, headers=self.headers)
        return status, orjson.loads(raw)

    def stream(self, path, body):
        """The events of a round or turn, and the raw bytes."""
        status, _, raw = self.cluster.post(self.url, path, body, headers=self.headers)
        assert status == 200, raw
        return events_of(raw), raw

    def begin(self, **body):
        """The events of a new round."""
        return self.stream("/api/v1/arena/rounds", {"messages": MESSAGES, **body})[0]

    def vote(self, events, vote):
        """Vote on the round of these events."""
        opening = events[0].data
        body = {"vote": vote, "vote_token": opening["vote_token"]}
        return self.post(f"/api/v1/arena/rounds/{opening['round_id']}/vote", body)


def events_of(raw):
    """The framed events; `[DONE]` must be the last thing."""
    *blocks, done, rest = raw.decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    events = []
    for block in blocks:
        kind, data = block.split("\n")
        document = orjson.loads(data.removeprefix("data: "))
        assert kind == f"event: {document['type']}"
        events.append(Event(document["type"], document))
    return events


def text_of(events, side):
    """What one side said."""
    chunks = [event.data["chunk"] for event in events if event.type == "chunk" and event.data["side"] == side]
    return "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])


@pytest.fixture(scope="package")
def thread():
    thread = LoopThread()
    yield thread
    thread.close()


@pytest.fixture(scope="module")
def cluster(thread):
    cluster = Cluster(thread)
    yield cluster
    cluster.close()


@contextmanager
def serving(cluster, path, *, logs_text=False, **config):
    """An arena that keeps its records in `path`."""
    config = ApiServerConfig(cluster_token=TOKEN, controller_address=cluster.controller_url, **config)
    app = create_api_app(config, [mounted_arena(ArenaConfig(path, logs_text=logs_text))])
    with cluster.thread.serve(app) as url:
        yield ArenaClient(cluster, url)


@pytest.fixture(scope="module")
def registered_workers(cluster):
    """Two canned workers, of `apple-7b` and `berry-9b`."""
    with cluster.worker("w1", ("apple-7b",)) as apple, cluster.worker("w2", ("berry-9b",)) as berry:
        yield {"apple-7b": apple, "berry-9b": berry}


@pytest.fixture
def workers(registered_workers):
    """The workers by their models; they have heard nothing yet and answer well."""
    for worker in registered_workers.values():
        worker.acts.clear()
        worker.received.clear()
    return registered_workers


@pytest.fixture
def client(cluster, workers, tmp_path):
    """A client of a fresh arena that sees both workers."""
    with serving(cluster, tmp_path / "arena.sqlite") as client:
        cluster.wait_for_models(client.url, "apple-7b", "berry-9b")
        yield client
