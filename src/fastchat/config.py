"""Where settings come from: the environment, read in one place, and the small values that flags are made of.

Precedence everywhere: flag > environment > file > default. A value that cannot be obeyed is a `ConfigError`.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from fastchat.errors import ConfigError

STATE_DIR_VARIABLE = "FASTCHAT_STATE_DIR"
CONFIG_VARIABLE = "FASTCHAT_CONFIG"
CLUSTER_TOKEN_VARIABLE = "FASTCHAT_CLUSTER_TOKEN"  # noqa: S105 - the name of a variable, not a secret
PAGE_KEY_VARIABLE = "FASTCHAT_PAGE_KEY"
"""What `fastchat serve` tells its API server: the key of its page, which no client is given."""

_BYTES = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[kmgt]?i?b?)", re.IGNORECASE)
_UNIT_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_HOST_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9_])?")


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """The key and the certificate that a process serves HTTPS with."""

    keyfile: Path
    certfile: Path


@dataclass(frozen=True, slots=True)
class Environment:
    """What the environment says, None where it says nothing. Secrets stay out of `repr`."""

    state_dir: Path
    cluster_token: str | None = field(default=None, repr=False)
    page_key: str | None = field(default=None, repr=False)
    ssl_keyfile: Path | None = None
    ssl_certfile: Path | None = None

    def tls_files(self) -> TlsFiles:
        """The files of `--ssl`, from SSL_KEYFILE and SSL_CERTFILE. Raises `ConfigError` where one is missing."""
        if self.ssl_keyfile is None or self.ssl_certfile is None:
            raise ConfigError(
                "--ssl needs the environment variables SSL_KEYFILE and SSL_CERTFILE; set both to PEM files."
            )
        for name, path in (("SSL_KEYFILE", self.ssl_keyfile), ("SSL_CERTFILE", self.ssl_certfile)):
            if not path.is_file():
                raise ConfigError(f"{name} names {path}, which is not a file.")
        return TlsFiles(self.ssl_keyfile, self.ssl_certfile)


def read_environment(variables: Mapping[str, str] | None = None) -> Environment:
    """Read the variables that every process obeys; `variables` is `os.environ` where not given."""
    variables = os.environ if variables is None else variables
    keyfile, certfile = variables.get("SSL_KEYFILE"), variables.get("SSL_CERTFILE")
    return Environment(
        state_dir=_state_dir(variables),
        cluster_token=variables.get(CLUSTER_TOKEN_VARIABLE) or None,
        page_key=variables.get(PAGE_KEY_VARIABLE) or None,
        ssl_keyfile=Path(keyfile) if keyfile else None,
        ssl_certfile=Path(certfile) if certfile else None,
    )


def config_file(variables: Mapping[str, str] | None = None) -> Path:
    """Where the configuration of `fastchat serve` lies unless it is told otherwise: below XDG_CONFIG_HOME."""
    variables = os.environ if variables is None else variables
    return _xdg_folder(variables, "XDG_CONFIG_HOME", "~/.config") / "config.toml"


def expand_home(path: str | Path) -> Path:
    """`path` with `~` or `~name` in front as that user's folder; as it is where there is no such user."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - where there is no such user, that of `Path` raises


def parse_bytes(text: str) -> int:
    """`24GiB`, `512 MB` or a plain number, in bytes. GB is 10^9 bytes, GiB is 2^30 bytes."""
    match = _BYTES.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"{text!r} is not a size; write it like 24GiB, 512MB or 1000000.")
    unit = match["unit"].lower().removesuffix("b")
    base = 1024 if unit.endswith("i") else 1000
    letter = unit.removesuffix("i")
    if unit and not letter:
        raise ConfigError(f"{text!r} is not a size; write it like 24GiB, 512MB or 1000000.")
    return int(float(match["number"]) * base ** _UNIT_POWERS[letter])


