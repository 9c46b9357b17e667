"""decoder_step: a whole decoder pass for one new row a sequence, as one compiled call.

In PyTorch a small decoder spends most of a token between operators and a large one reads its weights no faster than
its matrix-vector products do; one call does away with the former and streams each weight once for all sequences.
For inference only: it writes the cache, and no gradient flows through it.
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
backend.register("decoder_step", "native", "CPU, float32", proven_on=("cpu",))


def decoder_step(
    x: Tensor,
    weights: DecoderWeights,
    cos: Tensor,
    sin: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    before: Sequence[int],
) -> Tensor:
    """Final hidden states [n, C] of one new row in each of the first n cache slots.

    x             [n, C]: the rows' embeddings.
    cos, sin      [n, 1, D]: rotary tables of their positions, halves paired; sin's first half is negated.
    keys, values  per layer [slots, K, capacity, D]: rows 0 .. before[i]-1 of slot i are read, row before[i] is
                  written. Nothing else in them is touched.
    Per layer: x += o(attention(norm(x))); x += down(silu(gate(norm(x))) * up(norm(x))); then the final norm.
    Softmax is in float32 or wider. FLOPs: 2n per weight and 4*n*rows*H*D a layer for attention. Minimum bytes: each
    weight once, each cached row once.
    Row i's result is the same bits whatever the other rows, and on any number of threads (native).
    Raises ValueError for tensors that do not fit together.
    """
    weights.refresh()
    rows, head_dim, like = len(before), weights.head_dim, weights.norm
    if x.shape != (rows, weights.width) or not rows:
        raise ValueError(f"x {list(x.shape)} must be [{rows} (one a sequence), {weights.width}]")
    if cos.shape != (rows, 1, head_dim) or sin.shape != cos.shape:
        raise ValueError(f"cos {list(cos.shape)} and sin {list(sin.shape)} must be [{rows}, 1, {head_dim}]")
    if len(keys) != len(weights.layers) or len(values) != len(keys):
        raise ValueError(f"{len(weights.layers)} layers, but {len(keys)} tables of keys, {len(values)} of values")
    slots, kv_heads, capacity, size = shape = keys[0].shape
    tables = (*keys, *values)
    if slots < rows or kv_heads != weights.kv_heads or size != head_dim or any(t.shape != shape for t in tables):
        raise ValueError(
            f"every table of keys and values must be [{rows} or more slots, {weights.kv_heads}, capacity, {head_dim}], "
            f"got {[tuple(table.shape) for table in tables]}"
        )
    if min(before) < 0 or max(before) >= capacity:
        raise ValueError(f"rows {list(before)} do not lie in a cache of {capacity} rows a slot")
    if any(t.dtype != like.dtype or t.device != like.device for t in (x, cos, sin, *tables)):
        raise ValueError(f"x, cos, sin and the cache must be {like.dtype} on {like.device}, as the weights are")
    unfit = weights.unfit
    if unfit is None and not all(map(Tensor.is_contiguous, tables)):
        unfit = "a table of keys or values is not contiguous"
    if backend.choose("decoder_step", like.device.type, {"native": unfit}) == "native":
        return native.decoder_step(x, weights, cos, sin, keys, values, before)
    with torch.no_grad():
        return reference.decoder_step(x, weights, cos, sin, keys, values, before)
