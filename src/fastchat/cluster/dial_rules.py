"""Which addresses the controller lets into the table, and which no process of ours ever connects to.

A name counts by what it resolves to, in whatever form it is written (decimal, octal, an IPv4 address inside an IPv6
one), and once more when it is dialled: `GuardedResolver` drops what may never be reached.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from urllib.parse import urlsplit

from aiohttp import abc as aiohttp_abc

from fastchat.errors import ConfigError, InvalidRequestError, PermissionDeniedError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# Link-local (cloud metadata lives there), multicast, "this network", reserved; and the metadata services of three
# clouds that lie elsewhere: Amazon over IPv6, Alibaba, Azure.
_NEVER = tuple(
    map(
        ipaddress.ip_network,
        (
            *("169.254.0.0/16", "fe80::/10", "224.0.0.0/4", "ff00::/8", "0.0.0.0/8", "::/128", "240.0.0.0/4"),
            *("fd00:ec2::/32", "100.100.100.200/32", "168.63.129.16/32"),
        ),
    )
)
_USUAL = tuple(
    map(
        ipaddress.ip_network,
        ("127.0.0.0/8", "::1/128", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7"),
    )
)
"""Loopback and the networks that are nobody's on the internet (RFC 1918, 4193, 6598)."""
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_RESOLVE_LIMIT_S = 5.0
_MAX_LOOKUPS = 16


class DialRules:
    """The usual networks, and what an operator added: networks like 203.0.113.0/24, addresses, or host names."""

    def __init__(self, added: Iterable[str] = ()) -> None:
        self._threads = _resolver_threads()
        self._networks: list[Network] = list(_USUAL)
        self._names: set[str] = set()
        for each in added:
            network = _as_network(each)
            if network is not None:
                self._networks.append(network)
            else:
                self._names.add(each.lower())

    async def check(self, url: str) -> None:
        """Raise `PermissionDeniedError` for an address that no request may be sent to, and say which flag allows it.

        `InvalidRequestError` for a name that has no address.
        """
        host = (urlsplit(url).hostname or "").lower()
        for address in await self._addresses(host):
            if is_never_dialled(address):
                raise PermissionDeniedError(
                    f"{url} leads to {address}, which is never connected to: no worker lives there.",
                    code="address_not_allowed",
                )
            if host not in self._names and not any(address in network for network in self._networks):
                raise PermissionDeniedError(
                    f"{url} leads to {address}, which is outside this machine and private networks; start the "
                    f"controller with --allowed-workers {host} to allow it.",
                    code="address_not_allowed",
                )

    async def _addresses(self, host: str) -> list[Address]:
        look_up = partial(socket.getaddrinfo, host, None, type=socket.SOCK_STREAM)
        try:
            async with asyncio.timeout(_RESOLVE_LIMIT_S):
                found = await asyncio.get_running_loop().run_in_executor(self._threads, look_up)
        except (OSError, UnicodeError, TimeoutError) as error:
            raise InvalidRequestError(f"{host} has no address: {error or 'no answer in time'}.") from error
        return [_plain(str(each[4][0])) for each in found]


class GuardedResolver(aiohttp_abc.AbstractResolver):
    """Resolves as usual, without the addresses that are never dialled."""

    def __init__(self) -> None:
        self._threads = _resolver_threads()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[aiohttp_abc.ResolveResult]:
        """aiohttp's resolver interface."""
        try:
            found = _lookup(host, port, family, socket.AI_NUMERICHOST)
        except socket.gaierror:  # a name
            loop = asyncio.get_running_loop()
            found = await loop.run_in_executor(self._threads, _lookup, host, port, family, socket.AI_ADDRCONFIG)
        kept = [each for each in found if not is_never_dialled(_plain(each["host"]))]
        if not kept:
            raise OSError(None, f"{host} leads to an address that is never connected to")
        return kept

    async def close(self) -> None:
        """aiohttp's resolver interface."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def parse_allowed_workers(text: str) -> list[str]:
    """`203.0.113.0/24,api.example.org` as networks and names."""
    items = [item.strip() for item in text.split(",")]
    for item in items:
        if not item or "://" in item or ("/" in item and _as_network(item) is None) or " " in item:
            raise ConfigError(f"{item!r} is no network, address or host name; write it like 203.0.113.0/24.")
    return items


def is_never_dialled(address: Address) -> bool:
    """Whether no process of ours connects to it, whoever asks."""
    return any(address in network for network in _NEVER)


def _resolver_threads() -> ThreadPoolExecutor:
    """Where names wait: a name server that does not answer holds threads for long, and all other work of a process
    would wait behind it (large requests, usage records).
    """
    return ThreadPoolExecutor(_MAX_LOOKUPS, thread_name_prefix="resolver")


def _lookup(host: str, port: int, family: int, flags: int) -> list[aiohttp_abc.ResolveResult]:
    return [
        aiohttp_abc.ResolveResult(
            hostname=host, host=str(address[0]), port=port, family=kind, proto=protocol, flags=socket.AI_NUMERICHOST
        )
        for kind, _, protocol, _, address in socket.getaddrinfo(host, port, family, socket.SOCK_STREAM, flags=flags)
    ]


def _plain(text: str) -> Address:
    """An address without its scope, and the IPv4 address that an IPv6 one carries."""
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address in _NAT64:
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def _as_network(text: str) -> Network | None:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        return None
