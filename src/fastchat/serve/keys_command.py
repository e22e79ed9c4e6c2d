"""`fastchat keys`: makes, lists and revokes API keys. Running API servers follow by themselves."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

from fastchat.config import read_environment
from fastchat.errors import ConfigError
from fastchat.ops.key_store import KEY_PREFIX, STORE_FILE_NAME, KeyStore, StoredKey
from fastchat.serve.arguments import create_parser, flag_type, run_command
from fastchat.serve.columns import table_lines

_MAX_NAME_CHARACTERS = 64
_DURATION = re.compile(r"(?P<number>[0-9]{1,6})(?P<unit>[mhdw])")
_UNITS = {"m": timedelta(minutes=1), "h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}
_HEADINGS = ("ID", "NAME", "MAY", "STATE", "CREATED", "EXPIRES", "LAST USED")


def create_keys_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = create_parser(
        "keys_command",
        "The API keys that clients send. As soon as there is one, the API servers of this machine ask for it.",
        epilog="Keys are kept as digests in the state directory ($FASTCHAT_STATE_DIR, else ~/.local/state/fastchat). "
        "What this changes holds in running API servers within a second.",
    )
    parser.prog = "fastchat keys"
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    create = actions.add_parser("create", help="make a key and print it, this once")
    create.add_argument("--name", type=flag_type(_name), metavar="TEXT", help="whom it is for (default: no name)")
    create.add_argument(
        "--expires",
        type=flag_type(_expiry),
        metavar="WHEN",
        help="how long it holds, like 90d, 12h or 30m, or until when, like 2030-01-31 (default: until it is revoked)",
    )
    create.add_argument(
        "--operator", action="store_true", help="it may also load, unload and pin models (default: it may not)"
    )
    listing = actions.add_parser("list", help="show all keys: ids, names, days of last use; never the keys")
    listing.add_argument("--json", action="store_true", help="write JSON, times in seconds since 1970")
    revoke = actions.add_parser("revoke", help="end keys for ever")
    revoke.add_argument("key_ids", nargs="+", metavar="ID", help="the key's id, as `fastchat keys list` shows it")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Do what is asked; returns the exit code."""
    arguments = create_keys_parser().parse_args(argv)
    store = KeyStore(_store_path())
    try:
        if arguments.action == "create":
            _create(store, arguments.name or "", arguments.expires, is_operator=arguments.operator)
        elif arguments.action == "list":
            sys.stdout.write(_as_json(store.all_keys()) if arguments.json else _as_table(store.all_keys()))
        else:
            _revoke(store, arguments.key_ids)
    finally:
        store.close()
    return 0


def _store_path() -> Path:
    return read_environment().state_dir / STORE_FILE_NAME


def _create(store: KeyStore, name: str, expires_at: int | None, *, is_operator: bool) -> None:
    """The key alone goes to stdout, so that a script can take it."""
    is_first = not store.all_keys()
    stored, key = store.create(name=name, created_at=int(time.time()), expires_at=expires_at, is_operator=is_operator)
    sys.stderr.write(f"{stored.key_id} is made; the key is shown this once and kept nowhere:\n")
    sys.stderr.flush()
    sys.stdout.write(key + "\n")
    sys.stdout.flush()
    if is_first:
        sys.stderr.write(
            "This is the first key: from now on the API servers of this machine refuse calls without one.\n"
        )


def _revoke(store: KeyStore, key_ids: Sequence[str]) -> None:
    known = {key.key_id for key in store.all_keys()}
    for key_id in key_ids:
        if key_id.startswith(KEY_PREFIX):
            raise ConfigError("that is a key and not its id; `fastchat keys list` shows the ids.")
        if key_id not in known:
            raise ConfigError(f"no key has the id {key_id!r}; `fastchat keys list` shows the ids.")
    for key_id in key_ids:
        store.revoke(key_id, now=int(time.time()))
        sys.stdout.write(f"{key_id} is revoked; running API servers refuse it within a second.\n")
    if not any(key.is_valid(time.time()) for key in store.all_keys()):
        sys.stdout.write("No valid key is left: nobody is let in until you make one.\n")


def _as_json(keys: Sequence[StoredKey]) -> str:
    rows = [
        {
            "id": key.key_id,
            "name": key.name,
            "is_operator": key.is_operator,
            "state": _state(key),
            "created_at": key.created_at,
            "expires_at": key.expires_at,
            "revoked_at": key.revoked_at,
            "last_used_on": key.last_used_on,
        }
        for key in keys
    ]
    return json.dumps(rows, ensure_ascii=False, indent=2) + "\n"


def _as_table(keys: Sequence[StoredKey]) -> str:
    if not keys:
        return "There is no key; make one with `fastchat keys create`.\n"
    return "".join(f"{line}\n" for line in table_lines([_HEADINGS, *map(_row, keys)]))


def _row(key: StoredKey) -> tuple[str, ...]:
    expires = "never" if key.expires_at is None else _moment(key.expires_at)
    may = "operate" if key.is_operator else "ask"
    return key.key_id, key.name or "-", may, _state(key), _moment(key.created_at), expires, key.last_used_on or "never"


def _state(key: StoredKey) -> str:
    if key.revoked_at is not None:
        return "revoked"
    return "valid" if key.is_valid(time.time()) else "expired"


def _moment(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%MZ")


def _name(text: str) -> str:
    name = text.strip()
    if not name or len(name) > _MAX_NAME_CHARACTERS or not name.isprintable():
        raise ConfigError(f"a name has 1 to {_MAX_NAME_CHARACTERS} printable characters.")
    if name.startswith(KEY_PREFIX):
        raise ConfigError("that looks like a key; a name is shown in lists and is no secret.")
    return name


def _expiry(text: str) -> int:
    """`90d` from now, or a day in UTC: the second at which the key stops to hold."""
    now = datetime.now(UTC)
    match = _DURATION.fullmatch(text.strip())
    try:
        if match is not None:
            moment = now + int(match["number"]) * _UNITS[match["unit"]]
        else:
            day = date.fromisoformat(text.strip())
            moment = datetime(day.year, day.month, day.day, tzinfo=UTC)
    except (ValueError, OverflowError):
        raise ConfigError(f"{text!r} is no time; write it like 90d, 12h, 30m or 2030-01-31.") from None
    if moment <= now:
        raise ConfigError(f"{text} is over already; give a time to come.")
    return int(moment.timestamp())


if __name__ == "__main__":
    run_command(main)
