"""The blocks of the KV cache: who holds which, and which prefixes they contain. Bookkeeping only, torch-free.

A block is in exactly one of three places:

    held        reference count > 0; one or more sequences use it
    cached      reference count 0, content known by its hash: can be taken again, or evicted (oldest first)
    empty       reference count 0, content unknown

Hashes are chained, so a block's hash names the whole prefix up to its end (as vLLM's automatic prefix caching):

    hash(block i) = BLAKE2b(hash(block i - 1) + token ids of block i),   hash(block -1) = BLAKE2b(salt)
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

_DIGEST_BYTES = 16


def extend_block_hashes(hashes: list[bytes], token_ids: Sequence[int], block_size: int, salt: str) -> None:
    """Append to `hashes` one hash for each full block of `token_ids` that has none yet."""
    parent = hashes[-1] if hashes else hashlib.blake2b(salt.encode(), digest_size=_DIGEST_BYTES).digest()
    for start in range(len(hashes) * block_size, len(token_ids) - block_size + 1, block_size):
        content = array("q", token_ids[start : start + block_size]).tobytes()
        parent = hashlib.blake2b(parent + content, digest_size=_DIGEST_BYTES).digest()
        hashes.append(parent)


class BlockPool:
    """A fixed number of blocks, given out and taken back by number."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._reference_counts = [0] * num_blocks
        self._hash_of_block: list[bytes | None] = [None] * num_blocks
        self._block_of_hash: dict[bytes, int] = {}
        self._empty: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()

    def __repr__(self) -> str:
        held = self.num_blocks - self.num_free_blocks
        return f"<BlockPool held {held} cached {len(self._cached)} empty {len(self._empty)}>"

    @property
    def num_free_blocks(self) -> int:
        """Blocks that nobody holds, those with a cached prefix included."""
        return len(self._empty) + len(self._cached)

    def find_prefix(self, block_hashes: Iterable[bytes]) -> list[int]:
        """The blocks that hold the longest known prefix. Nothing is taken."""
        found = []
        for block_hash in block_hashes:
            block_id = self._block_of_hash.get(block_hash)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def num_free_among(self, block_ids: Iterable[int]) -> int:
        """How many of these blocks nobody holds: taking them uses up that many free blocks."""
        return sum(self._reference_counts[block_id] == 0 for block_id in block_ids)

    def take(self, block_ids: Iterable[int]) -> None:
        """Hold blocks whose prefix was found."""
        for block_id in block_ids:
            if self._reference_counts[block_id] == 0:
                del self._cached[block_id]
            self._reference_counts[block_id] += 1

    def allocate(self, after: int | None = None) -> int:
        """Hold an empty block, the neighbour of `after` if it is one; else the oldest cached prefix is evicted.

        The caller has checked `num_free_blocks`.
        """
        if after is not None and after + 1 in self._empty:
            block_id = after + 1
            del self._empty[block_id]
        elif self._empty:
            block_id, _ = self._empty.popitem(last=False)
        else:
            block_id, _ = self._cached.popitem(last=False)
            self._forget(block_id)
        self._reference_counts[block_id] = 1
        return block_id

    def publish(self, block_id: int, block_hash: bytes) -> None:
        """Say what a held, fully computed block contains, so that others may share it."""
        if self._hash_of_block[block_id] is None and block_hash not in self._block_of_hash:
            self._hash_of_block[block_id] = block_hash
            self._block_of_hash[block_hash] = block_id

    def unpublish(self, block_ids: Iterable[int]) -> None:
        """Let nobody find these held blocks any more: what they contain may be wrong."""
        for block_id in block_ids:
            if self._hash_of_block[block_id] is not None:
                self._forget(block_id)

    def release(self, block_ids: Sequence[int]) -> None:
        """Give blocks back. The end of a prefix is evicted before its beginning."""
        for block_id in reversed(block_ids):
            self._reference_counts[block_id] -= 1
            assert self._reference_counts[block_id] >= 0, f"block {block_id} was released twice"
            if self._reference_counts[block_id] == 0:
                place = self._empty if self._hash_of_block[block_id] is None else self._cached
                place[block_id] = None

    def _forget(self, block_id: int) -> None:
        block_hash = self._hash_of_block[block_id]
        assert block_hash is not None
        del self._block_of_hash[block_hash]
        self._hash_of_block[block_id] = None
