"""Controls C17, C19, C24 and C26: what our processes write, how they speak to each other, and what they may do."""

from __future__ import annotations

import ast
import re
import secrets
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from tests.checkpoints import write_checkpoint
from tests.processes import ROOT, ServerProcess, free_port, start_command
from tests.security.conftest import GIVEN_KEY, MODEL

LINE = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \| (DEBUG|INFO|WARNING|ERROR) \| \S+ \| ")
CALENDAR = {
    "api/request_context.py": "the answer's `created`",
    "gateway/relay.py": "the answer's `created`",
    "gateway/controller_legacy.py": "a model card's `created`",
    "worker/loaded_model.py": "a model card's `created`",
    "terminal/local_talker.py": "the answer's `created`",
    "serve/keys_command.py": "when a key was made, until which day it holds",
    "ops/keys.py": "until which day a key holds",
    "arena/records.py": "when a vote was cast",
    "worker/model_control.py": "when a model was last used",
    "serve/model_control_command.py": "how long ago that was, for the reader",
}
"""Where the calendar's clock is right, and for what. No wait, lease or deadline is among them."""


def test_c17_no_prompt_and_no_answer_is_logged(cluster):
    """Of many random ones, in every place of a request, good and bad."""
    words = [secrets.token_hex(12) for _ in range(60)]
    for word in words[::3]:
        cluster.call("/v1/completions", {"model": MODEL, "prompt": word, "max_tokens": 2, "user": word})
    for word in words[1::3]:
        body = {"model": MODEL, "messages": [{"role": "user", "content": word}], "stop": [word], "max_tokens": 2}
        cluster.call("/v1/chat/completions", body)
    for word in words[2::3]:
        cluster.call("/v1/chat/completions", {"model": MODEL, "messages": [{"role": word, "content": word}]})
        cluster.call("/v1/completions", f'{{"model": "{MODEL}", "prompt": "{word}"')
    assert not [word for word in words if word in cluster.logs]


def test_c17_nobody_forges_a_line(cluster):
    """Line ends and escapes in paths, names and headers stay inside one line."""
    forged = '\r\n2026-01-01 00:00:00 | ERROR | api | forged {"level":"error"}\x1b[31m'
    cluster.call("/v1/completions", {"model": forged, "prompt": forged})
    quoted = "%0d%0a2026-01-01%2000:00:00%20|%20ERROR%20|%20api%20|%20forged%1b[31m"
    cluster.call(f"/{quoted}")
    cluster.call(f"/v1/models/{quoted}")
    cluster.call("/v1/models", headers={"User-Agent": "x\x1b[31m", "X-Request-Id": "a b\tc"})
    cluster.api.wait_for_line("forged")
    for process in cluster.processes:
        assert "\x1b" not in process.log
        for line in process.log.splitlines():
            assert LINE.match(line) or line.startswith("    | "), line
            assert not line.startswith("2026-01-01")


def test_c17_a_log_that_cannot_be_written_fails_no_request(tmp_path):
    """The disk is full where the log goes; the answers are as ever."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no device that is always full")
    port, token = free_port(), secrets.token_hex(16)
    with ServerProcess(
        ["sh", "-c", f"exec {sys.executable} -m fastchat.serve.controller --port {port} 2>/dev/full"],
        environment={"FASTCHAT_STATE_DIR": str(tmp_path), "FASTCHAT_CLUSTER_TOKEN": token},
    ) as process:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/list_models", b"", {"Authorization": f"Bearer {token}"}
        )
        for _ in range(3):
            assert answer_when_there(process, request) == b'{"models":[]}'


def answer_when_there(process, request, context=None):
    """The answer of a server that may still be starting."""
    while True:
        try:
            with urllib.request.urlopen(request, timeout=60, context=context) as answer:
                return answer.read()
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ConnectionRefusedError) or process.process.poll() is not None:
                raise


@pytest.fixture
def certificates(tmp_path):
    """Two authorities' worth of certificates for localhost: ours and a stranger's."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    for name in ("ours", "strange"):
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-days", "2"]
        files = ["-keyout", tmp_path / f"{name}.key", "-out", tmp_path / f"{name}.pem"]
        subprocess.run([*command, *names, *files], check=True, capture_output=True, timeout=60)
    return tmp_path


