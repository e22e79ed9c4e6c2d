"""`fastchat chat` as a process, against a real system."""

import json
import subprocess
import sys
import time
import urllib.request

import pytest

from tests.processes import ROOT, process_environment
from tests.system import MODEL_NAME
from tests.terminal.pty_session import CTRL_C, PtySession

MODULE = "fastchat.serve.chat"


def chat(*flags, typed="", **environment):
    return subprocess.run(
        [sys.executable, "-m", MODULE, *flags],
        cwd=ROOT,
        env=process_environment({"OPENAI_BASE_URL": "", "OPENAI_API_KEY": "", **environment}),
        input=typed,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )


def num_unfinished(system):
    """Sequences that the worker has, as its controller knows."""
    token = (system.state_dir / "cluster-token").read_text().strip()
    request = urllib.request.Request(
        f"{system.controller.url}/worker_get_status", b"{}", {"Authorization": f"Bearer {token}"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["queue_length"]


def test_piped_question_is_answered_by_the_only_model(system):
    """The answer is the API's; the end of the input is the end, with exit code 0."""
    result = chat("--temperature", "0", "--max-new-tokens", "30", typed="你是谁？\n", OPENAI_BASE_URL=system.api_url)
    body = {"model": MODEL_NAME, "messages": [{"role": "user", "content": "你是谁？"}], "temperature": 0}
    answer = system.post("/v1/chat/completions", {**body, "max_tokens": 30})["choices"][0]["message"]["content"]
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"user: 你是谁？\nassistant: {answer}\nuser: \n"


def test_unknown_model_is_one_line_with_the_names(system):
    result = chat("--url", system.api_url, "--model", "gpt-4")
    assert result.returncode == 1
    assert result.stderr == f"error: The model `gpt-4` does not exist here. Models served: `{MODEL_NAME}`.\n"


def test_ctrl_c_stops_the_answer_on_the_server_too(system):
    """The worker's queue is empty soon after, though the answer would have gone on; the session goes on."""
    with PtySession(MODULE, "--url", system.api_url, "--temperature", "0") as session:
        session.wait_for("user: ")
        session.type("你是谁？\n")
        session.wait_for("assistant: .{20}")
        session.type(CTRL_C)
        session.wait_for("dropped\nuser: ")
        deadline = time.monotonic() + 60
        while num_unfinished(system) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert num_unfinished(system) == 0
        session.type("!!exit\n")
        assert session.wait() == 0


@pytest.mark.parametrize("key", ["--url", "OPENAI_BASE_URL"])
def test_address_that_is_none_is_a_usage_error(key):
    """Exit code 2, for the flag and for the variable."""
    result = chat(key, "nowhere") if key.startswith("--") else chat(**{key: "nowhere"})
    assert result.returncode == 2
    assert "not an address" in result.stderr.splitlines()[-1]
