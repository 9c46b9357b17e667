"""Captures CUDA graphs, keeps them by key, and detects when memory that they read has moved."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

logger = logging.getLogger("llava_fast.generation")
Captured = TypeVar("Captured")
WARM_UP = 3  # runs before capture, on a side stream, as torch.cuda.graph requires


@dataclass
class Pool:
    """Memory of the current device for graphs that run one at a time, and the stream that they are captured on. A graph
    may overwrite what the others have left, results included. Take a new one after a capture in it has failed or all of
    its graphs are gone: PyTorch refuses it then."""

    handle: Any = field(default_factory=torch.cuda.graph_pool_handle)
    stream: torch.cuda.Stream = field(default_factory=torch.cuda.Stream)


def capture(run: Callable[[], Tensor], pool: Pool | None = None) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """(the graph of `run`, its output tensor), on the current device; without a pool, in memory of its own. Whatever
    fails, the current stream is the same afterwards, and waits for what the warm-up has launched."""
    pool = pool or Pool()
    side, before = pool.stream, torch.cuda.current_stream()
    side.wait_stream(before)
    try:
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                run()
    finally:
        before.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Its stream is of this device (the default one is the first capture's); other threads may go on using the GPU.
    try:
        with torch.cuda.graph(graph, pool=pool.handle, stream=side, capture_error_mode="thread_local"):
            out = run()
    finally:
        torch.cuda.set_stream(before)  # torch.cuda.graph leaves its own current if the capture cannot be ended
    return graph, out


class NoGraphError(Exception):
    """Why a graph cannot hold a call, known before its capture."""


class Captures(Generic[Captured]):
    """Captured graphs by key, in the order of their use; of `most`, the one used longest ago is dropped before a
    capture (which needs its memory, and may fail).

    failed  why a key has no graph: its capture failed (logged), or NoGraphError. It is not tried again before `clear`.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.failed: dict[Hashable, str] = {}
        self._kept: OrderedDict[Hashable, Captured] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Captured], what: str, instead: str) -> Captured | None:
        """The graph of a key, made at first; None if making it fails, now or before. `what` is captured and what is
        done `instead` are words for the log. A graph is kept only once it is whole."""
        if key in self.failed:
            return None
        found = self._kept.get(key)
        if found is None:
            while len(self._kept) >= self.most:  # before the capture, which needs their memory
                self._kept.popitem(last=False)
            try:
                found = make()
            except NoGraphError as reason:
                self.failed[key] = str(reason)
                return None
            except Exception as error:  # any error of a capture: the modules still work
                self.fail(key, f"capturing {what} failed: {error!r}", instead)
                return None
            self._kept[key] = found
        self._kept.move_to_end(key)
        return found

    def fail(self, key: Hashable, why: str, instead: str) -> None:
        """Drop a key's graph, if it has one, and say why; it gets none again."""
        self._kept.pop(key, None)
        self.failed[key] = why
        logger.warning("%s; %s", why, instead)

    def clear(self) -> None:
        """Forget all graphs and failures: what was captured has changed."""
        self._kept.clear()
        self.failed.clear()

    @property
    def keys(self) -> list[Hashable]:
        """The keys that have a graph, the one used longest ago first."""
        return list(self._kept)


def addresses_of(module: nn.Module) -> list[int]:
    """The addresses of module.parameters() and buffers(), four times as fast as those, since it runs at each replay."""
    found: list[int] = []
    for owned in (module._parameters, module._buffers):
        found += [tensor.data_ptr() for tensor in owned.values() if tensor is not None]
    for child in module._modules.values():
        if child is not None:
            found += addresses_of(child)
    return found
