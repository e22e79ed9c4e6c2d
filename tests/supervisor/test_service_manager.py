"""What systemd hears of us."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from tests.processes import process_environment

PROGRAM = "from fastchat.supervisor.service_manager import READY, tell_service_manager; tell_service_manager(READY)"


def run(**variables):
    environment = process_environment({"NOTIFY_SOCKET": "", **variables})
    return subprocess.run([sys.executable, "-c", PROGRAM], env=environment, timeout=60, check=True)


def test_ready_is_told_on_the_socket_that_systemd_names(tmp_path):
    """One datagram, as sd_notify(3) writes it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.settimeout(10)
        listener.bind(str(tmp_path / "notify"))
        run(NOTIFY_SOCKET=str(tmp_path / "notify"))
        assert listener.recv(100) == b"READY=1"


@pytest.mark.skipif(sys.platform != "linux", reason="names without a file are Linux'")
def test_abstract_socket_is_understood():
    """Containers use them."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.settimeout(10)
        listener.bind("")
        name = listener.getsockname()
        run(NOTIFY_SOCKET="@" + name[1:].decode())
        assert listener.recv(100) == b"READY=1"


def test_nobody_to_tell_is_no_error():
    """Neither without the variable nor with a socket that is gone."""
    run()
    run(NOTIFY_SOCKET="/nonexistent/notify")
