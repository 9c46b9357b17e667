"""decoder_step: one decoding step (one new token per sequence) through all decoder layers in one compiled call.

In PyTorch a small decoder spends most of a step on operator overhead, and a large one is bound by reading the weights
for matrix-vector products. One call removes the overhead and reads each weight once for all sequences. For inference
only: it writes the KV cache and has no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llava_fast.ops import backend
from llava_fast.ops.cached_rows import SCALE_BYTES
from llava_fast.ops.decoder_step import native, reference
from llava_fast.ops.decoder_step.weights import DecoderWeights, LayerWeights

__all__ = ["DecoderWeights", "LayerWeights", "decoder_step"]

backend.register("decoder_step", "reference", "any device")
backend.register("decoder_step", "native", "CPU; float32 or bfloat16, with int8 and int4 weights", default_on=("cpu",))


def decoder_step(
    x: Tensor,
    weights: DecoderWeights,
    cos: Tensor,
    sin: Tensor,
    segments: Sequence[Tensor],
    tables: Sequence[Sequence[int]],
    before: Sequence[int],
) -> Tensor:
    """Final hidden states [n, C] of one new token for each of n sequences.

    x             [n, C]: the tokens' embeddings.
    cos, sin      [n, 1, D]: rotary tables for the tokens' positions, halves paired; sin's first half is negated.
    segments      the KV cache's memory, [layers, 2, K, blocks, block rows, D] each (see ops.paging), in the weights'
                  dtype; or int8 with D + 4 in place of D: rows in 8 bits (see ops.cached_rows).
    tables        for each sequence, the runs of blocks that hold its rows: (first block, blocks, ...).
    before        for each sequence, the number of cached rows. Those are read and the next row is written; nothing
                  else in the cache changes. No two sequences may share the block that is written.
    Per layer: x += o(attention(norm(x))); x += down(silu(gate(norm(x))) * up(norm(x))); then the final norm.
    Softmax is in float32 or wider. FLOPs: 2n per weight and 4*n*rows*H*D per layer for attention. Minimum bytes: each
    weight once, each cached row once.
    Native: row i's result is bit-identical whatever the other rows, the placement of its blocks and the number of
    threads. Raises ValueError for mismatched tensors and for a table without room for the new row.
    """
    weights.refresh()
    rows, head_dim, like = len(before), weights.head_dim, weights.norm
    if x.shape != (rows, weights.width) or not rows:
        raise ValueError(f"x {list(x.shape)} must be [{rows} (one per sequence), {weights.width}]")
    if cos.shape != (rows, 1, head_dim) or sin.shape != cos.shape:
        raise ValueError(f"cos {list(cos.shape)} and sin {list(sin.shape)} must be [{rows}, 1, {head_dim}]")
    block_rows = segments[0].shape[4] if segments and segments[0].dim() == 6 else 0
    in_codes = bool(segments) and segments[0].dtype == torch.int8
    row = head_dim + SCALE_BYTES if in_codes else head_dim
    of_layers, of_blocks = (len(weights.layers), 2, weights.kv_heads), (block_rows, row)
    for segment in segments:
        shape = segment.shape
        if len(shape) != 6 or shape[:3] != of_layers or shape[4:] != of_blocks:
            raise ValueError(
                f"every segment must be [{len(weights.layers)} layers, 2, {weights.kv_heads}, blocks, block rows, "
                f"{row}] with the same block rows, got {[list(segment.shape) for segment in segments]}"
            )
    if len(tables) != rows:
        raise ValueError(f"{len(tables)} tables of blocks for {rows} sequences")
    for table, at in zip(tables, before, strict=True):
        blocks = table[1] if len(table) == 2 else sum(table[1::2])
        if not 0 <= at < blocks * block_rows:
            raise ValueError(f"row {at} is outside its table of {blocks} blocks of {block_rows} rows")
    dtype, device = like.dtype, like.device
    cached = torch.int8 if in_codes else dtype
    for t, wanted in ((x, dtype), (cos, dtype), (sin, dtype), *((segment, cached) for segment in segments)):
        if t.dtype != wanted or t.device != device:
            raise ValueError(
                f"x, cos, sin and the cache must be {dtype} on {device}, as the weights are (or the cache int8)"
            )
    unfit = weights.unfit
    if unfit is None and not all(map(Tensor.is_contiguous, segments)):
        unfit = "a segment of the cache is not contiguous"
    if backend.choose("decoder_step", device.type, {"native": unfit}) == "native":
        return native.decoder_step(x, weights, cos, sin, segments, tables, before)
    with torch.no_grad():
        return reference.decoder_step(x, weights, cos, sin, segments, tables, before)
