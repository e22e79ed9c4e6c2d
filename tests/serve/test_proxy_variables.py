"""A proxy set for the outside world is never asked about our own hops: not by any process, in any spelling."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import urllib.request

import pytest

from tests.processes import ROOT, ServerProcess, process_environment

PORTS = ("--port", "0", "--controller-port", "0", "--worker-port", "0", "--web-port", "0")


@pytest.fixture
def proxy():
    """A proxy that notes who comes and answers nothing."""
    visitors = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept():
            while True:
                try:
                    connection, address = listener.accept()
                except OSError:
                    return
                visitors.append(address)
                connection.close()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        port = listener.getsockname()[1]
        names = ("http_proxy", "https_proxy", "all_proxy", "ws_proxy", "wss_proxy")
        variables = {spelled: f"http://127.0.0.1:{port}" for name in names for spelled in (name, name.upper())}
        yield visitors, {**variables, "no_proxy": "", "NO_PROXY": ""}
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(5)


def test_no_process_asks_the_proxy(model_folder, tmp_path, proxy):
    """Start, register, watch, answer, chat in the terminal; and the proxy is there, for whoever would ask."""
    visitors, variables = proxy
    environment = {"FASTCHAT_STATE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, "-m", "fastchat", "serve", *PORTS, "--model-path", model_folder]
    with ServerProcess(command, environment=environment) as serving:
        url = serving.wait_for_line(r"export OPENAI_BASE_URL=(\S+)/v1$")[1]
        body = {"model": "chatglm2-6b", "prompt": "Hello", "max_tokens": 4}
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["choices"][0]["finish_reason"]
        chat = subprocess.run(
            [sys.executable, "-m", "fastchat", "chat", "--url", url, "--max-new-tokens", "4"],
            input="Hello\n",
            cwd=ROOT,
            env=process_environment(environment),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert chat.returncode == 0, chat.stderr
        assert visitors == []
        with socket.create_connection(tuple(variables["http_proxy"].removeprefix("http://").split(":")), timeout=5):
            pass
    assert len(visitors) == 1