def parse_port(text: str | int) -> int:
    """A TCP port; 0 means any free one."""
    try:
        port = int(text)
    except ValueError:
        raise ConfigError(f"{text!r} is not a port; give a number from 0 to 65535.") from None
    if not 0 <= port <= 65535:
        raise ConfigError(f"{port} is not a port; give a number from 0 to 65535.")
    return port


def parse_host(text: str) -> str:
    """A host name or address to listen on, without scheme and port."""
    host = text.strip().removeprefix("[").removesuffix("]")
    if not (is_ip_address(host) or _HOST_NAME.fullmatch(host)):
        raise ConfigError(f"{text!r} is not a host; give a name or an address alone, such as localhost or 0.0.0.0.")
    return host


def parse_url(text: str) -> str:
    """An `http(s)://host[:port][/path]` URL without the last slash, user, query or fragment."""
    try:
        parts = urlsplit(text.strip())
        is_valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, a broken IPv6 address
        is_valid = False
    if not is_valid or parts.username is not None or parts.query or parts.fragment or _has_control(text):
        example = "http://127.0.0.1:21001" if "://" in text or not text.isprintable() or not text else f"http://{text}"
        raise ConfigError(f"{text!r} is not an address; write it like {example}.")
    return f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/")


def internal_url(host: str, port: int, *, tls: bool = False) -> str:
    """The URL by which processes of this machine reach a listener on `host`.

    Without TLS the names of this machine become 127.0.0.1, so that neither a resolver nor a proxy variable comes
    between. With TLS the given name stays, because the certificate is made out to it.
    """
    if tls:
        return f"https://{_bracketed(host)}:{port}"
    if host in ("", "localhost", "0.0.0.0"):  # noqa: S104 - compared with, not bound
        host = "127.0.0.1"
    elif host == "::":
        host = "::1"
    return f"http://{_bracketed(host)}:{port}"


def reachable_url(host: str, port: int, *, tls: bool = False, peer_url: str | None = None) -> str:
    """The URL by which the process behind `peer_url` reaches a listener on `host`.

    For a listener on all addresses it is the one that this machine uses towards that process; its own loopback where
    that process is here, or where nothing is known.
    """
    peer = (urlsplit(peer_url).hostname if peer_url else None) or ""
    if host in ("", "0.0.0.0", "::") and peer and not is_loopback(peer):  # noqa: S104 - compared with, not bound
        host = _own_address_towards(peer) or host
    return internal_url(host, port, tls=tls)


def dial_url(url: str) -> str:
    """The URL to connect to for one that a person wrote: plain `http://localhost` becomes `http://127.0.0.1`."""
    parts = urlsplit(url)
    if parts.scheme != "http" or parts.hostname != "localhost":
        return url
    port = "" if parts.port is None else f":{parts.port}"
    return f"http://127.0.0.1{port}{parts.path}"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a listener on `host`."""
    return host == "localhost" or (is_ip_address(host) and ipaddress.ip_address(host).is_loopback)


def is_ip_address(host: str) -> bool:
    """Whether this is an address and no name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _state_dir(variables: Mapping[str, str]) -> Path:
    """The directory for what outlives a process: FASTCHAT_STATE_DIR, else `fastchat` below XDG_STATE_HOME."""
    own = variables.get(STATE_DIR_VARIABLE)
    if own:
        return expand_home(own).absolute()
    return _xdg_folder(variables, "XDG_STATE_HOME", "~/.local/state")


def _xdg_folder(variables: Mapping[str, str], name: str, default: str) -> Path:
    """Our folder below one of the specification's (freedesktop.org basedir-spec), which ignores a relative path."""
    base = variables.get(name, "")
    folder = Path(base) if base.startswith("/") else expand_home(default)
    if not folder.is_absolute():
        raise ConfigError(f"this user has no home folder: set HOME, or {name} to a whole path.")
    return folder / "fastchat"


def _own_address_towards(host: str) -> str | None:
    """The address of this machine that packets to `host` carry; nothing is sent to find out."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError:  # no such name, no route: the controller's answer to the registration will tell
        return None


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _has_control(text: str) -> bool:
    return any(character.isspace() or not character.isprintable() for character in text.strip())
