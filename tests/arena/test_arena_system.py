"""Laws of the arena in the whole system: real processes, two small models, the terminal's command."""

import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from tests.checkpoints import write_checkpoint
from tests.processes import process_environment, run_command
from tests.system import running_system
from tests.terminal.pty_session import PtySession

NAMES = ("chatglm2-small", "qwen2-small")
ENGINE_FLAGS = ("--device", "cpu", "--dtype", "float32", "--kv-cache-memory", "32MiB")
QUESTION = {"messages": [{"role": "user", "content": "你是谁？"}], "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    """A worker of two models, and one alias of the first."""
    folder = tmp_path_factory.mktemp("arena")
    write_checkpoint(folder / NAMES[0], "chatglm2", config={"seq_length": 32768})
    write_checkpoint(folder / NAMES[1], "qwen2", config={"max_position_embeddings": 32768})
    flags = [
        *("--model-path", folder / NAMES[0], "--model-names", f"{NAMES[0]},another-name"),
        *("--model-path", folder / NAMES[1], "--model-names", NAMES[1]),
    ]
    names = (*NAMES, "another-name")
    with running_system(
        folder, worker_module="multi_model_worker", worker_flags=[*flags, *ENGINE_FLAGS], model_names=names
    ) as running:
        yield running


def stream(system, path, body):
    """The open answer of a round; its lines are read by the caller."""
    request = urllib.request.Request(
        system.api_url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return urllib.request.urlopen(request, timeout=60)


def events(system, path, body):
    """All events of a round or turn."""
    with stream(system, path, body) as answer:
        lines = [line.decode().removeprefix("data: ") for line in answer if line.startswith(b"data: {")]
    return [json.loads(line) for line in lines]


def text_of(round_events, side):
    return "".join(
        choice["delta"].get("content") or ""
        for event in round_events
        if event["type"] == "chunk" and event["side"] == side
        for choice in event["chunk"]["choices"]
    )


def num_running(system):
    """Sequences in the worker's engines, as its metrics say."""
    token = (system.state_dir / "cluster-token").read_text().strip()
    request = urllib.request.Request(f"{system.worker.url}/metrics", headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("fastchat_num_requests_running{"))


def compare(system, *flags, text=None):
    """`fastchat compare`, to its end."""
    return subprocess.run(
        [sys.executable, "-m", "fastchat.serve.main", "compare", "--url", system.api_url, *flags],
        input=text or "",
        capture_output=True,
        text=True,
        env=process_environment(),
        timeout=60,
        check=False,
    )


def test_each_side_says_what_its_model_says_alone(system):
    """Greedy answers of a round equal those of the chat route, byte for byte."""
    both = events(system, "/api/v1/arena/rounds", {"models": NAMES, **QUESTION})
    for side, name in zip("ab", NAMES, strict=True):
        alone = system.post("/v1/chat/completions", {"model": name, **QUESTION})
        assert text_of(both, side) == alone["choices"][0]["message"]["content"]


def test_a_blind_round_never_pairs_a_model_with_itself(system):
    """A model that is served under two names takes part once."""
    for _ in range(6):
        opening, *_, end = events(system, "/api/v1/arena/rounds", QUESTION)
        assert end["can_vote"]
        vote = {"vote": "tie", "vote_token": opening["vote_token"]}
        names = system.post(f"/api/v1/arena/rounds/{opening['round_id']}/vote", vote)["models"]
        assert sorted(names.values()) == sorted(NAMES)


def wait_for_running(system, number):
    """An engine tells what runs after its step."""
    began_at = time.monotonic()
    while num_running(system) != number:
        assert time.monotonic() - began_at < 60
        time.sleep(0.02)


def test_a_client_that_leaves_frees_both_sequences(system):
    """Both engines are idle long before the answers would have ended."""
    endless = {**QUESTION, "models": NAMES, "max_tokens": 30_000, "ignore_eos": True}
    answer = stream(system, "/api/v1/arena/rounds", endless)
    seen = b""
    while not all(b'"side":"%s"' % side in seen for side in (b"a", b"b")):
        seen += answer.readline().partition(b'"sides":')[0]
    wait_for_running(system, 2)
    answer.close()
    wait_for_running(system, 0)


def test_votes_survive_a_killed_server_and_are_exported_without_it(system, tmp_path):
    """A vote that was acknowledged is in the file at once; `fastchat votes` reads it."""
    exported = run_command("votes_command", state_dir=system.state_dir)
    with urllib.request.urlopen(f"{system.api_url}/api/v1/arena/votes.jsonl", timeout=60) as answer:
        assert answer.read().decode() == exported.stdout
    votes = [json.loads(line) for line in exported.stdout.splitlines()]
    assert len(votes) >= 6
    assert "你是谁" not in exported.stdout
    nothing = run_command("votes_command", state_dir=tmp_path)
    assert (nothing.returncode, len(nothing.stderr.splitlines())) == (2, 1)


def test_compare_prints_one_labelled_answer_after_the_other(system):
    """Piped output is plain: label, name, text; with --vote the vote is cast."""
    flags = ("--models", ",".join(NAMES), "--max-new-tokens", "8", "--temperature", "0", "--vote", "b")
    result = compare(system, *flags, "你是谁？")
    assert result.returncode == 0, result.stderr
    expected = ""
    for label, name in zip("ab", NAMES, strict=True):
        alone = system.post("/v1/chat/completions", {"model": name, **QUESTION})
        expected += f"[{label}] {name}\n{alone['choices'][0]['message']['content']}\n"
    assert result.stdout == f"{expected}vote: b; a was {NAMES[0]}, b was {NAMES[1]}\n"


def test_compare_reads_a_pipe_as_one_blind_prompt(system):
    """Names are told by the vote alone."""
    result = compare(system, "--max-new-tokens", "4", "--vote", "both_bad", text="Hello!\nWho are you?")
    assert result.returncode == 0, result.stderr
    before, _, told = result.stdout.rpartition("vote: both_bad; ")
    assert not any(name in before for name in NAMES)
    assert all(name in told for name in NAMES)


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (("--models", f"{NAMES[0]},no-such-model", "hello"), 1),
        (("--models", NAMES[0], "hello"), 2),
        (("--url", "http://127.0.0.1:9", "hello"), 69),
        (("--temperature", "0", "--vote", "a"), 2),
    ],
)
def test_compare_fails_in_one_line(system, flags, code):
    """Whatever is wrong is said once, without a traceback."""
    result = compare(system, *flags)
    assert result.returncode == code
    assert "Traceback" not in result.stderr
    assert result.stderr.strip().splitlines()[-1].count("error:") == 1


