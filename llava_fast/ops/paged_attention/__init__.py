"""paged_attention: the attention of one decoding step, RoPE and cache update included.

For one new row per sequence: rotate its query and key, store its key and value in the paged cache, attend to all rows
of the sequence. For inference only: it writes the cache and has no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llava_fast.ops import backend, library, triton_support
from llava_fast.ops.paged_attention import reference

backend.register("paged_attention", "reference", "any device")
backend.register("paged_attention", "triton", "CUDA")


def paged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    segments: Sequence[Tensor],
    addresses: Tensor,
    table: Tensor,
    before: Tensor,
    layer: int,
    window: int | None = None,
) -> Tensor:
    """Attention outputs [n, H*D] of one new row for each of n sequences, in query's dtype.

    query         [n, H, D]; key, value [n, K, D], before RoPE. H is a multiple of K.
    cos, sin      [n, D] or [n, 1, D]: rotary tables of the rows' positions, halves paired; sin's first half is negated.
    segments      the cache's memory, [layers, 2, K, blocks, block rows, D] each, contiguous, in query's dtype.
    addresses     int64 [blocks, 2] on the same device: for each block of all segments, the address of its first key of
                  layer 0 and head 0, and the number of blocks of its segment (`block_addresses` makes them).
    table         int32 [n, width]: each sequence's blocks, first to last. Entries beyond its rows are not read.
    before        int32 [n]: rows already cached. The new row is stored after them, in a block of the table. -1 marks a
                  padding sequence: nothing is stored and its result is 0.
    layer         index of the layer in the cache. window: how many rows the new row attends to, itself included.
    The softmax is in float32 (float64 for float64). FLOPs: 4*rows*H*D. Minimum bytes: the layer's cached rows, once.
    The Triton backend does not synchronise with the host, so a CUDA graph can capture the call.
    Raises ValueError for mismatched tensors.
    """
    cos, sin = (t.squeeze(1) if t.dim() == 3 else t for t in (cos, sin))
    _check(query, key, value, cos, sin, segments, addresses, table, before, layer)
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    return _paged_attention(query, key, value, cos, sin, list(segments), addresses, table, before, layer, window or 0)


def _check(query, key, value, cos, sin, segments, addresses, table, before, layer: int) -> None:
    sizes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if query.dim() != 3 or key.shape != value.shape or key.dim() != 3 or query.shape[::2] != key.shape[::2]:
        raise ValueError(f"query must be [n, H, D], key and value [n, K, D]; got {sizes}")
    n, heads, size = query.shape
    kv_heads = key.shape[1]
    if not kv_heads or heads % kv_heads or size % 2 or not size:
        raise ValueError(f"query heads must be a multiple of key heads and D even and positive; got {sizes}")
    if cos.shape != (n, size) or sin.shape != (n, size):
        raise ValueError(f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must be [{n}, {size}]")
    if not segments:
        raise ValueError("the cache has no segment")
    layers, rows = segments[0].shape[0], segments[0].shape[-2]
    for segment in segments:
        if segment.dim() != 6 or (*segment.shape[:3], *segment.shape[4:]) != (layers, 2, kv_heads, rows, size):
            raise ValueError(
                f"every segment must be [layers, 2, {kv_heads}, blocks, block rows, {size}] with the same layers and "
                f"block rows, got {[tuple(each.shape) for each in segments]}"
            )
        if not segment.is_contiguous():
            raise ValueError("a segment of the cache is not contiguous")
    if len({each.dtype for each in (query, key, value, cos, sin, *segments)}) > 1 or not query.is_floating_point():
        raise ValueError(
            f"query, key, value, cos, sin and the cache must have one floating dtype, query is {query.dtype}"
        )
    if not 0 <= layer < layers:
        raise ValueError(f"layer {layer} is not one of the cache's {layers}")
    if addresses.dtype != torch.int64 or addresses.shape[1:] != (2,):
        raise ValueError(f"addresses must be int64 [blocks, 2], got {addresses.dtype} {tuple(addresses.shape)}")
    if table.dim() != 2 or len(table) != n or not table.shape[1] or before.shape != (n,):
        raise ValueError(f"table {tuple(table.shape)} must be [{n}, width] and before {tuple(before.shape)} [{n}]")
    if table.dtype != torch.int32 or before.dtype != torch.int32:
        raise ValueError(f"table and before must be int32, got {table.dtype} and {before.dtype}")


def _run(query, key, value, cos, sin, segments, addresses, table, before, layer, window) -> Tensor:
    unfit = triton_support.unfit(query, table)
    if backend.choose("paged_attention", query.device.type, {"triton": unfit}) == "triton":
        from llava_fast.ops.paged_attention import triton_kernels

        return triton_kernels.paged_attention(
            query, key, value, cos, sin, segments, addresses, table, before, layer, window
        )
    return reference.paged_attention(query, key, value, cos, sin, segments, table, before, layer, window)


_paged_attention = library.define(
    "paged_attention(Tensor query, Tensor key, Tensor value, Tensor cos, Tensor sin, Tensor(a!)[] segments,"
    " Tensor addresses, Tensor table, Tensor before, int layer, int window) -> Tensor",
    _run,
    lambda query, *_: query.new_empty(len(query), query.shape[1] * query.shape[2]),
)
