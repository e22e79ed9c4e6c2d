"""Laws of the addresses that may come into the table, in whatever form they are written."""

from __future__ import annotations

import asyncio
import socket
import threading

import pytest

from fastchat.cluster.dial_rules import DialRules, GuardedResolver, parse_allowed_workers
from fastchat.errors import ConfigError, InvalidRequestError, PermissionDeniedError

NEVER = (
    *("169.254.169.254", "[fe80::1]", "[fd00:ec2::254]", "100.100.100.200", "168.63.129.16", "224.0.0.1", "0.0.0.0"),
    *("[::]", "255.255.255.255", "2852039166", "0xa9fea9fe", "0251.0376.0251.0376", "[::ffff:169.254.169.254]"),
    *("[64:ff9b::a9fe:a9fe]", "169.254.43518"),
)


def check(rules, host):
    asyncio.run(rules.check(f"http://{host}:21002/v1"))


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "[::1]", "10.1.2.3", "192.168.1.7", "[fd12::1]", "2130706433"]
)
def test_this_machine_and_private_networks_are_usual(host):
    """Workers live there."""
    check(DialRules(), host)


@pytest.mark.parametrize("host", NEVER)
def test_metadata_services_are_never_dialled(host):
    """Link-local, multicast and nobody's addresses are refused even where the operator allows everything."""
    for rules in (DialRules(), DialRules(["0.0.0.0/0", "::/0", host.strip("[]")])):
        with pytest.raises(PermissionDeniedError, match="never connected to"):
            check(rules, host)


def test_foreign_address_needs_the_operator_s_word():
    """And the refusal says which flag that is."""
    with pytest.raises(PermissionDeniedError, match=r"--allowed-workers 203\.0\.113\.7"):
        check(DialRules(), "203.0.113.7")
    check(DialRules(["203.0.113.0/24"]), "203.0.113.7")
    check(DialRules(["203.0.113.7"]), "203.0.113.7")
    with pytest.raises(PermissionDeniedError):
        check(DialRules(["203.0.113.0/24"]), "203.0.112.7")


def test_name_without_an_address_is_told():
    """As bad input."""
    with pytest.raises(InvalidRequestError, match="has no address"):
        check(DialRules(), "no-such-host.invalid")


def test_name_that_nobody_resolves_holds_up_no_other_work(monkeypatch):
    """However many workers say that they live there, usage records are written meanwhile, in a thread."""
    look_up, is_over = socket.getaddrinfo, threading.Event()

    def silent(host, *rest, **named):
        if host == "silent.example":
            is_over.wait(60)
            raise socket.gaierror(socket.EAI_AGAIN, "try again")
        return look_up(host, *rest, **named)

    monkeypatch.setattr(socket, "getaddrinfo", silent)

    async def run():
        rules = DialRules()
        checks = asyncio.gather(*(rules.check("http://silent.example:1") for _ in range(40)), return_exceptions=True)
        await asyncio.sleep(0)
        try:
            async with asyncio.timeout(30):
                assert await asyncio.to_thread(int) == 0
        finally:
            is_over.set()
        assert {type(each) for each in await checks} == {InvalidRequestError}

    asyncio.run(run())


def test_resolver_drops_what_is_never_dialled():
    """A name that moved after it was registered leads nowhere."""

    async def resolve(host):
        return await GuardedResolver().resolve(host, 80)

    assert asyncio.run(resolve("localhost"))
    with pytest.raises(OSError, match="never connected to"):
        asyncio.run(resolve("2852039166"))


@pytest.mark.parametrize("text", ["", "a,,b", "http://x", "10.0.0.0/99", "a b"])
def test_what_is_no_place_is_refused(text):
    """With an example of what is."""
    with pytest.raises(ConfigError, match=r"203\.0\.113\.0/24"):
        parse_allowed_workers(text)


def test_places_are_networks_addresses_and_names():
    """Comma separated."""
    assert parse_allowed_workers("203.0.113.0/24, api.example.org") == ["203.0.113.0/24", "api.example.org"]
