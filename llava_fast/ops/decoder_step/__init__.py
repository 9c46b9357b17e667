"""decoder_step: a whole decoder pass for one new row a sequence, as one compiled call.

In PyTorch a small decoder spends most of a token's time on operator overhead, and a large one is bound by the weight
reads of its matrix-vector products; one call removes the overhead and streams each weight once for all sequences. For
inference only: it writes the cache, and no gradient flows through it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llava_fast.ops import backend
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
    """Final hidden states [n, C] of one new row for each of n sequences.

    x             [n, C]: the rows' embeddings.
    cos, sin      [n, 1, D]: rotary tables of their positions, halves paired; sin's first half is negated.
    segments      the KV cache's memory, [layers, 2, K, blocks, block rows, D] each (see ops.paging).
    tables        per sequence the runs of blocks that hold its rows: (first block, blocks, ...).
    before        per sequence the rows cached already: these are read, and the row after them is written. Nothing
                  else in the cache is touched. No two sequences may share the block that is written.
    Per layer: x += o(attention(norm(x))); x += down(silu(gate(norm(x))) * up(norm(x))); then the final norm.
    Softmax is in float32 or wider. FLOPs: 2n per weight and 4*n*rows*H*D a layer for attention. Minimum bytes: each
    weight once, each cached row once.
    The bits of row i's result do not depend on the other rows, on where its blocks are, or on the number of threads
    (native). Raises ValueError for mismatched tensors and for a table without room for the new row.
    """
    weights.refresh()
    rows, head_dim, like = len(before), weights.head_dim, weights.norm
    if x.shape != (rows, weights.width) or not rows:
        raise ValueError(f"x {list(x.shape)} must be [{rows} (one a sequence), {weights.width}]")
    if cos.shape != (rows, 1, head_dim) or sin.shape != cos.shape:
        raise ValueError(f"cos {list(cos.shape)} and sin {list(sin.shape)} must be [{rows}, 1, {head_dim}]")
    block_rows = segments[0].shape[4] if segments and segments[0].dim() == 6 else 0
    of_layers, of_blocks = (len(weights.layers), 2, weights.kv_heads), (block_rows, head_dim)
    for segment in segments:
        shape = segment.shape
        if len(shape) != 6 or shape[:3] != of_layers or shape[4:] != of_blocks:
            raise ValueError(
                f"every segment must be [{len(weights.layers)} layers, 2, {weights.kv_heads}, blocks, block rows, "
                f"{head_dim}] with the same block rows, got {[list(segment.shape) for segment in segments]}"
            )
    if len(tables) != rows:
        raise ValueError(f"{len(tables)} tables of blocks for {rows} sequences")
    for table, at in zip(tables, before, strict=True):
        blocks = table[1] if len(table) == 2 else sum(table[1::2])
        if not 0 <= at < blocks * block_rows:
            raise ValueError(f"row {at} does not lie in a table of {blocks} blocks of {block_rows} rows")
    dtype, device = like.dtype, like.device
    for t in (x, cos, sin, *segments):
        if t.dtype != dtype or t.device != device:
            raise ValueError(f"x, cos, sin and the cache must be {dtype} on {device}, as the weights are")
    unfit = weights.unfit
    if unfit is None and not all(map(Tensor.is_contiguous, segments)):
        unfit = "a segment of the cache is not contiguous"
    if backend.choose("decoder_step", device.type, {"native": unfit}) == "native":
        return native.decoder_step(x, weights, cos, sin, segments, tables, before)
    with torch.no_grad():
        return reference.decoder_step(x, weights, cos, sin, segments, tables, before)