def test_a_person_compares_votes_and_goes_on(system):
    """Answers in columns on a real terminal; a key is a vote, and the names come after it."""
    flags = ("--url", system.api_url, "--max-new-tokens", "6")
    environment = {"TERM": "xterm"}
    with PtySession("fastchat.serve.compare", *flags, environment=environment) as session:
        session.wait_for("user: ")
        session.type("你好\n")
        session.wait_for(r"\[a\] model a.*\[b\] model b")
        session.wait_for("vote a, b")
        session.type("g\n")
        session.wait_for("user: ")
        session.type("你是谁\n")
        session.wait_for(r"vote a, b.*: ")
        session.type("r\n")
        session.wait_for(r"vote a, b.*: ")
        session.type("t\n")
        session.wait_for(rf"vote: tie; a was ({NAMES[0]}|{NAMES[1]})")
        session.wait_for("user: ")
        session.type("\n")
        assert session.wait() == 0


def test_a_signal_ends_the_server_in_order_with_a_round_under_way(system, tmp_path):
    """SIGTERM: the round's reader is told, and the records are closed whole."""
    with running_system(tmp_path, model_names=("alone",)) as alone:
        status = None
        try:
            events(alone, "/api/v1/arena/rounds", QUESTION)
        except urllib.error.HTTPError as error:
            status, code = error.code, json.load(error)["error"]["code"]
        assert (status, code) == (503, "too_few_models")
        alone.api.signal(signal.SIGTERM)
        assert alone.api.wait() == 0
        assert [path.name for path in alone.state_dir.glob("arena.sqlite*")] == ["arena.sqlite"]
