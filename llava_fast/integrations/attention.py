"""`register()`: this package's attention for any transformers model, as `attn_implementation="llava_fast"`.

transformers has two registries, one for attention functions and one for their masks, and a name needs an entry in both:
without the second no mask is made, and padding is silently attended to.

If the mask of a prefill or training step is only causality and padding on one side, it is a `Spans` (each sequence's
range of rows). `models.blocks.attention` then runs on each sequence's rows: padding costs nothing, and kernels without
a mask are used. (Outputs at padding, which are never read, are zeros or those of causal attention.) In all other cases
the mask is the tensor that transformers makes for SDPA. Either way the 2-D mask is read once per step, as for
transformers' own SDPA mask.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llava_fast.models.blocks.attention import Spans, attend

NAME = "llava_fast"
REFUSED = ("softcap", "position_bias", "s_aux", "cache")
"""Options of some models' attention that this implementation does not support."""


def register(name: str = NAME) -> str:
    """Register `attn_implementation=name` with transformers and return the name. May be called repeatedly."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)
    return name


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Spans | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Called by transformers in each layer: query [B, H, q, D], key and value [B, K, k, D] to [B, q, H, D].

    Raises ValueError for unsupported options: soft capping, biases, sinks, and dropout together with padding.
    """
    if found := [name for name in REFUSED if kwargs.get(name) is not None]:
        raise ValueError(f"the attention {NAME!r} does not serve {', '.join(found)}: use attn_implementation='sdpa'")
    if isinstance(attention_mask, Spans):
        if dropout:
            raise ValueError(f"the attention {NAME!r} has no dropout: set attention_dropout=0 or use 'sdpa'")
        return _of_spans(query, key, value, attention_mask, scaling), None
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    if length == 1:  # stack the query heads of a key head as rows of one matrix
        query = query.reshape(len(query), key.shape[1], groups, -1)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout,
        is_causal=bool(causal) and attention_mask is None and length > 1,
        scale=scaling,
        enable_gqa=groups > 1 and length > 1,
    )
    return out.reshape(len(out), -1, length, value.shape[-1]).transpose(1, 2).contiguous(), None


def _of_spans(query: Tensor, key: Tensor, value: Tensor, spans: Spans, scaling: float | None) -> Tensor:
    """Concatenate the rows of all sequences, apply the package's attention, and restore the padded layout."""
    batch, _, length, size = query.shape
    if scaling is not None and scaling != size**-0.5:
        query = query * (scaling * size**0.5)
    query, key, rows = (part.transpose(1, 2).flatten(0, 1) for part in (query, key, value))
    return attend(query, key, rows, spans, 0, None, None).view(batch, length, -1, value.shape[-1])


def mask(
    batch_size: int, q_length: int, kv_length: int, *, mask_function, attention_mask: Tensor | None = None, **kwargs
) -> Spans | Tensor | None:
    """Called by transformers once per step. Returns a Spans for causality with padding on one side, None for causality
    alone, else transformers' SDPA mask, bool [B, 1, q, k].
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    plain = mask_function is causal_mask_function and q_length == kv_length > 1 and kwargs.get("kv_offset", 0) == 0
    plain = plain and not torch.compiler.is_compiling()
    if plain and attention_mask is not None and attention_mask.shape == (batch_size, q_length):
        spans = spans_of(attention_mask)
        if spans is not None:
            return spans
    given = {"mask_function": mask_function, "attention_mask": attention_mask, **kwargs}
    return sdpa_mask(batch_size, q_length, kv_length, **given)


def spans_of(attention_mask: Tensor) -> Spans | None:
    """The spans of a 2-D mask [B, S], nonzero at tokens; None if nothing is masked or a row has a gap."""
    real = attention_mask != 0
    width = real.shape[1]
    first, last = real.int().argmax(1), width - real.flip(1).int().argmax(1)
    found = [tuple(row) for row in torch.stack([first, last, real.sum(1)], 1).tolist()]
    gap = any(length and end - start != length for start, end, length in found)
    if gap or all(length == width for _, _, length in found):
        return None
    rows = [(number * width + start, length) for number, (start, _, length) in enumerate(found) if length]
    starts, lengths = zip(*rows, strict=True) if rows else ((), ())
    right = len(rows) == len(found) and not any(start for start, _, _ in found)
    return Spans(starts, lengths, dense=(len(found), width) if right else None)
