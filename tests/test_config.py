"""Laws of the small values that flags and variables are made of."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from fastchat.config import (
    Environment,
    config_file,
    dial_url,
    expand_home,
    internal_url,
    is_loopback,
    parse_bytes,
    parse_host,
    parse_port,
    parse_url,
    reachable_url,
    read_environment,
)
from fastchat.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("24GiB", 24 * 2**30), ("512 MB", 512 * 10**6), ("1.5g", 15 * 10**8), ("1KiB", 1024), ("7", 7), ("7B", 7)],
)
def test_sizes_are_read_as_written(text, num_bytes):
    """GB is decimal, GiB is binary."""
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1 PB", "1ib", "1e9", "24 GiB free"])
def test_what_is_no_size_is_refused(text):
    """With an example of what is."""
    with pytest.raises(ConfigError, match="24GiB"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["", "x", "-1", "65536", "80.0"])
def test_what_is_no_port_is_refused(text):
    """0 to 65535."""
    with pytest.raises(ConfigError, match="65535"):
        parse_port(text)


def test_hosts_are_names_or_addresses_alone():
    """No scheme, no port, no path."""
    for host in ("localhost", "0.0.0.0", "::1", "my-host.local", "192.168.1.7"):
        assert parse_host(host) == host
    assert parse_host("[::1]") == "::1"
    for text in ("", "http://localhost", "localhost:80", "a/b", "a b"):
        with pytest.raises(ConfigError):
            parse_host(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "localhost:21001",
        "ftp://h",
        "http://",
        "http://h:0",
        "http://h:99999",
        "http://u:p@h",
        "http://h/?a",
        "http://h\nx",
    ],
)
def test_what_is_no_address_is_refused(text):
    """A URL of ours has a scheme, a host, maybe a port and a path; nothing else."""
    with pytest.raises(ConfigError):
        parse_url(text)


def test_address_without_a_scheme_is_shown_with_one():
    """What most people leave out."""
    with pytest.raises(ConfigError, match=r"write it like http://localhost:8000\."):
        parse_url("localhost:8000")


def test_internal_urls_say_127_0_0_1():
    """Neither a resolver nor a proxy variable comes between; under TLS the certificate's name stays."""
    assert internal_url("localhost", 1) == "http://127.0.0.1:1"
    assert internal_url("0.0.0.0", 1) == "http://127.0.0.1:1"
    assert internal_url("::", 1) == "http://[::1]:1"
    assert internal_url("10.0.0.7", 1) == "http://10.0.0.7:1"
    assert internal_url("localhost", 1, tls=True) == "https://localhost:1"
    assert dial_url("http://localhost:21001/x") == "http://127.0.0.1:21001/x"
    assert dial_url("https://localhost:21001") == "https://localhost:21001"
    assert parse_url("http://localhost:21001/") == "http://localhost:21001"


def test_loopback_is_told_from_the_network():
    """For the warning about who can reach a listener."""
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.1.2.3", "::1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.7", "example.org")))


def test_state_directory_is_own_variable_then_xdg_then_home():
    """A relative XDG_STATE_HOME is ignored, as its specification says."""
    assert read_environment({"FASTCHAT_STATE_DIR": "/a", "XDG_STATE_HOME": "/b"}).state_dir == Path("/a")
    assert read_environment({"XDG_STATE_HOME": "/b"}).state_dir == Path("/b/fastchat")
    home = Path("~/.local/state/fastchat").expanduser()
    assert read_environment({"XDG_STATE_HOME": "b"}).state_dir == home
    assert read_environment({}).state_dir == home


def test_home_folder_that_nobody_has(monkeypatch):
    """A path that names it stays as it was written; without one for this user its variables are asked for."""
    assert expand_home("~nobody-here/models") == Path("~nobody-here/models")
    monkeypatch.setenv("HOME", "nowhere")
    with pytest.raises(ConfigError, match="HOME, or XDG_STATE_HOME"):
        read_environment({})


def test_secrets_stay_out_of_repr():
    """An environment may be logged."""
    assert "secret-value" not in repr(Environment(state_dir=Path("/a"), cluster_token="secret-value"))


def test_tls_needs_both_files(tmp_path):
    """Missing variables and missing files are one line that names the variable."""
    keyfile = tmp_path / "key.pem"
    keyfile.write_text("")
    with pytest.raises(ConfigError, match="SSL_CERTFILE"):
        read_environment({"SSL_KEYFILE": str(keyfile)}).tls_files()
    with pytest.raises(ConfigError, match="SSL_CERTFILE names"):
        read_environment({"SSL_KEYFILE": str(keyfile), "SSL_CERTFILE": str(tmp_path / "no")}).tls_files()
    files = read_environment({"SSL_KEYFILE": str(keyfile), "SSL_CERTFILE": str(keyfile)}).tls_files()
    assert files.keyfile == keyfile


def test_listener_on_all_addresses_is_reached_by_the_one_towards_the_peer():
    """Its own loopback for a peer that is here; the host as given where one was given."""
    assert reachable_url("0.0.0.0", 1, peer_url="http://localhost:2") == "http://127.0.0.1:1"
    assert reachable_url("0.0.0.0", 1) == "http://127.0.0.1:1"
    assert reachable_url("10.0.0.5", 1, peer_url="http://10.0.0.9:2") == "http://10.0.0.5:1"
    assert reachable_url("10.0.0.5", 1, tls=True) == "https://10.0.0.5:1"
    assert reachable_url("0.0.0.0", 1, peer_url="http://no-such-host.invalid:2") == "http://127.0.0.1:1"
    own = own_address()
    if own is not None:
        assert reachable_url("0.0.0.0", 1, peer_url=f"http://{own}:2") == f"http://{own}:1"


def own_address() -> str | None:
    """An address of this machine that is not loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return None
        return str(probe.getsockname()[0])


def test_configuration_lies_below_the_specification_s_folder(monkeypatch):
    """A relative one is ignored."""
    assert config_file({"XDG_CONFIG_HOME": "/c"}) == Path("/c/fastchat/config.toml")
    monkeypatch.setenv("HOME", "/home/user")
    for variables in ({}, {"XDG_CONFIG_HOME": "relative"}):
        assert config_file(variables) == Path("/home/user/.config/fastchat/config.toml")
