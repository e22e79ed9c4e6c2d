"""SIGTERM to each process: it unregisters, finishes what runs within a limit, tells the rest, and exits with 0."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest

from tests.processes import ServerProcess, start_command

NAME = "chatglm2-6b"
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
SHORT, LONG = 300, 30_000


class Answer:
    """A completion that is read in a thread: whole or streamed."""

    def __init__(self, url, max_tokens, *, is_stream=True):
        body = {"model": NAME, "prompt": "Hello", "temperature": 0, "max_tokens": max_tokens, "ignore_eos": True}
        self._request = urllib.request.Request(
            f"{url}/v1/completions",
            json.dumps({**body, "stream": is_stream}).encode(),
            {"Content-Type": "application/json"},
        )
        self.status = None
        self._lines = []
        self._has_begun = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        if is_stream:
            assert self._has_begun.wait(60)

    def _read(self):
        try:
            with urllib.request.urlopen(self._request, timeout=60) as answer:
                self.status = answer.status
                for line in answer:
                    self._lines.append(line)
                    self._has_begun.set()
        except urllib.error.HTTPError as error:
            self.status = error.code
            self._lines = error.read().splitlines()
        except OSError:  # it came too late: nobody listens there any more
            self.status, self._lines = 503, [b"not connected"]
        self._has_begun.set()

    def result_is_there(self):
        return not self._reader.is_alive()

    def result(self):
        """The last event or the whole body."""
        self._reader.join(60)
        lines = [line.strip() for line in self._lines if line.strip()]
        return lines[-1].removeprefix(b"data: ")

    def finish_reason(self):
        """Of a stream that ended properly."""
        events = [line for line in self._lines if line.startswith(b"data: {")]
        return next(reason for event in reversed(events) if (reason := _reason(json.loads(event[6:]))))


def _reason(chunk):
    return chunk["choices"][0]["finish_reason"] if chunk["choices"] else None


class Parts:
    """Controller, worker and API server, each its own process. One that a test ended, or whose flags are not those that
    the next test wants, is started again for it.
    """

    def __init__(self, folder, state_dir):
        self._folder, self._state_dir = folder, state_dir
        self._started = {}

    def ready(self, *, worker_flags=None, api_flags=None):
        """All three as wanted; None is content with any flags."""
        self.controller = self._running("controller", (), ())
        address = ("--controller-address", self.controller.url)
        self.worker = self._running("model_worker", ("--model-path", self._folder, *address), worker_flags)
        self.api = self._running("openai_api_server", address, api_flags)
        self.worker_id = get(f"{self.worker.url}/livez")["worker_id"]
        deadline = time.monotonic() + 60
        while self._known_workers() != [self.worker_id]:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return self

    def _known_workers(self):
        try:
            return [row["worker"] for row in get(f"{self.api.url}/api/v1/models")["data"]]
        except urllib.error.HTTPError:  # one that was just started has no table yet
            return []

    def _running(self, module, always, flags):
        process, its_flags = self._started.get(module, (None, None))
        if process is None or process.process.poll() is not None or flags not in {None, its_flags}:
            if process is not None:
                process.stop()
            given = ("--port", "0", *always, *(flags or ()))
            process = start_command(module, *given, state_dir=self._state_dir, environment=ONE_THREAD)
            self._started[module] = process, flags or ()
        return process

    def stop(self):
        for process, _ in self._started.values():
            process.stop()


def get(url):
    with urllib.request.urlopen(url, timeout=60) as answer:
        return json.load(answer)


@pytest.fixture(scope="module")
def parts(model_folder, tmp_path_factory):
    parts = Parts(model_folder, tmp_path_factory.mktemp("draining"))
    yield parts
    parts.stop()


def metrics_of(api):
    with urllib.request.urlopen(f"{api.url}/metrics", timeout=60) as answer:
        return answer.read()


def is_told(last):
    error = json.loads(last)["error"]
    assert error["code"] == "shutting_down"
    return "shutting down" in error["message"]


@pytest.mark.parametrize("what", ["api", "worker"])
def test_what_runs_is_finished(parts, what):
    """A stream and a whole answer end as they would have, and the process ends with 0 right after them."""
    there = parts.ready(api_flags=(), worker_flags=())
    stream = Answer(there.api.url, SHORT)
    whole = Answer(there.api.url, SHORT, is_stream=False)
    process = getattr(there, what)
    process.signal(signal.SIGTERM)
    assert stream.result() == b"[DONE]"
    assert stream.finish_reason() == "length"
    assert whole.result()
    assert whole.status in (200, 503), "it may not have arrived before the end began"
    assert process.wait(limit_s=60) == 0
    assert "Traceback" not in process.log
    if what == "worker":
        there.controller.wait_for_line(f"worker drains worker_id={there.worker_id}")
        there.controller.wait_for_line(f"worker gone worker_id={there.worker_id}")


def test_new_requests_go_elsewhere_while_a_worker_drains(parts):
    """Unregistered at once: the model is unavailable, not unknown, and nobody waits for it."""
    there = parts.ready(worker_flags=("--drain-timeout", "3"))
    stream = Answer(there.api.url, LONG)
    there.worker.signal(signal.SIGTERM)
    there.controller.wait_for_line(f"worker drains worker_id={there.worker_id}")
    late = Answer(there.api.url, 4, is_stream=False)
    late.result()
    assert late.status == 503
    assert stream.result()
    assert there.worker.wait(limit_s=60) == 0


@pytest.mark.parametrize("what", ["worker", "api"])
def test_what_does_not_end_in_time_is_told(parts, what):
    """After --drain-timeout a stream gets an error event that a person can read; exit code 0 all the same."""
    there = parts.ready(**{f"{what}_flags": ("--drain-timeout", "1")})
    stream = Answer(there.api.url, LONG)
    process = getattr(there, what)
    began = time.monotonic()
    process.signal(signal.SIGTERM)
    last = stream.result()
    if last == b"[DONE]":
        pytest.skip("this machine computed the long answer within the limit")
    assert is_told(last)
    assert process.wait(limit_s=60) == 0
    assert 0.9 < time.monotonic() - began < 30
    assert "Traceback" not in process.log


def test_whole_answer_that_does_not_end_in_time_is_a_503(parts):
    """With the error in OpenAI's shape: its client knows that it may ask again."""
    there = parts.ready(api_flags=("--drain-timeout", "1"))
    stream = Answer(there.api.url, LONG)
    whole = Answer(there.api.url, LONG, is_stream=False)
    while b"fastchat_http_requests_in_flight 2.0" not in metrics_of(there.api):
        assert not stream.result_is_there(), "the other request never came"
    there.api.signal(signal.SIGTERM)
    if (last := stream.result()) == b"[DONE]":
        pytest.skip("this machine computed the long answer within the limit")
    assert is_told(last)
    assert is_told(whole.result())
    assert whole.status == 503
    assert there.api.wait(limit_s=60) == 0


def test_controller_ends_at_once_though_it_is_watched(parts):
    """Its streams are endless and are not waited for."""
    there = parts.ready()
    there.controller.signal(signal.SIGTERM)
    assert there.controller.wait(limit_s=10) == 0


def test_fastchat_serve_finishes_tells_and_leaves_with_0(model_folder, tmp_path):
    """One limit for everything that it started."""
    ports = ("--port", "0", "--controller-port", "0", "--worker-port", "0", "--web-port", "0")
    command = [sys.executable, "-m", "fastchat", "serve", *ports, "--model-path", model_folder, "--drain-timeout", "1"]
    with ServerProcess(command, environment={"FASTCHAT_STATE_DIR": str(tmp_path), **ONE_THREAD}) as serving:
        url = serving.wait_for_line(r"export OPENAI_BASE_URL=(\S+)/v1$")[1]
        serving.wait_for_line("Ctrl-C stops everything")
        stream = Answer(url, LONG)
        serving.signal(signal.SIGTERM)
        last = stream.result()
        assert last == b"[DONE]" or is_told(last)
        assert serving.wait(limit_s=60) == 0
        assert "Traceback" not in serving.log
