"""A key/value cache in blocks of rows: sequences take blocks as they grow and can share them.

Memory is allocated in segments as needed, up to a limit in bytes, and nothing is copied when the cache grows. A
sequence's rows are in the blocks of its `BlockTable`; adjacent blocks form a run, which reads as one tensor, so that a
single sequence needs no gather. Source: Kwon et al. 2023 (PagedAttention).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from llava_fast.errors import CacheFullError
from llava_fast.models.paged_rows import PassRows, to_device
from llava_fast.models.step_index import StepIndex
from llava_fast.ops import cached_rows
from llava_fast.ops.paging import block_addresses, run_views

BLOCK_ROWS = 32
SMALLEST_SEGMENT, LARGEST_SEGMENT = 1 << 20, 256 << 20  # bytes: between them, segments double the cache


LEAST_WIDTH = 32  # blocks of a sequence in Pages


class Keeper(Protocol):
    """May keep blocks that no table uses any more (generation.prefix_cache)."""

    def keeps(self, block: int) -> bool:
        """Whether to keep this block, which no table uses any more."""

    def give_back(self, count: int) -> list[int]:
        """Stop keeping up to `count` blocks that no table uses; returns them."""


class Pages(NamedTuple):
    """The block tables of decoding sequences on the device, as arguments of ops.paged_attention: `addresses` int64
    [blocks, 2], `table` int32 [n, width], `before` int32 [n].
    """

    addresses: Tensor
    table: Tensor
    before: Tensor


class PagedCache:
    """Blocks of keys and values of every layer; a segment is [layers, 2, K, blocks, block rows, D].

    max_bytes   limit of all segments together (None: half of the device's memory that is free at creation).
    keep_bytes  the size up to which the cache grows before it reclaims blocks from its `keeper`.
    codes       None: rows are stored in `dtype`. "int8": in 8 bits with a scale each (ops.cached_rows), and read in
                `dtype`; raises ValueError unless head_dim is a multiple of 8.
    first_layer the number of its first layer. A decoder whose layers are on several devices has a cache on each:
                `parts` of the first of them (itself and the `join`ed ones), which alone knows who uses which block.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        max_bytes: int | None = None,
        keep_bytes: int = 0,
        block_rows: int = BLOCK_ROWS,
        codes: str | None = None,
        first_layer: int = 0,
    ) -> None:
        if codes not in (None, "int8"):
            raise ValueError(f"codes is {codes!r}: use 'int8' or None")
        if codes and head_dim % cached_rows.MULTIPLE:
            raise ValueError(f"heads of {head_dim} elements are not cached in 8 bits: a multiple of 8 is needed")
        self.first_layer = first_layer
        self.parts: list[PagedCache] = [self]
        self.codes = codes
        self.form = (layers, kv_heads, head_dim, dtype, device, codes)
        self.shape = (layers, 2, kv_heads, block_rows, head_dim + (cached_rows.SCALE_BYTES if codes else 0))
        self.block_rows = block_rows
        self.dtype, self.device = dtype, device
        self.stored_dtype = torch.int8 if codes else dtype
        self.block_bytes = torch.Size(self.shape).numel() * self.stored_dtype.itemsize
        self.max_bytes = max_bytes
        self.keep_bytes = keep_bytes
        self.max_blocks = self._bound()
        self.keep_blocks = keep_bytes // self.block_bytes
        self.keeper: Keeper | None = None
        self.segments: list[Tensor] = []
        self.segment_starts: set[int] = set()
        self.users: list[int] = []  # how many tables use each block
        self._is_free = bytearray()
        self.free_blocks = 0
        self.used_blocks = 0  # by tables; the keeper keeps the rest
        self._step: tuple[tuple, dict[int | None, StepIndex]] | None = None
        self._addresses: Tensor | None = None
        self._addressed = 0  # blocks whose addresses it holds

    def join(self, others: Sequence[PagedCache]) -> None:
        """Let these empty caches, of the layers that follow, hold the same blocks as this one."""
        self.parts = [self, *others]
        for other in others:
            other.segment_starts = self.segment_starts
        self.max_blocks, self.keep_blocks = self._bound(), self.keep_bytes // self.bytes_of_all

    @property
    def bytes_of_all(self) -> int:
        """Bytes of a block, of all layers."""
        return sum(part.block_bytes for part in self.parts)

    def part_of(self, layer: int) -> PagedCache:
        """The part that holds this layer's rows."""
        return [part for part in self.parts if part.first_layer <= layer][-1]

    def _bound(self, held: int = 0) -> int:
        """max_blocks, with `held` blocks in segments already."""
        if self.max_bytes is not None:
            return max(1, self.max_bytes // self.bytes_of_all)
        rooms = [(free_memory(part.device) + held * part.block_bytes) // 2 // part.block_bytes for part in self.parts]
        return max(1, min(rooms))

    def reopen(self, kept_bytes: int) -> None:
        """Prepare a cache whose blocks are all free for other sequences: memory beyond `kept_bytes` is freed, and the
        limit is computed again from the memory that is free now. Raises ValueError while a block is used or kept.
        """
        if self.free_blocks != self.blocks:
            raise ValueError(f"{self.blocks - self.free_blocks} blocks of the cache are in use")
        if self.blocks * self.bytes_of_all > kept_bytes:
            for part in self.parts:
                part.segments = []
            self.segment_starts.clear()
            self.users, self._is_free, self.free_blocks, self._addressed = [], bytearray(), 0, 0
        self.max_blocks = max(self._bound(self.blocks), self.blocks)
        for part in self.parts:
            part._step = None

    @property
    def blocks(self) -> int:
        """Blocks with allocated memory."""
        return len(self._is_free)

    @property
    def available_blocks(self) -> int:
        """Blocks that could be allocated if the cache grew to its limit and the keeper gave everything back."""
        return self.max_blocks - self.used_blocks

    def blocks_for(self, rows: int) -> int:
        return -(-rows // self.block_rows)

    def allocate(self, count: int, after: int = -1, expected: int = 0) -> list[int]:
        """`count` blocks, zeroed, if possible contiguous and right after block `after`. If the cache has to grow, it
        does so for `expected` blocks at once. Raises CacheFullError, having allocated none.
        """
        self._make_room(count, expected)
        taken: list[int] = []
        at = after + 1
        while len(taken) < count and at < self.blocks and self._is_free[at] and after >= 0:
            taken.append(at)
            self._is_free[at] = 0
            at += 1
        left = count - len(taken)
        start = self._is_free.find(b"\1" * left) if left else 0
        for _ in range(left):
            start = self._is_free.find(1, max(start, 0))
            taken.append(start)
            self._is_free[start] = 0
        self.free_blocks -= count
        for block in taken:
            self.use(block)
        # Zero them: masked attention still reads rows that were never written, and a NaN there would spread.
        for part in self.parts:
            for rows in run_views(part.segments, runs_of(taken, self.segment_starts)):
                rows.zero_()
        return taken

    def _make_room(self, count: int, expected: int) -> None:
        short = count - self.free_blocks
        if short <= 0:
            return
        room = self.max_blocks - self.blocks
        if self.keeper is not None and self.blocks + short > min(self.keep_blocks, self.max_blocks):
            for block in self.keeper.give_back(short):
                self._free(block)
            short = count - self.free_blocks
        if short > room:
            raise CacheFullError(f"{count} blocks are needed, {self.free_blocks} are free and {room} can be added")
        if short > 0:
            least, most = SMALLEST_SEGMENT // self.bytes_of_all, LARGEST_SEGMENT // self.bytes_of_all
            size = max(short, expected - self.free_blocks, min(max(self.blocks, least), most))
            self._grow(min(size, room))

    def _grow(self, count: int) -> None:
        for part in self.parts:
            shape = (*part.shape[:3], count, *part.shape[3:])
            with torch.inference_mode(False):  # so that it can be written in any mode
                part.segments.append(torch.empty(shape, dtype=self.stored_dtype, device=part.device))
        self.segment_starts.add(self.blocks)
        self.users += [0] * count
        self._is_free += b"\1" * count
        self.free_blocks += count

    def use(self, block: int) -> None:
        """One table more uses this block."""
        self.used_blocks += not self.users[block]
        self.users[block] += 1

    def release(self, block: int) -> None:
        """One table less uses this block."""
        self.users[block] -= 1
        if not self.users[block]:
            self.used_blocks -= 1
            if self.keeper is None or not self.keeper.keeps(block):
                self._free(block)

    def _free(self, block: int) -> None:
        self._is_free[block] = 1
        self.free_blocks += 1

    def copy(self, source: int, target: int) -> None:
        """Copy all rows of one block to another."""
        for part in self.parts:
            (rows,) = run_views(part.segments, (source, 1))
            (place,) = run_views(part.segments, (target, 1))
            place.copy_(rows)

    # ------------------------------------------------------------ what attention calls

    @property
    def addresses(self) -> Tensor:
        """int64 [max_blocks, 2] on the device (see ops.paged_attention): the same memory however the cache grows, until
        it is reopened with a wider bound."""
        with torch.inference_mode(False), torch.no_grad():
            if self._addresses is None or len(self._addresses) < self.max_blocks:
                self._addresses = torch.zeros(self.max_blocks, 2, dtype=torch.int64, device=self.device)
                self._addressed = 0
            if self._addressed < self.blocks:
                self._addresses[: self.blocks].copy_(block_addresses(self.segments))
                self._addressed = self.blocks
        return self._addresses

    def pages(self, tables: Sequence[BlockTable], before: Sequence[int]) -> Pages:
        """The rows of these sequences, each with room for one more; one transfer to the device."""
        count, width = len(tables), table_width(tables)
        numbers = list(before)
        for table in tables:
            numbers += table.blocks + [0] * (width - len(table.blocks))
        flat = torch.tensor(numbers, dtype=torch.int32, device=self.device)
        return Pages(self.addresses, flat[count:].view(count, width), flat[:count])

    def rows_of_pass(self, tables: Sequence[BlockTable], before: Sequence[int], lengths: Sequence[int]) -> PassRows:
        """Where a prefill pass of `lengths` rows after the first `before` of each table writes and reads."""
        for table, at, rows in zip(tables, before, lengths, strict=True):
            table.require(at + rows)
        blocks, first = [table.blocks for table in tables], sorted(self.segment_starts)
        return PassRows(blocks, before, lengths, self.block_rows, first, lambda array: to_device(array, self.device))

    def append_pass(self, layer: int, rows: PassRows, key_RKD: Tensor, value_RKD: Tensor) -> tuple[Tensor, Tensor]:
        """Store a prefill pass's new rows; returns all rows of its sequences end to end, [T, K, D]."""
        of_layer = [segment[layer - self.first_layer] for segment in self.segments]
        keys, values = rows.store(of_layer, self._stored(key_RKD), self._stored(value_RKD))
        return self._read(keys), self._read(values)

    def append(self, layer: int, table: BlockTable, before: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store [K, rows, D] after the first `before` rows of a table; returns all its rows, [K, before+rows, D]."""
        keys, values = self._append(layer, table, before, self._stored(key), self._stored(value))
        return self._read(keys), self._read(values)

    def _stored(self, rows: Tensor) -> Tensor:
        return cached_rows.quantise_rows(rows) if self.codes else rows

    def _read(self, stored: Tensor) -> Tensor:
        return cached_rows.dequantise_rows(stored, self.dtype) if self.codes else stored

    def _append(self, layer: int, table: BlockTable, before: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        after = before + key.shape[1]
        table.require(after)
        layer -= self.first_layer
        views = table.views(self)
        if len(views) == 1:  # the usual case: worth a fast path, since a prefill runs this per sequence and layer
            both = views[0][layer].narrow(2, 0, after)
            keys, values = both[0], both[1]
            keys.narrow(1, before, after - before).copy_(key)
            values.narrow(1, before, after - before).copy_(value)
            return keys, values
        start = 0
        for view in views:
            end = start + view.shape[3]
            first, last = max(before, start), min(after, end)
            if first < last:
                view[layer, 0, :, first - start : last - start] = key[:, first - before : last - before]
                view[layer, 1, :, first - start : last - start] = value[:, first - before : last - before]
            start = end
        both = torch.cat([view[layer] for view in views], 2)
        return both[0, :, :after], both[1, :, :after]

    def append_one_each(
        self, layer: int, tables: Sequence[BlockTable], before: tuple[int, ...], key: Tensor, value: Tensor, window
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store one row per table, [n, K, D]; returns their keys and values [n, K, rows, D] and a mask [n, 1, 1, rows]
        of the valid rows, or None if all are."""
        if len(tables) == 1:
            keys, values = self.append(layer, tables[0], before[0], key[0, :, None], value[0, :, None])
            start = max(0, before[0] + 1 - window) if window else 0
            return keys[None, :, start:], values[None, :, start:], None
        key_of_step = before, [table.runs for table in tables]
        if self._step is None or self._step[0] != key_of_step:
            self._step = (key_of_step, {})
        steps = self._step[1]
        if None not in steps:
            for table, at in zip(tables, before, strict=True):
                table.require(at + 1)
            steps[None] = StepIndex([table.blocks for table in tables], before, self.segments)
        if window not in steps:
            steps[window] = steps[None].with_window(window)
        layer -= self.first_layer
        keys, values, mask = steps[window].run(self.segments, layer, self._stored(key), self._stored(value))
        return self._read(keys), self._read(values), mask


class BlockTable:
    """One sequence's rows in the cache: `length` rows are valid, in `blocks` from first to last."""

    def __init__(self, cache: PagedCache) -> None:
        self.cache = cache
        self.blocks: list[int] = []
        self.runs: list[int] = []  # as ops.decoder_step takes them
        self.length = self.capacity = 0
        self._views: dict[int, tuple[tuple[bool, bool], list[Tensor]]] = {}  # by the first layer of a part

    def reserve(self, rows: int, expected: int = 0) -> None:
        """Allocate blocks for `rows` rows in total. `expected`: as for allocate. Raises CacheFullError."""
        if rows > self.capacity:
            short = self.cache.blocks_for(rows) - len(self.blocks)
            self._add(self.cache.allocate(short, self.blocks[-1] if self.blocks else -1, expected))

    def share(self, blocks: list[int], length: int) -> None:
        """Begin with the first `length` rows of blocks that others use or the keeper keeps; a last block that is not
        full is copied. Raises CacheFullError.
        """
        full = length // self.cache.block_rows
        for block in blocks[:full]:
            self.cache.use(block)
        self._add(blocks[:full])
        if length % self.cache.block_rows:
            source = blocks[full]
            self.cache.use(source)  # keep it while a block for the copy is allocated
            try:
                self.reserve(length)
                self.cache.copy(source, self.blocks[-1])
            finally:
                self.cache.release(source)
        self.length = length

    def release(self) -> None:
        """Free every block, the last first."""
        for block in reversed(self.blocks):
            self.cache.release(block)
        self.blocks, self.runs, self.length, self.capacity, self._views = [], [], 0, 0, {}

    def views(self, part: PagedCache) -> list[Tensor]:
        """The runs' rows in a part of the cache, [layers, 2, K, rows, D] each."""
        mode, found = (torch.is_grad_enabled(), torch.is_inference_mode_enabled()), self._views.get(part.first_layer)
        if found is None or found[0] != mode:  # a view may not be written in another mode
            found = self._views[part.first_layer] = mode, run_views(part.segments, self.runs)
        return found[1]

    def require(self, rows: int) -> None:
        if rows > self.capacity:
            raise ValueError(f"the table has blocks for {self.capacity} rows and {rows} are needed: reserve them first")

    def _add(self, blocks: list[int]) -> None:
        self.blocks += blocks
        self.capacity += len(blocks) * self.cache.block_rows
        self.runs = runs_of(blocks, self.cache.segment_starts, self.runs)
        self._views = {}


def table_width(tables: Sequence[BlockTable]) -> int:
    """Blocks a sequence in a table of Pages: a power of two, so that there are few widths."""
    return max(1 << (max(len(table.blocks) for table in tables) - 1).bit_length(), LEAST_WIDTH)


def runs_of(blocks: Sequence[int], segment_starts: set[int], runs: list[int] | None = None) -> list[int]:
    """A table's `runs` (first block, blocks, ...) with more blocks at its end."""
    runs = list(runs or ())
    for block in blocks:
        if runs and block == runs[-2] + runs[-1] and block not in segment_starts:
            runs[-1] += 1
        else:
            runs += (block, 1)
    return runs


def free_memory(device: torch.device) -> int:
    """Bytes free on the device; 8 GB if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            available = next(line for line in lines if line.startswith("MemAvailable"))
        return int(available.split()[1]) << 10
    except (OSError, StopIteration):
        return 8 << 30