def listed(url, context):
    """Whether a model can be asked for; the worker's registration reaches the API server a moment later."""
    try:
        with urllib.request.urlopen(f"{url}/v1/models", timeout=60, context=context) as answer:
            return MODEL.encode() in answer.read()
    except urllib.error.HTTPError:
        return False


def test_c19_every_hop_speaks_tls(certificates, tmp_path):
    """Worker to controller over wss, API server to both over https; plain text and a strange CA get nowhere."""
    model = write_checkpoint(tmp_path / MODEL, "chatglm2")
    trusting = {
        "SSL_KEYFILE": str(certificates / "ours.key"),
        "SSL_CERTFILE": str(certificates / "ours.pem"),
        "SSL_CERT_FILE": str(certificates / "ours.pem"),
        "OMP_NUM_THREADS": "1",
    }
    with ExitStack() as stack:

        def start(module, *flags, **changes):
            process = start_command(
                module, "--port", "0", *flags, state_dir=tmp_path, environment={**trusting, **changes}
            )
            return stack.enter_context(process)

        controller = start("controller", "--ssl")
        address = ("--controller-address", controller.url)
        assert controller.url.startswith("https://")
        worker = start("model_worker", "--ssl", "--model-path", model, *address)
        api = start("openai_api_server", "--ssl", *address)
        doubting = start("openai_api_server", *address, SSL_CERT_FILE=str(certificates / "strange.pem"))
        plain = start("openai_api_server", "--controller-address", controller.url.replace("https", "http"))
        worker.wait_for_line("registered with the controller .*address=https://localhost:")
        context = ssl.create_default_context(cafile=certificates / "ours.pem")
        body = b'{"model": "chatglm2-6b", "prompt": "Hello", "max_tokens": 2}'
        request = urllib.request.Request(f"{api.url}/v1/completions", body, {"Content-Type": "application/json"})
        while not listed(api.url, context):
            time.sleep(0.05)
        with urllib.request.urlopen(request, timeout=60, context=context) as answer:
            assert answer.status == 200
        doubting.wait_for_line("TLS with the controller failed: .*must be trusted .SSL_CERT_FILE")
        plain.wait_for_line("waiting for the controller")
        for process in (controller, worker, api):
            with socket.create_connection(("127.0.0.1", process.port), timeout=60) as connection:
                connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
                assert b"200" not in connection.recv(100)
        assert "watching the controller" not in doubting.log + plain.log


def test_c24_waits_and_deadlines_are_on_the_monotonic_clock():
    """The calendar's clock is read where a date is meant, and nowhere else."""
    package = ROOT / "src" / "fastchat"
    found = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in (
                "time.time",
                "datetime.utcnow",
                "datetime.today",
            ):
                found.add(str(path.relative_to(package)))
    assert found <= set(CALENDAR), found - set(CALENDAR)


def test_c26_processes_may_do_little(cluster):
    """No new privileges, no core dump, files for their owner alone; secrets on no command line."""
    for process in cluster.processes:
        status = dict(
            line.split(":\t", 1)
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines()
            if ":\t" in line
        )
        assert status["NoNewPrivs"] == "1"
        assert status["Umask"] == "0077"
        assert psutil.Process(process.pid).rlimit(psutil.RLIMIT_CORE) == (0, 0)
        soft, hard = psutil.Process(process.pid).rlimit(psutil.RLIMIT_NOFILE)
        assert soft == min(hard, 65536) or hard == psutil.RLIM_INFINITY
        line = " ".join(psutil.Process(process.pid).cmdline())
        assert not any(secret in line for secret in (cluster.token, cluster.key, GIVEN_KEY))
    assert stat.S_IMODE(cluster.state_dir.stat().st_mode) == 0o700
    for file in cluster.state_dir.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


def test_c26_the_examples_run_as_nobody_special():
    """systemd and the container: a user of their own, no new privileges, a private folder for temporary files."""
    unit = (ROOT / "deploy" / "fastchat.service").read_text()
    for line in ("DynamicUser=yes", "NoNewPrivileges=yes", "UMask=0077", "PrivateTmp=yes", "CapabilityBoundingSet=\n"):
        assert line in unit
    assert re.search(r"^USER [1-9]", (ROOT / "deploy" / "Dockerfile").read_text(), re.MULTILINE)
    assert "no-new-privileges:true" in (ROOT / "deploy" / "compose.yaml").read_text()
