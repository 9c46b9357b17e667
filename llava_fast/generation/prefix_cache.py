"""Cached rows kept after their sequence has ended, for prompts with the same prefix.

A tree of blocks: a node holds a block's rows, which follow those of its ancestors, so a prompt matches up to the first
row that differs. Blocks are compared by the rows' keys (prompt.Part.keys), never by a hash of them. Sources: Kwon et
al. 2023 (sharing blocks), Zheng et al. 2024 (RadixAttention: the tree, evicted from its leaves).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

from llava_fast.models.paged_cache import PagedCache

MOST_COMPARED = 64  # newest blocks that are searched for the longest partial match


@dataclass(eq=False)
class _Node:
    key: tuple[int, ...] = ()
    block: int = -1
    parent: _Node | None = None
    children: dict[tuple[int, ...], _Node] = field(default_factory=dict)  # by their keys, the newest last


class PrefixCache:
    """Keeps blocks of a cache that no sequence uses any more; the cache reclaims them as needed, least recently used
    first. PagedCache's `keep_bytes` limits their memory.
    """

    def __init__(self, cache: PagedCache) -> None:
        self.cache = cache
        cache.keeper = self
        self._root = _Node()
        self._nodes: dict[int, _Node] = {}  # by block
        self._unused: OrderedDict[int, None] = OrderedDict()  # blocks without a user, and some that have one again

    def find(self, keys: list[int]) -> tuple[list[int], int]:
        """The longest cached prefix of these rows: its blocks and its length. The last block may hold further rows
        (BlockTable.share copies it).
        """
        node, blocks, rows = self._root, [], 0
        size = self.cache.block_rows
        while rows < len(keys):
            wanted = tuple(keys[rows : rows + size])
            best, most = node.children.get(wanted), len(wanted)
            if best is None:
                most = 0
                for child in islice(reversed(node.children.values()), MOST_COMPARED):
                    if child.key[0] == wanted[0] and (same := common_rows(child.key, wanted)) > most:
                        best, most = child, same
            if best is None:
                break
            blocks.append(best.block)
            rows += most
            if most < size:
                break
            node = best
        return blocks, rows

    def insert(self, keys: list[int], blocks: list[int], rows: int, running: bool) -> None:
        """Add the first `rows` rows of a sequence's blocks to the tree. A last block that is not full may grow and be
        inserted again. While its sequence is `running`, insertion stops at rows that another sequence has already
        inserted, so that a block in use is never below an unused one.
        """
        node, size = self._root, self.cache.block_rows
        for number, block in enumerate(blocks):
            key = tuple(keys[number * size : min((number + 1) * size, rows)])
            if not key:
                return
            child = node.children.get(key)
            if child is None:
                child = self._nodes.get(block)
                if child is not None and child.parent is node:  # it has grown
                    del node.children[child.key]
                    child.key = key
                else:
                    child = self._nodes[block] = _Node(key, block, node)
                node.children[key] = child
            elif running and child.block != block:
                return
            node = child

    def forget(self, blocks: list[int]) -> None:
        """Remove these blocks from the tree."""
        for block in blocks:
            self._unused.pop(block, None)
            if (node := self._nodes.pop(block, None)) is not None:
                assert node.parent is not None  # the root holds no block
                del node.parent.children[node.key]

    def keeps(self, block: int) -> bool:
        if block not in self._nodes:
            return False
        self._unused[block] = None
        self._unused.move_to_end(block)
        return True

    def give_back(self, count: int) -> list[int]:
        given: list[int] = []
        while self._unused and len(given) < count:
            # A table gives its last block back first, so the oldest has no children.
            block, _ = self._unused.popitem(last=False)
            if not self.cache.users[block]:
                given.append(block)
        self.forget(given)
        return given


def common_rows(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the common prefix of two lists of keys."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
