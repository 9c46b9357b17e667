"""Causal attention of sequences of any lengths in one call, on CUDA (ops/packed_attention; selection decides its form).

Elsewhere, and in float32, attention.py loops over the sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llava_fast.models.paged_rows import to_device
from llava_fast.ops import packed_attention
from llava_fast.ops.packed_attention import forms, may_choose


@dataclass(frozen=True)
class Ragged:
    """Where each sequence's rows end.

    lengths       the sequences' numbers of queries and of keys. Queries are the last of their sequence's positions.
    queries, keys running counts of both, int32 [S + 1] on the device.
    """

    lengths: tuple[list[int], list[int]]
    queries: Tensor
    keys: Tensor

    @classmethod
    def of(cls, queries: Sequence[int], keys: Sequence[int], device: torch.device) -> Ragged:
        """From the sequences' numbers of rows; one transfer."""
        ends = np.zeros((2, len(queries) + 1), np.int32)
        ends[0, 1:], ends[1, 1:] = np.cumsum(queries), np.cumsum(keys)
        both = to_device(ends, device)
        return cls((list(queries), list(keys)), both[0], both[1])


def unfit(query: Tensor, slopes: Tensor | None) -> str | None:
    """Why these queries [R, H, D] are left to the loop; None if one call may serve all sequences."""
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
    reason = forms.flash_unfit(query.device)
    other = None if reason is None else forms.xformers_unfit(query)
    if other is None or may_choose(query.device.type):  # which may prove padding
        return None
    return f"{reason}, and {other}"


def attend_ragged(query_RHD: Tensor, key_TKD: Tensor, value_TKD: Tensor, at: Ragged, window: int | None) -> Tensor:
    """[R, H, D]: each query attends to its sequence's keys up to its own position, of those the last `window`."""
    return packed_attention(query_RHD, key_TKD, value_TKD, at.queries, at.keys, *at.lengths, window)
