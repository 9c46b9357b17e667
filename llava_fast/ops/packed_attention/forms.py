"""Attention of all sequences at once: by PyTorch's variable-length flash attention, by xformers' block-diagonal form,
and by padding to a rectangle for PyTorch's SDPA. None has run on a GPU yet: tests compare the arguments' meaning, as
both libraries document it, with the loop."""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llava_fast.ops.packed_attention.reference import visible

MOST_PADDING = 4  # times as many rows as there are


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


def xformers_unfit(query: Tensor) -> str | None:
    """Why xformers cannot run for these queries, None if nothing says so before it is tried."""
    if not has_xformers():
        return "xformers is not installed"
    if query.dtype == torch.bfloat16 and torch.cuda.get_device_capability(query.device) < (8, 0):
        return "xformers takes bfloat16 from compute capability 8.0 on"
    return refused.get(case_of(query))


refused: dict[tuple[torch.device, torch.dtype, int], str] = {}  # what xformers said, by device, dtype and head size


def case_of(query: Tensor) -> tuple[torch.device, torch.dtype, int]:
    return query.device, query.dtype, query.shape[-1]


def padded_unfit(query_lengths: Sequence[int], key_lengths: Sequence[int]) -> str | None:
    """Why padding is no way to attend; None if it may be."""
    count = len(query_lengths)
    for lengths in (query_lengths, key_lengths):
        if count * max(lengths) > MOST_PADDING * sum(lengths):
            return f"padding would take more than {MOST_PADDING} times the rows"
    return None


def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Tensor,
    keys: Tensor,
    query_lengths: Sequence[int],
    key_lengths: Sequence[int],
    window: int,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    reach = (window - 1 if window else -1, 0)  # keys before the query's own
    grouped = query.shape[1] != key.shape[1]
    most = max(query_lengths), max(key_lengths)
    out = varlen_attn(query, key, value, queries, keys, *most, window_size=reach, enable_gqa=grouped)
    assert isinstance(out, Tensor)  # nothing else was asked for
    return out


def xformers(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Tensor,
    keys: Tensor,
    query_lengths: Sequence[int],
    key_lengths: Sequence[int],
    window: int,
) -> Tensor:
    from xformers.ops import memory_efficient_attention

    bias = _bias(tuple(query_lengths), tuple(key_lengths), window, query.device)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # its grouped heads have no backward pass
        key, value = (each[:, :, None].expand(-1, -1, groups, -1).flatten(1, 2) for each in (key, value))
    return memory_efficient_attention(query[None], key[None], value[None], attn_bias=bias)[0]


@functools.lru_cache(maxsize=4)
def _bias(queries: tuple[int, ...], keys: tuple[int, ...], window: int, device: torch.device) -> Any:
    """Its mask, which all layers of a pass share."""
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalFromBottomRightMask

    bias = BlockDiagonalCausalFromBottomRightMask.from_seqlens(list(queries), list(keys), device=device)
    return bias.make_local_attention_from_bottomright(window) if window else bias


def padded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Tensor,
    keys: Tensor,
    query_lengths: Sequence[int],
    key_lengths: Sequence[int],
    window: int,
) -> Tensor:
    count, most_q, most_k = len(query_lengths), max(query_lengths), max(key_lengths)
    at_q, at_k = (torch.arange(most, device=query.device) for most in (most_q, most_k))

    def rectangle(rows: Tensor, ends: Tensor, at: Tensor) -> Tensor:
        """[S, heads, most, D]; rows beyond a sequence's end are other rows, which nothing reads."""
        index = (ends[:-1, None] + at).clamp_(max=len(rows) - 1)
        return rows.index_select(0, index.flatten()).unflatten(0, index.shape).transpose(1, 2)

    q, k, v = rectangle(query, queries, at_q), rectangle(key, keys, at_k), rectangle(value, keys, at_k)
    grouped = query.shape[1] != key.shape[1]
    if list(query_lengths) == list(key_lengths) and (not window or most_k <= window):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=most_q > 1, enable_gqa=grouped)
    else:
        first = keys.diff() - queries.diff()  # the position of each sequence's first query
        mask = visible((first[:, None] + at_q)[:, None, :, None], at_k, window)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    sequence = torch.repeat_interleave(torch.arange(count, device=query.device), queries.diff(), output_size=len(query))
    place = sequence * most_q + torch.arange(len(query), device=query.device) - queries[sequence]
    return out.transpose(1, 2).flatten(0, 1).index_select(0, place)
