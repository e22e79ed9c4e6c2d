"""The API server's configuration: one frozen value, built from flags by its command or directly by a test."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fastchat.config import dial_url, parse_url


@dataclass(frozen=True, slots=True)
class CorsConfig:
    """Which web pages of other origins may call the API from a browser. The default: none."""

    allow_credentials: bool = False
    allowed_origins: tuple[str, ...] = ()
    allowed_methods: tuple[str, ...] = ("*",)
    allowed_headers: tuple[str, ...] = ("*",)


@dataclass(frozen=True, slots=True)
class ApiServerConfig:
    """What an API server needs to know.

    With no `api_keys` and none in the store at `key_store_path`, everybody who reaches it may use it, by
    the names in `allowed_hosts` (None: by any). `page_key` is that of the page that was started with it.
    `expected_models` are being loaded: they are unavailable, not unknown.
    """

    cluster_token: str = field(repr=False)
    controller_address: str = "http://localhost:21001"
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    page_key: str | None = field(default=None, repr=False)
    key_store_path: Path | None = None
    expected_models: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] | None = None
    cors: CorsConfig = CorsConfig()

    def __post_init__(self) -> None:
        object.__setattr__(self, "controller_address", dial_url(parse_url(self.controller_address)))
