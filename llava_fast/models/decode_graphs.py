"""Decoding steps replayed from CUDA graphs, one for each bucket of sequences: a step is one copy and one launch.

Between replays only the contents of one static tensor change: each sequence's token, rows cached before, and blocks.
A graph holds addresses, so everything that it reads must stay in place: all graphs are dropped once a module, a hook or
a weight of the decoder has changed. The cache may grow: its addresses are in a tensor of their own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llava_fast.models import cuda_graphs, fused
from llava_fast.models.blocks.native_step import Snapshot
from llava_fast.models.decoders.stack import Decoder
from llava_fast.models.paged_cache import BlockTable, PagedCache, Pages, table_width
from llava_fast.ops import backend

logger = logging.getLogger("llava_fast.generation")
MOST_SEQUENCES = 256  # beyond, a step's products outweigh its launches


def _keeps_no_switch(kind: type) -> bool:
    """Whether modules of a type do the same at each step, so that a graph may stand for them: this package's and
    PyTorch's plain ones. Others, as PEFT's, turn adapters on and off by attributes that nothing here compares."""
    return kind.__module__.startswith("llava_fast.") or kind in _PLAIN


_PLAIN = (nn.Linear, nn.Embedding, nn.ModuleList, nn.SiLU, nn.Identity)


@dataclass
class _Captured:
    host: Tensor  # int32 [n * (2 + width)]: tokens, rows before, blocks
    device: Tensor
    size: int  # n
    rope: tuple[Tensor, Tensor]  # kept alive: the graph reads it
    replay: Callable[[], None]
    out: Tensor


class DecodeGraphs:
    """`graphs(tokens, tables, before)` returns the decoder's logits for one more row of each sequence, from a graph
    captured for the bucket, or None if there is none; then run the modules.

    A bucket is a number of sequences and of blocks a sequence, each a power of two; graphs are captured when first
    needed. Sequences that fill a bucket up write nothing. The returned logits [n, vocabulary] are a view that the next
    call overwrites. `unfit` says why there is no graph: dynamic RoPE, a hooked module, one that is neither this
    package's nor a plain one of PyTorch, or a failed capture (logged once, and not tried again until a module changes).
    """

    def __init__(self, decoder: Decoder, cache: PagedCache) -> None:
        self.decoder, self.cache = decoder, cache
        self.unfit: str | None = None
        self._captured: dict[tuple, _Captured] = {}
        self._snapshot: Snapshot | None = None
        self._addresses: list[int] = []
        self._met: set[tuple] = set()

    def __call__(self, tokens: Sequence[int], tables: Sequence[BlockTable], before: Sequence[int]) -> Tensor | None:
        decoder, count = self.decoder, len(tokens)
        if not 0 < count <= MOST_SEQUENCES or nn.modules.module._has_any_global_hook():
            return None
        like = next(decoder.norm.parameters())
        if not fused.takes("paged_attention", like):
            return None
        self._follow_changes()
        if self.unfit is not None:
            return None
        for table, at in zip(tables, before, strict=True):
            table.reserve(at + 1)
        size = 1 << (count - 1).bit_length()
        width = table_width(tables)
        key = size, width, backend.requested(), like.dtype
        if key not in self._met:  # the first step of a bucket runs the modules: there ops are proven (ops/selection)
            self._met.add(key)
            return None
        # Not in inference mode, whose tensors (the static ones, were a graph captured in it) nothing else may write.
        with torch.inference_mode(False), torch.no_grad():
            self.cache.addresses  # noqa: B018 - those of new blocks are written in place
            found = self._captured.get(key)
            if found is None:
                found = self._captured_now(key, size, width)
                if found is None:
                    return None
            self._fill(found, tokens, tables, before)
            found.replay()
        return found.out[:count]

    def _follow_changes(self) -> None:
        """Drop all graphs if the modules or weights have changed since capture."""
        snapshot = self._snapshot
        addresses = [self.cache.addresses.data_ptr(), *cuda_graphs.addresses_of(self.decoder)]
        if snapshot is not None and snapshot.holds() and addresses == self._addresses:
            return
        self._captured.clear()
        self._snapshot, self._addresses = Snapshot(self.decoder, frozenset(), whole=True), addresses
        self.unfit = None
        if self.decoder.rope.config.kind == "dynamic":
            self.unfit = "dynamic RoPE follows each sequence's length"
        elif not self._snapshot.holds():
            self.unfit = "a module of the decoder has a hook or a forward of its own"
            self._snapshot = None  # so that the next step looks again
        elif strange := sorted(kind.__name__ for kind in self._snapshot.kinds if not _keeps_no_switch(kind)):
            self.unfit = f"a module of the decoder may choose anew at each step what it does ({', '.join(strange)})"

    def _captured_now(self, key: tuple, size: int, width: int) -> _Captured | None:
        try:
            found = self._captured[key] = self._prepared(size, width)
        except Exception as error:  # whatever a capture may raise, the modules still serve
            self._captured.pop(key, None)
            self.unfit = f"capturing a decoding step of {size} sequences failed: {error!r}"
            logger.warning("%s; its modules run one by one", self.unfit)
            return None
        return found

    def _prepared(self, size: int, width: int) -> _Captured:
        decoder, cache, device = self.decoder, self.cache, self.cache.device
        host = torch.zeros(size * (2 + width), dtype=torch.int32, pin_memory=device.type == "cuda")
        host[size : 2 * size] = -1
        static = host.to(device, copy=True)
        token, before, table = static.split([size, size, size * width])
        rope = decoder.rope.reserve(width * cache.block_rows, device, cache.dtype)
        pages = Pages(cache.addresses, table.view(size, width), before)
        replay, out = self.capture(lambda: decoder.step(token, pages, cache))
        return _Captured(host, static, size, rope, replay, out)

    def capture(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """(a function that replays `step`, its output tensor)."""
        with torch.cuda.device(self.cache.device):
            graph, out = cuda_graphs.capture(step)
        return graph.replay, out

    def _fill(
        self, found: _Captured, tokens: Sequence[int], tables: Sequence[BlockTable], before: Sequence[int]
    ) -> None:
        """Write the static tensor, in one copy. The host buffer can be reused, because the last step's tokens have been
        read.
        """
        numbers, size, count = found.host.numpy(), found.size, len(tokens)
        numbers[:count], numbers[size : size + count], numbers[size + count : 2 * size] = tokens, before, -1
        blocks = numbers[2 * size :].reshape(size, -1)
        for row, table in zip(blocks, tables, strict=False):
            row[: len(table.blocks)] = table.blocks
        found.device.copy_(found.host, non_blocking=True)
