"""The cluster token: the one secret that API server, controller and workers share.

On one machine it makes itself: the first process creates the file, exclusively and readable by its owner alone; whoever
loses that race reads it. Other machines get it by flag or environment.
"""

from __future__ import annotations

import hmac
import os
import secrets
from pathlib import Path

from fastchat.config import CLUSTER_TOKEN_VARIABLE, Environment, read_environment
from fastchat.errors import ConfigError

TOKEN_FILE_NAME = "cluster-token"  # noqa: S105 - the name of a file, not a secret
TOKEN_HINT = (
    f"the cluster token comes from --cluster-token-file, else {CLUSTER_TOKEN_VARIABLE}, else the file "
    f"`{TOKEN_FILE_NAME}` in the state directory ($FASTCHAT_STATE_DIR, else ~/.local/state/fastchat)"
)
"""Where the token lies, for messages to those who sent none or a wrong one."""
_MIN_CHARACTERS = 16
_MAX_CHARACTERS = 512


def load_cluster_token(explicit: str | None = None, *, environment: Environment | None = None) -> str:
    """The token: `explicit` > FASTCHAT_CLUSTER_TOKEN > the state directory's file, which is made when missing.

    Raises `ConfigError` for a token that is too short or a file that cannot be read or made.
    """
    environment = read_environment() if environment is None else environment
    if explicit is not None:
        return _checked(explicit, "the given cluster token")
    if environment.cluster_token is not None:
        return _checked(environment.cluster_token, CLUSTER_TOKEN_VARIABLE)
    path = environment.state_dir / TOKEN_FILE_NAME
    try:
        return _create_or_read(path)
    except OSError as error:
        raise ConfigError(
            f"cannot keep the cluster token in {path}: {error.strerror}; set FASTCHAT_STATE_DIR to one of yours."
        ) from error


def read_token_file(path: Path) -> str:
    """The token in a file of the operator's. Raises `ConfigError`."""
    try:
        text = path.read_text(encoding="ascii")
    except OSError as error:
        raise ConfigError(f"cannot read the cluster token from {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the cluster token in {path} is not plain ASCII text.") from error
    return _checked(text, str(path))


def is_cluster_token(token: str, bearer: str) -> bool:
    """Whether `bearer` is `token`, in constant time."""
    return hmac.compare_digest(token.encode(), bearer.encode("utf-8", "surrogatepass"))


def _create_or_read(path: Path) -> str:
    """Write the token beside its place and link it there: a file of that name is always whole, and made once."""
    if path.exists():
        return read_token_file(path)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_urlsafe(32) + "\n")
        os.link(draft, path)
    except FileExistsError:
        pass  # another process was first; its token is the cluster's
    finally:
        draft.unlink()
    return read_token_file(path)


def _checked(text: str, source: str) -> str:
    token = text.strip()
    if not _MIN_CHARACTERS <= len(token) <= _MAX_CHARACTERS or not token.isascii() or not token.isprintable():
        raise ConfigError(
            f"{source} is no usable token: it needs {_MIN_CHARACTERS} to {_MAX_CHARACTERS} plain characters; "
            "make one with `python3 -c 'import secrets; print(secrets.token_urlsafe(32))'`."
        )
    if " " in token:
        raise ConfigError(f"{source} holds more than one word; a token has no spaces.")
    return token
