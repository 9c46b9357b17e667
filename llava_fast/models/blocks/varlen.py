"""Causal attention of sequences of any lengths in one call, on CUDA: PyTorch's variable-length flash attention, or
xformers' block-diagonal attention where it is installed and PyTorch's is too old.

Elsewhere, and in float32, attention.py loops over the sequences. Like SDPA's own choice of a kernel, this one depends
on device, dtype and sizes alone (`unfit`) and is not a verdict of ops/selection. Not run on a GPU yet: tests compare
the arguments' meaning, as both libraries document it, with the loop.

Shapes: R rows of queries, T rows of keys, H heads, K key heads, D head size, S sequences.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llava_fast.models.paged_rows import to_device

logger = logging.getLogger("llava_fast.models")
_refused: dict[tuple[torch.device, torch.dtype, int], str] = {}  # what xformers said, by device, dtype and head size


@dataclass(frozen=True)
class Ragged:
    """Where each sequence's rows end.

    lengths       the sequences' numbers of queries and of keys. Queries are the last of their sequence's positions.
    queries, keys running counts of both, int32 [S + 1] on the device.
    biases        xformers' masks, by window.
    """

    lengths: tuple[list[int], list[int]]
    queries: Tensor
    keys: Tensor
    biases: dict[int | None, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, queries: Sequence[int], keys: Sequence[int], device: torch.device) -> Ragged:
        """From the sequences' numbers of rows; one transfer."""
        ends = np.zeros((2, len(queries) + 1), np.int32)
        ends[0, 1:], ends[1, 1:] = np.cumsum(queries), np.cumsum(keys)
        both = to_device(ends, device)
        return cls((list(queries), list(keys)), both[0], both[1])


def unfit(query: Tensor, slopes: Tensor | None) -> str | None:
    """Why no kernel can run for these queries [R, H, D]; None if one can."""
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
    reason = flash_unfit(query.device)
    other = None if reason is None else _xformers_unfit(query)
    return None if other is None else f"{reason}, and {other}"


@functools.cache
def flash_unfit(device: torch.device) -> str | None:
    """Why this PyTorch or this GPU has no variable-length flash attention with all that is needed; None if it has."""
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


@functools.cache
def has_xformers() -> bool:
    return importlib.util.find_spec("xformers") is not None


def _xformers_unfit(query: Tensor) -> str | None:
    """Why xformers cannot run for these queries, None if nothing says so before it is tried."""
    if not has_xformers():
        return "xformers is not installed"
    if query.dtype == torch.bfloat16 and torch.cuda.get_device_capability(query.device) < (8, 0):
        return "xformers takes bfloat16 from compute capability 8.0 on"
    return _refused.get(_case(query))


def _case(query: Tensor) -> tuple[torch.device, torch.dtype, int]:
    return query.device, query.dtype, query.shape[-1]


def attend_ragged(
    query_RHD: Tensor, key_TKD: Tensor, value_TKD: Tensor, at: Ragged, window: int | None
) -> Tensor | None:
    """[R, H, D]: each query attends to its sequence's keys up to its own position, of those the last `window`. None if
    xformers refuses: that is logged, and from then on `unfit` says so for the same device, dtype and head size."""
    if flash_unfit(query_RHD.device) is None:
        return _flash(query_RHD, key_TKD, value_TKD, at, window)
    try:
        return _xformers(query_RHD, key_TKD, value_TKD, at, window)
    except (ImportError, NotImplementedError) as error:  # its kernels are built for some GPUs, dtypes and sizes
        reason = _refused[_case(query_RHD)] = f"xformers refused: {' '.join(str(error).split())}"
        logger.warning("%s; attention runs sequence by sequence", reason)
        return None


def _flash(query: Tensor, key: Tensor, value: Tensor, at: Ragged, window: int | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    reach = (-1 if window is None else window - 1, 0)  # keys before the query's own
    counts = at.queries, at.keys, max(at.lengths[0]), max(at.lengths[1])
    grouped = query.shape[1] != key.shape[1]
    out = varlen_attn(query, key, value, *counts, window_size=reach, enable_gqa=grouped)
    assert isinstance(out, Tensor)  # nothing else was asked for
    return out


def _xformers(query: Tensor, key: Tensor, value: Tensor, at: Ragged, window: int | None) -> Tensor:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalFromBottomRightMask

    if window not in at.biases:
        bias = BlockDiagonalCausalFromBottomRightMask.from_seqlens(*at.lengths, device=query.device)
        at.biases[window] = bias if window is None else bias.make_local_attention_from_bottomright(window)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # its grouped heads have no backward pass
        key, value = (each[:, :, None].expand(-1, -1, groups, -1).flatten(1, 2) for each in (key, value))
    return memory_efficient_attention(query[None], key[None], value[None], attn_bias=at.biases[window])[0]
