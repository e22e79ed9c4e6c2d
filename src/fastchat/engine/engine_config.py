"""The sizes of one engine, and how many blocks a KV cache has. Torch-free, so that a plan is made by the same rules."""

from __future__ import annotations

from dataclasses import dataclass

from fastchat.errors import ConfigError

DEFAULT_MAX_BATCH_TOKENS = 512
DEFAULT_MAX_RUNNING = 256


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Sizes of one engine.

    `max_context` is the longest sequence in tokens, prompt and answer together; it shrinks to what `kv_cache_bytes`
    can hold. `block_size` None chooses by device. `max_batch_tokens` is the token budget of a step: larger computes
    prompts faster, smaller lets answers flow more evenly. `speculation` lets few sequences look ahead (`drafting.py`).
    """

    max_context: int
    kv_cache_bytes: int
    block_size: int | None = None
    max_batch_tokens: int = DEFAULT_MAX_BATCH_TOKENS
    max_running: int = DEFAULT_MAX_RUNNING
    prefix_caching: bool = True
    speculation: bool = True

    def __post_init__(self) -> None:
        for name in ("max_context", "kv_cache_bytes", "max_batch_tokens", "max_running"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")


def default_block_size(device_type: str) -> int:
    """Tokens in a block: CPU reads long runs, so its blocks are large."""
    return 16 if device_type == "cuda" else 128


def max_drafted_rows(device_type: str) -> int:
    """Rows of a decode step that cost what one costs: on a CPU a tile of the products, which read weights once for it.

    1 is no drafts: on a GPU, nothing was measured.
    """
    return 6 if device_type == "cpu" else 1


def max_logits_rows(device_type: str) -> int:
    """Rows whose logits are there at once. On a CPU few, since their memory is most of a step's; a GPU likes many."""
    return 64 if device_type == "cpu" else 256


def max_sampled_rows(device_type: str) -> int:
    """Rows of those that are sampled at once: each takes several times its logits."""
    return 16 if device_type == "cpu" else 256


def max_useful_blocks(max_context: int, max_running: int, block_size: int) -> int:
    """What all running sequences could use; more blocks would only keep old prefixes."""
    return max_running * -(-max_context // block_size)
