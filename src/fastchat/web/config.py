"""The page's configuration: one frozen value, built from flags by its command or directly by a test."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fastchat.config import parse_url
from fastchat.errors import ConfigError

ModelListMode = Literal["reload", "once"]
MAX_AUTH_FILE_BYTES = 2**20


class Accounts:
    """Who may use the page: names and digests of passwords."""

    def __init__(self, passwords: Mapping[str, str]) -> None:
        self._digests = {_digest(name): _digest(password) for name, password in passwords.items()}

    def __repr__(self) -> str:
        return f"<Accounts {len(self._digests)}>"

    def are_right(self, name: str, password: str) -> bool:
        """Whether this is a name and its password. Takes the same time for a wrong name and a wrong password."""
        wanted_name, wanted_password = _digest(name), _digest(password)
        is_right = False
        for known_name, known_password in self._digests.items():  # all of them, always
            is_name = hmac.compare_digest(known_name, wanted_name)
            is_password = hmac.compare_digest(known_password, wanted_password)
            is_right |= is_name and is_password
        return is_right


@dataclass(frozen=True, slots=True)
class PageConfig:
    """What the page is made of. `expected_models` are being loaded and will be served soon.

    A browser may call it by localhost, an address and the names in `allowed_hosts` (None: by any).
    """

    api_url: str
    api_key: str | None = field(default=None, repr=False)
    accounts: Accounts | None = None
    allowed_hosts: tuple[str, ...] | None = None
    root_path: str = ""
    max_answers: int | None = None
    model_list_mode: ModelListMode = "reload"
    expected_models: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_answers is not None and self.max_answers < 1:
            raise ConfigError(f"--concurrency-count {self.max_answers} would answer nobody; give 1 or more.")
        parse_root_path(self.root_path)


def parse_root_path(text: str) -> str:
    """The path below which a proxy shows the page, or the whole URL, without a slash at its end. Empty for none."""
    if text.startswith(("http://", "https://")):
        return parse_url(text)
    if text and not text.startswith("/"):
        raise ConfigError(f"{text!r} is no path of --gradio-root-path; write it like /chat.")
    return text.rstrip("/")


def read_accounts(path: Path) -> Accounts:
    """The accounts of a FastChat file: `name:password` entries, on lines of their own or separated by commas."""
    try:
        if path.stat().st_size > MAX_AUTH_FILE_BYTES:
            raise ConfigError(f"{path} is larger than {MAX_AUTH_FILE_BYTES} bytes; is it the file with the passwords?")
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--gradio-auth-path {path} cannot be read: {error}.") from error
    passwords: dict[str, str] = {}
    for entry in text.replace("\n", ",").split(","):
        name, separator, password = entry.strip().partition(":")
        if not entry.strip():
            continue
        if not separator or not name or not password:
            raise ConfigError(f"{path}: an entry is not name:password; give one on each line, such as alice:secret.")
        if passwords.setdefault(name, password) != password:
            raise ConfigError(f"{path}: {name!r} has two passwords; keep one.")
    if not passwords:
        raise ConfigError(f"{path} names nobody; write lines such as alice:secret.")
    return Accounts(passwords)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
