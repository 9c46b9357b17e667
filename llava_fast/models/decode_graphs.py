"""Decoding steps replayed from CUDA graphs, one for each bucket of sequences: a step is one copy and one launch.

Between replays only the contents of one static tensor change: each sequence's rows cached before, its blocks, and the
values that the graph's `Ending` names (its token at least). Each step fills new pinned memory, which PyTorch's
allocator reuses only after the copy from it, so a step can be launched while earlier ones still run.
A graph holds addresses, so everything that it reads must stay in place: all graphs are dropped once a module, a hook or
a weight of the decoder has changed. The cache may grow: its addresses are in a tensor of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from llava_fast.models import cuda_graphs, fused
from llava_fast.models.blocks.watch import Watch
from llava_fast.models.decoders.stack import Decoder
from llava_fast.models.paged_cache import BlockTable, PagedCache, Pages, table_width
from llava_fast.ops import backend

MOST_SEQUENCES = 256  # above this, launch overhead is negligible
MOST_GRAPHS = 64


class Column(NamedTuple):
    """A value of each sequence in the static tensor: its numpy dtype, and its value for padding sequences."""

    dtype: str
    filler: float


Columns = Mapping[str, Column]


class Ending(Protocol):
    """What a captured step does around the decoder. Hashable: graphs are found by it."""

    @property
    def columns(self) -> Columns:
        """Values of each sequence that it reads, `token` or its like among them."""

    def tokens(self, given: dict[str, Tensor]) -> Tensor:
        """The tokens to run, int [n], from the columns [n]."""

    def result(self, token: Tensor, logits: Tensor, given: dict[str, Tensor]) -> Tensor:
        """What the step returns, [n, ...], from the tokens run and the logits [n, vocabulary]."""


class _Logits:
    """Logits, for the host to choose from."""

    columns: ClassVar[Columns] = {"token": Column("int32", 0)}

    def tokens(self, given: dict[str, Tensor]) -> Tensor:
        return given["token"]

    def result(self, token: Tensor, logits: Tensor, given: dict[str, Tensor]) -> Tensor:
        return logits


LOGITS = _Logits()


class _Layout:
    """The layout of a static tensor of bytes: the columns, widest first, then rows before and blocks."""

    def __init__(self, columns: Columns, size: int, width: int) -> None:
        every = {**columns, "before": Column("int32", -1)}
        ordered = sorted(every.items(), key=lambda item: -np.dtype(item[1].dtype).itemsize)
        self.columns = [(name, np.dtype(column.dtype), column.filler) for name, column in ordered]
        self.size, self.width = size, width
        self.bytes = sum(dtype.itemsize for _, dtype, _ in self.columns) * size + 4 * size * width

    def host(self, values: Mapping[str, Sequence[float]], tables: Sequence[BlockTable], pinned: bool) -> Tensor:
        """uint8 [bytes] on the host: `values` of the first sequences, fillers for the others."""
        numbers, start = np.zeros(self.bytes, np.uint8), 0
        for name, dtype, filler in self.columns:
            end = start + dtype.itemsize * self.size
            column, given = numbers[start:end].view(dtype), values.get(name, ())
            column[: len(given)], column[len(given) :] = given, filler
            start = end
        for row, table in zip(numbers[start:].view(np.int32).reshape(self.size, -1), tables, strict=False):
            row[: len(table.blocks)] = table.blocks
        flat = torch.from_numpy(numbers)
        return flat.pin_memory() if pinned else flat

    def views(self, flat: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """(each column [n], blocks int32 [n, width]) of such a tensor."""
        found, start = {}, 0
        for name, dtype, _ in self.columns:
            end = start + dtype.itemsize * self.size
            found[name] = flat[start:end].view(getattr(torch, dtype.name))
            start = end
        return found, flat[start:].view(torch.int32).view(self.size, self.width)


@dataclass
class _Captured:
    layout: _Layout
    device: Tensor  # uint8
    rope: tuple[Tensor, Tensor]  # kept alive: the graph reads it
    replay: Callable[[], None]
    out: Tensor


class DecodeGraphs:
    """`graphs(tokens, tables, before)` returns the decoder's logits for one more row of each sequence, from a graph
    captured for the bucket, or None if there is none; then run the modules. `launch` does the same with another ending.

    A bucket is a number of sequences and of blocks per sequence, each a power of two; graphs are captured when first
    needed. Of MOST_GRAPHS, the one used longest ago is dropped; they share one memory pool. Padding sequences write
    nothing. The result is a view that the next call overwrites.
    `unfit` says why there is no graph at all: dynamic RoPE, layers on several devices, a hooked module, or one that is
    neither this package's nor a plain one of PyTorch. `failed` says why a bucket has none with an ending, by (ending,
    *bucket): its paged_attention runs the reference, or its capture failed (logged). Neither is tried again until a
    module changes.
    """

    def __init__(self, decoder: Decoder, cache: PagedCache) -> None:
        self.decoder, self.cache = decoder, cache
        self.unfit: str | None = None
        self.graphs: cuda_graphs.Captures[_Captured] = cuda_graphs.Captures(MOST_GRAPHS)
        self._pool: cuda_graphs.Pool | None = None
        self._watch = Watch(decoder)
        self._met: set[tuple] = set()

    @property
    def failed(self) -> dict[Hashable, str]:
        return self.graphs.failed

    def __call__(self, tokens: Sequence[int], tables: Sequence[BlockTable], before: Sequence[int]) -> Tensor | None:
        bucket = self._bucket(tables, before)
        if bucket is not None and bucket not in self._met:
            self._met.add(bucket)  # the first step of a bucket runs the modules: there ops are proven (ops/selection)
            return None
        return self._run(bucket, LOGITS, {"token": tokens}, tables, before)

    def launch(
        self, ending: Ending, values: Mapping[str, Sequence[float]], tables: Sequence[BlockTable], before: Sequence[int]
    ) -> Tensor | None:
        """`ending`'s result for each sequence, given its columns; None also before a bucket's first step has run the
        modules."""
        bucket = self._bucket(tables, before)
        return self._run(bucket if bucket in self._met else None, ending, values, tables, before)

    def _bucket(self, tables: Sequence[BlockTable], before: Sequence[int]) -> tuple | None:
        """The key of a step's bucket, with blocks for the new rows; None if no graph can run it."""
        if not 0 < len(tables) <= MOST_SEQUENCES or nn.modules.module._has_any_global_hook():
            return None
        like = next(self.decoder.norm.parameters())
        if not fused.takes("paged_attention", like):
            return None
        self._follow_changes()
        if self.unfit is not None:
            return None
        for table, at in zip(tables, before, strict=True):
            table.reserve(at + 1)
        return 1 << (len(tables) - 1).bit_length(), table_width(tables), backend.requested(), like.dtype

    def _run(
        self,
        bucket: tuple | None,
        ending: Ending,
        values: Mapping[str, Sequence[float]],
        tables: Sequence[BlockTable],
        before: Sequence[int],
    ) -> Tensor | None:
        if bucket is None:
            return None
        # Not in inference mode, whose tensors (the static ones, were a graph captured in it) nothing else may write.
        with torch.inference_mode(False), torch.no_grad():
            self.cache.addresses  # noqa: B018 - those of new blocks are written in place
            found = self._captured((ending, *bucket))
            if found is None:
                return None
            host = found.layout.host({**values, "before": before}, tables, self._pins)
            found.device.copy_(host, non_blocking=True)
            found.replay()
        return found.out[: len(tables)]

    @property
    def _pins(self) -> bool:
        return self.cache.device.type == "cuda"

    def _follow_changes(self) -> None:
        """Drop all graphs if the modules or weights have changed since capture."""
        if not self._watch.changed(self.cache.addresses.data_ptr()):
            return
        self.graphs.clear()
        self._pool = None
        self.unfit = self._watch.unfit
        if self.decoder.rope.config.kind == "dynamic":
            self.unfit = "dynamic RoPE follows each sequence's length"
        elif self.decoder.layer_groups:
            self.unfit = "the decoder's layers are on several devices"

    def _captured(self, key: tuple) -> _Captured | None:
        ending, size, width, *_ = key
        then = "its modules run one by one" if ending is LOGITS else "the host chooses its tokens"
        what = f"a decoding step of {size} sequences"
        return self.graphs.get(key, lambda: self._prepared(ending, size, width), what, then)

    def _prepared(self, ending: Ending, size: int, width: int) -> _Captured:
        """Raises NoGraphError if the step runs paged_attention's reference."""
        decoder, cache, device = self.decoder, self.cache, self.cache.device
        layout = _Layout(ending.columns, size, width)
        static = layout.host({}, (), self._pins).to(device, copy=True)
        given, table = layout.views(static)
        rope = decoder.rope.reserve(width * cache.block_rows, device, cache.dtype)
        pages = Pages(cache.addresses, table, given["before"])

        def step() -> Tensor:
            token = ending.tokens(given)
            return ending.result(token, decoder.step(token, pages, cache), given)

        if not self.has_kernel(step):
            raise cuda_graphs.NoGraphError("paged_attention runs the reference, which a graph cannot hold")
        try:
            replay, out = self.capture(step)
        except BaseException:
            self._pool = None  # PyTorch refuses it from now on
            raise
        return _Captured(layout, static, rope, replay, out)

    def has_kernel(self, step: Callable[[], Tensor]) -> bool:
        """Whether paged_attention runs a kernel in `step`, which runs once: the reference waits for the device."""
        with backend.noted() as calls:
            step()
        return ("paged_attention", "reference") not in calls

    def capture(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """(a function that replays `step`, its output tensor)."""
        with torch.cuda.device(self.cache.device):
            self._pool = self._pool or cuda_graphs.Pool()
            graph, out = cuda_graphs.capture(step, self._pool)
        return graph.replay, out
