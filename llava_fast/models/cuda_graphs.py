"""Captures CUDA graphs, and detects when memory that they read has moved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

WARM_UP = 3  # runs before capture, on a side stream, as torch.cuda.graph requires


@dataclass
class Pool:
    """Memory of the current device for graphs that run one at a time, and the stream that they are captured on. A graph
    may overwrite what the others have left, results included. Take a new one after a capture in it has failed or all of
    its graphs are gone: PyTorch refuses it then."""

    handle: Any = field(default_factory=torch.cuda.graph_pool_handle)
    stream: torch.cuda.Stream = field(default_factory=torch.cuda.Stream)


def capture(run: Callable[[], Tensor], pool: Pool | None = None) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """(the graph of `run`, its output tensor), on the current device; without a pool, in memory of its own. The current
    stream is the same afterwards, also if the capture fails."""
    pool = pool or Pool()
    side, before = pool.stream, torch.cuda.current_stream()
    side.wait_stream(before)
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            run()
    before.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Its stream is of this device (the default one is the first capture's); other threads may go on using the GPU.
    try:
        with torch.cuda.graph(graph, pool=pool.handle, stream=side, capture_error_mode="thread_local"):
            out = run()
    finally:
        torch.cuda.set_stream(before)  # torch.cuda.graph leaves its own current if the capture cannot be ended
    return graph, out


def addresses_of(module: nn.Module) -> list[int]:
    """The addresses of module.parameters() and buffers(), four times as fast as those, since it runs at each replay."""
    found: list[int] = []
    for owned in (module._parameters, module._buffers):
        found += [tensor.data_ptr() for tensor in owned.values() if tensor is not None]
    for child in module._modules.values():
        if child is not None:
            found += addresses_of(child)
    return found
