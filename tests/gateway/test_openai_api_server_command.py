"""`python3 -m fastchat.serve.openai_api_server` as a process, with the others around it."""

import asyncio
import sys
import time
from pathlib import Path

import aiohttp
import orjson
import pytest

from tests.gateway import canned_worker
from tests.processes import ServerProcess, free_port, run_command, start_command

QUESTION = {"model": "tiny", "messages": [], "stream": True, "act": "held_stream"}
NUM_STREAMS = 16


def start_worker(controller_url, state_dir, worker_id):
    token = (state_dir / "cluster-token").read_text().strip()
    return ServerProcess([sys.executable, Path(canned_worker.__file__), controller_url, token, worker_id, "tiny"])


async def until_ready(session, url, num_workers):
    while True:
        async with session.get(f"{url}/health") as response:
            if response.status == 200 and orjson.loads(await response.read())["num_workers"] == num_workers:
                return
        await asyncio.sleep(0.05)


async def read_stream(session, url, has_begun):
    """The stream's last event."""
    async with session.post(f"{url}/v1/chat/completions", json=QUESTION) as response:
        assert response.status == 200
        body = await response.content.readuntil(b"\n\n")
        has_begun.release()
        body += await response.read()
    return body.rstrip().rpartition(b"data: ")[2]


async def streams_over_a_death(url, killed, other):
    """The last events of all streams, which `killed` leaves and `other` ends; and how long new ones took to begin."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
        await until_ready(session, url, 2)
        has_begun = asyncio.Semaphore(0)
        streams = [asyncio.ensure_future(read_stream(session, url, has_begun)) for _ in range(NUM_STREAMS)]
        for _ in range(NUM_STREAMS):
            await has_begun.acquire()
        killed.kill()
        killed_at = time.monotonic()
        later = [asyncio.ensure_future(read_stream(session, url, has_begun)) for _ in range(4)]
        for _ in later:
            await has_begun.acquire()
        took_s = time.monotonic() - killed_at
        await until_ready(session, url, 1)
        other.send_line("go on")
        return await asyncio.gather(*streams), await asyncio.gather(*later), took_s


def test_a_worker_that_is_killed_costs_its_own_streams_alone(tmp_path):
    """Started before everything else. The dead worker's streams end with an error event, all others are whole."""
    port = free_port()
    address = f"http://localhost:{port}"
    flags = ("--port", "0", "--controller", address)  # a unique prefix is enough
    with (
        start_command("openai_api_server", *flags, "--api-keys", "", state_dir=tmp_path) as refused,
        start_command("openai_api_server", *flags, state_dir=tmp_path) as api,
    ):
        assert refused.wait() == 2
        assert api.url
        api.wait_for_line("waiting for the controller")
        with start_command("controller", "--port", str(port), state_dir=tmp_path) as controller:
            assert controller.url
            with (
                start_worker(address, tmp_path, "one") as one,
                start_worker(address, tmp_path, "two") as two,
            ):
                streams, later, took_s = asyncio.run(streams_over_a_death(api.url, one, two))
        broken = [orjson.loads(event) for event in streams if event != b"[DONE]"]
        assert len(broken) == NUM_STREAMS // 2
        assert {event["error"]["code"] for event in broken} == {"worker_lost"}
        assert later == [b"[DONE]"] * 4
        assert took_s < 20
        assert "torch" not in Path(f"/proc/{api.pid}/maps").read_text()
        assert "Uvicorn running on http://localhost:" in api.log
        assert "args: Namespace(host=" in api.log.splitlines()[0]
        assert api.stop() == 0


def test_an_open_door_is_said_loudly_and_keys_are_never_logged(tmp_path):
    flags = ("--host", "0.0.0.0", "--port", "0")
    with start_command("openai_api_server", *flags, state_dir=tmp_path) as api:
        assert api.url
        assert api.log.count("NO API KEY IS SET: everyone who can reach any address of this machine") == 1
    with start_command("openai_api_server", *flags, "--api-keys", "sk-secret,sk-other", state_dir=tmp_path) as api:
        assert api.url
        assert "NO API KEY" not in api.log
        assert "api_keys='***'" in api.log
        assert "sk-" not in api.log


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        (("--host", "192.0.2.7"), "no interface of this machine has that address"),
        (("--allowed-origins", "*"), "is not a JSON list"),
        (("--api-keys", "a,,b"), "separated by single commas"),
        (("--ssl",), "SSL_KEYFILE"),
        (("--controller-address", "localhost:21001"), "write it like http://localhost:21001"),
    ],
)
def test_a_flag_that_cannot_be_obeyed_ends_it_in_one_line(tmp_path, flags, hint):
    ended = run_command("openai_api_server", *flags, state_dir=tmp_path)
    assert ended.returncode == 2
    assert hint in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr
