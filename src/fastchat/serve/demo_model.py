"""The tiny demo model in the package, for commands that were given no model."""

from __future__ import annotations

from pathlib import Path

import fastchat
from fastchat.errors import ConfigError

DEMO_MODEL = Path(fastchat.__file__).parent / "models" / "demo" / "chatglm2-demo"


def find_demo_model() -> Path:
    """Its folder. Raises `ConfigError` where the package came without it."""
    if not (DEMO_MODEL / "config.json").is_file():
        raise ConfigError(f"{DEMO_MODEL}: the demo model is not in this installation; give --model-path FOLDER.")
    return DEMO_MODEL
