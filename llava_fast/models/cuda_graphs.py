"""Captures CUDA graphs, and detects when memory that they read has moved."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

WARM_UP = 3  # runs before capture, on a side stream, as torch.cuda.graph requires


def capture(run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """(the graph of `run`, its output tensor), on the current device."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Its stream is of this device (the default one is the first capture's); other threads may go on using the GPU.
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        out = run()
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
