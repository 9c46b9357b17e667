"""Causal attention of sequences of any lengths in one call: PyTorch's variable-length flash attention, on CUDA.

Elsewhere, and in float32, attention.py loops over the sequences. Like SDPA's own choice of a kernel, this one depends
on device, dtype and sizes alone (`unfit`) and is not a verdict of ops/selection. Not run on a GPU yet: tests compare
the arguments' meaning, as torch documents it, with the loop.

Shapes: R rows of queries, T rows of keys, H heads, K key heads, D head size, S sequences.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llava_fast.models.paged_rows import to_device


class Ragged(NamedTuple):
    """Where each sequence's rows end: running counts of queries and keys int32 [S + 1] on the device, and the longest
    of each. The queries of a sequence are the last of its keys' positions."""

    queries: Tensor
    keys: Tensor
    most_queries: int
    most_keys: int

    @classmethod
    def of(cls, queries: Sequence[int], keys: Sequence[int], device: torch.device) -> Ragged:
        """From the sequences' numbers of rows; one transfer."""
        ends = np.zeros((2, len(queries) + 1), np.int32)
        ends[0, 1:], ends[1, 1:] = np.cumsum(queries), np.cumsum(keys)
        both = to_device(ends, device)
        return cls(both[0], both[1], max(queries), max(keys))


def unfit(query: Tensor, slopes: Tensor | None) -> str | None:
    """Why the kernel cannot run for these queries [R, H, D]; None if it can."""
    if query.device.type != "cuda":
        return "it needs CUDA"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, not {query.dtype}"
    if query.shape[-1] % 8 or query.shape[-1] > 256:
        return f"a head size of {query.shape[-1]} is not a multiple of 8 up to 256"
    if slopes is not None:
        return "it has no ALiBi"
    if torch.compiler.is_compiling():
        return "a traced graph holds the loop"
    return _unavailable(query.device)


@functools.cache
def _unavailable(device: torch.device) -> str | None:
    """Why this PyTorch or this GPU has no such kernel; None if it has."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    if not {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys():
        return f"varlen_attn of torch {torch.__version__} has neither windows nor grouped heads (2.13 has)"
    if torch.version.hip is not None or not torch.backends.cuda.is_flash_attention_available():
        return "this PyTorch has no flash attention"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "flash attention needs compute capability 8.0"
    return None


def attend_ragged(query_RHD: Tensor, key_TKD: Tensor, value_TKD: Tensor, at: Ragged, window: int | None) -> Tensor:
    """[R, H, D]: each query attends to its sequence's keys up to its own position, of those the last `window`."""
    from torch.nn.attention.varlen import varlen_attn

    reach = (-1 if window is None else window - 1, 0)  # keys before the query's own
    counts = at.queries, at.keys, at.most_queries, at.most_keys
    grouped = query_RHD.shape[1] != key_TKD.shape[1]
    out = varlen_attn(query_RHD, key_TKD, value_TKD, *counts, window_size=reach, enable_gqa=grouped)
    assert isinstance(out, Tensor)  # nothing else was asked for
    return out
