"""Which ports `fastchat serve` takes where any will do."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastchat.serve.launch import _choose_ports, create_serve_parser

HANDED_OUT = Path("/proc/sys/net/ipv4/ip_local_port_range")


@pytest.mark.skipif(not HANDED_OUT.exists(), reason="needs Linux' /proc")
def test_any_port_is_none_that_the_kernel_gives_to_others():
    """A process that died comes back on its port, which no connection may have taken meanwhile."""
    flags = ["--port", "0", "--controller-port", "0", "--worker-port", "0", "--web-port", "0"]
    ports = _choose_ports(create_serve_parser().parse_args(flags), 2)
    chosen = [ports.api, ports.controller, *ports.workers, ports.web]
    assert len(set(chosen)) == 5
    assert max(chosen) < int(HANDED_OUT.read_text().split()[0])
