"""By which names a server may be called, and whose web page calls it: what a browser says in `Host` and `Origin`."""

from __future__ import annotations

from collections.abc import Collection
from urllib.parse import urlsplit

from fastchat.config import is_ip_address

_USUAL_PORTS = {"http": 80, "https": 443}


class HostNames:
    """The names that a server answers to: localhost, addresses and `allowed`, or any at all where that is None.

    A name that somebody else points at this machine, and that makes his page "of the same origin", is none of them.
    """

    def __init__(self, allowed: Collection[str] | None) -> None:
        self._allowed = None if allowed is None else frozenset(name.lower().removesuffix(".") for name in allowed)

    def include(self, host: str) -> bool:
        """Whether the server answers to this value of `Host`."""
        if self._allowed is None:
            return True
        name = host_name(host)
        return name == "localhost" or name.endswith(".localhost") or name in self._allowed or is_ip_address(name)

    def name_page(self, origin: str, host: str) -> bool:
        """Whether this origin has one of the allowed names while the server is called by another one.

        So it is behind a proxy that writes a `Host` of its own. Where `host` has the name too, its port counts.
        """
        name = _hostname(origin)
        return self._allowed is not None and name in self._allowed and name != host_name(host)


def host_name(host: str) -> str:
    """The name in `name:port` or `[::1]:port`, in lower case and without the root's dot; empty where there is none."""
    return _hostname(f"//{host}")


def is_own_origin(origin: str, host: str) -> bool:
    """Whether a page of this origin came from the server that is called as `host`.

    Where TLS ends at a proxy the scheme is another one, and a port may be written out that a browser leaves out.
    """
    try:
        page, called = urlsplit(origin), urlsplit(f"//{host}")
        usual_port = _USUAL_PORTS[page.scheme]
        is_same_port = (page.port or usual_port) == (called.port or usual_port)
    except (KeyError, ValueError):  # an origin of no web page, such as `null`
        return False
    return bool(page.hostname) and is_same_port and page.hostname == called.hostname


def _hostname(url: str) -> str:
    try:
        return (urlsplit(url).hostname or "").removesuffix(".")
    except ValueError:
        return ""
