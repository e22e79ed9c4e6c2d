"""The command `python3 -m fastchat.serve.controller`: flags, first and ready lines, how it ends."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import urllib.request

import psutil
import pytest

from fastchat.serve.controller import create_controller_parser
from tests.processes import ServerProcess, process_environment, run_command, start_command


def test_log_is_the_guides(tmp_path):
    """`args: Namespace(...)` first, `Uvicorn running on http://localhost:PORT (Press CTRL+C to quit)` when ready."""
    with start_command("controller", "--port", "0", state_dir=tmp_path) as controller:
        url = controller.url
        lines = controller.log.splitlines()
        assert re.search(
            r"\| INFO \| controller \| args: Namespace\(host='localhost', port=0, dispatch_method=", lines[0]
        )
        ready = (
            rf"\| INFO \| uvicorn \| Uvicorn running on http://localhost:{controller.port} \(Press CTRL\+C to quit\)$"
        )
        assert re.search(ready, lines[-1])
        with urllib.request.urlopen(f"{url}/livez", timeout=10) as response:
            assert response.status == 200
        assert (tmp_path / "cluster-token").read_text().strip() not in controller.log


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_ends_it_in_order_with_code_0(tmp_path, number):
    """Also while a watcher's endless stream is open."""
    with start_command("controller", "--port", "0", state_dir=tmp_path) as controller:
        token = (controller.url and tmp_path / "cluster-token").read_text().strip()
        with socket.create_connection(("127.0.0.1", controller.port), timeout=10) as watcher:
            watcher.sendall(f"GET /cluster/watch HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n\r\n".encode())
            assert b"200 OK" in watcher.recv(4096)
            controller.signal(number)
            assert controller.wait(limit_s=60) == 0
        assert "Traceback" not in controller.log


def test_flags_may_be_shortened_to_a_unique_prefix():
    """FastChat's users rely on it."""
    arguments = create_controller_parser().parse_args(
        ["--ho", "0.0.0.0", "--po", "1", "--disp", "shortest_queue", "--ss"]
    )
    assert (arguments.host, arguments.port, arguments.ssl) == ("0.0.0.0", 1, True)
    defaults = create_controller_parser().parse_args([])
    assert (defaults.host, defaults.port, defaults.dispatch_method) == ("localhost", 21001, "shortest_queue")


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--dispatch-method", "lottery"], 2, "lottery"),
        (["--port", "70000"], 2, "65535"),
        (["--host", "http://x"], 2, "localhost"),
        (["--host", "198.51.100.7"], 2, "no interface of this machine"),
        (["--ssl"], 2, "SSL_KEYFILE"),
        (["--cluster-token-file", "/nonexistent"], 2, "/nonexistent"),
    ],
)
def test_flag_that_cannot_be_obeyed_is_one_line(tmp_path, flags, code, words):
    """On stderr, with what to do, and no traceback."""
    ended = run_command("controller", "--port", "0", *flags, state_dir=tmp_path)
    assert ended.returncode == code
    assert words in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr


def test_port_in_use_is_code_69(tmp_path):
    """Told at once, with the flag that helps."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ended = run_command("controller", "--port", str(taken.getsockname()[1]), state_dir=tmp_path)
    assert ended.returncode == 69
    assert "in use" in ended.stderr.splitlines()[-1]
    assert "--port" in ended.stderr.splitlines()[-1]


def test_listens_on_loopback_only_by_default(tmp_path):
    """Every address that it listens on is this machine's own."""
    with start_command("controller", "--port", "0", state_dir=tmp_path) as controller:
        port = controller.port
        connections = psutil.Process(controller.pid).net_connections("tcp")
        listening = {entry.laddr for entry in connections if entry.status == psutil.CONN_LISTEN}
        assert ("127.0.0.1", port) in listening
        assert {address.ip for address in listening} <= {"127.0.0.1", "::1"}


def test_help_is_a_document(tmp_path):
    """Each flag with its default, fast."""
    ended = run_command("controller", "--help", state_dir=tmp_path)
    assert ended.returncode == 0
    for words in ("--host", "(default: localhost)", "(default: 21001)", "FASTCHAT_CLUSTER_TOKEN"):
        assert words in ended.stdout


def test_controller_never_imports_torch():
    """A process that computes nothing stays small."""
    program = (
        "import sys, fastchat.serve.controller, fastchat.cluster.watcher, fastchat.cluster.registration, "
        "fastchat.cluster.dispatch, fastchat.ops.metrics, fastchat.ops.keys; "
        "print([name for name in ('torch', 'transformers', 'numpy', 'tokenizers') if name in sys.modules])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env=process_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert ended.stdout.strip() == "[]"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_ssl_serves_https(tmp_path):
    """With the files of SSL_KEYFILE and SSL_CERTFILE."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-days", "2"]
    subprocess.run([*command, *names, "-keyout", key, "-out", certificate], check=True, capture_output=True, timeout=60)
    environment = {"SSL_KEYFILE": str(key), "SSL_CERTFILE": str(certificate)}
    with start_command("controller", "--port", "0", "--ssl", state_dir=tmp_path, environment=environment) as controller:
        context = ssl.create_default_context(cafile=certificate)
        with urllib.request.urlopen(f"{controller.url}/livez", timeout=10, context=context) as response:
            assert controller.url.startswith("https://localhost:")
            assert response.status == 200


def test_error_in_start_up_is_one_line_and_not_a_traceback():
    """An error on purpose in a lifespan reaches the command's end as itself."""
    program = """
from contextlib import asynccontextmanager
from fastapi import FastAPI
from fastchat.errors import CheckpointError
from fastchat.ops.logs import configure_logging
from fastchat.serve.arguments import run_command
from fastchat.serve.http_server import bind_listeners, run_server

@asynccontextmanager
async def lifespan(app):
    raise CheckpointError("folder/model.bin is truncated; download it again.")
    yield

def main(argv):
    configure_logging("worker")
    return run_server(FastAPI(lifespan=lifespan), bind_listeners("localhost", 0))

run_command(main)
"""
    with ServerProcess([sys.executable, "-c", program]) as process:
        assert process.wait() == 2
        assert process.log.splitlines()[-1] == "error: folder/model.bin is truncated; download it again."
        assert "Traceback" not in process.log
