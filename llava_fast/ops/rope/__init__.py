"""rope: rotary position embedding (RoPE) of queries and keys in one op."""

from __future__ import annotations

import torch
from torch import Tensor

from llava_fast.ops import backend, library, triton_support
from llava_fast.ops.rope import reference

backend.register("rope", "reference", "any device")
backend.register("rope", "triton", "CUDA")


def rope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, is_signed: bool = False) -> tuple[Tensor, Tensor]:
    """Rotate query and key: x * cos + rotate_half(x) * sin, as transformers' apply_rotary_pos_emb.

    query [B, H, S, D] and key [B, K, S, D] with cos and sin [B or 1, S, D]; or packed rows, query [R, H, D] and key
    [R, K, D] with cos and sin [R, D] or [R, 1, D]. D is even; strides of heads and rows are arbitrary. is_signed: the
    first half of sin is already negated, as rotate_half would do.
    Returns both in the dtype of a product with cos. Gradients flow to query and key (rotated by the negative angles),
    none to cos and sin, the only tensors saved for the backward pass.
    For N values of b bytes in query and key: 3N FLOPs and at least 2Nb bytes, forward and backward.
    Raises ValueError for mismatched shapes or tensors that are not floating.
    """
    if query.dim() == 3:
        if cos.dim() == 3 and cos.shape[1] == sin.shape[1] == 1:
            cos, sin = cos.squeeze(1), sin.squeeze(1)
        _check(query, key, cos, sin, ("R", "heads", "D"), query.shape[0:1])
        turned = _rope(query.transpose(0, 1)[None], key.transpose(0, 1)[None], cos[None], sin[None], is_signed)
        return turned[0][0].transpose(0, 1), turned[1][0].transpose(0, 1)
    _check(query, key, cos, sin, ("B", "heads", "S", "D"), query.shape[0:3:2])
    return _rope(query, key, cos, sin, is_signed)


def _check(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, names: tuple[str, ...], rows: torch.Size) -> None:
    sizes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)}"
    heads = names.index("heads")
    alike = (shape[:heads] + shape[heads + 1 :] for shape in (query.shape, key.shape) if len(shape) == len(names))
    size = query.shape[-1] if query.dim() else 1
    if len({*alike}) != 1 or query.dim() != len(names) or key.dim() != len(names) or size % 2:
        raise ValueError(f"query and key must be [{', '.join(names)}] but for their heads, D even; got {sizes}")
    tables = [(*rows, size), (1, *rows[1:], size)] if len(rows) == 2 else [(*rows, size)]
    if cos.shape != sin.shape or tuple(cos.shape) not in tables:
        raise ValueError(f"cos and sin must be {' or '.join(map(str, dict.fromkeys(tables)))}; got {sizes}")
    if not all(t.is_floating_point() for t in (query, key, cos, sin)):
        raise ValueError(f"all must be floating, got {query.dtype}, {key.dtype}, {cos.dtype}, {sin.dtype}")


def empty_out(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for the rotated x: with x's strides if each row's values are contiguous in x."""
    if x.stride(-1) == 1:
        out = torch.empty_like(x, dtype=dtype)
        if out.stride(-1) == 1:
            return out
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def _side_by_side(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _turn(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, is_signed: bool, inverse: bool, dtypes: list[torch.dtype]
) -> tuple[Tensor, Tensor]:
    outs = empty_out(query, dtypes[0]), empty_out(key, dtypes[1])
    given = (query, key, cos, sin)
    if backend.choose("rope", query.device.type, {"triton": triton_support.unfit(*given)}) == "triton":
        from llava_fast.ops.rope import triton_kernels

        query, key, cos, sin = (_side_by_side(t) for t in given)
        triton_kernels.rope(query, key, cos, sin, is_signed, inverse, outs)
    else:
        reference.rope(*given, is_signed, inverse, outs)
    return outs


def _dtypes(query: Tensor, key: Tensor, cos: Tensor) -> list[torch.dtype]:
    return [torch.promote_types(x.dtype, cos.dtype) for x in (query, key)]


def _run(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, is_signed: bool) -> tuple[Tensor, Tensor]:
    return _turn(query, key, cos, sin, is_signed, False, _dtypes(query, key, cos))


def _run_backward(
    grad_query: Tensor,
    grad_key: Tensor,
    cos: Tensor,
    sin: Tensor,
    is_signed: bool,
    query_dtype: torch.dtype,
    key_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return _turn(grad_query, grad_key, cos, sin, is_signed, True, [query_dtype, key_dtype])


def _fake(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, is_signed: bool) -> tuple[Tensor, Tensor]:
    dtypes = _dtypes(query, key, cos)
    return empty_out(query, dtypes[0]), empty_out(key, dtypes[1])


def _save(ctx, inputs, output) -> None:
    query, key, cos, sin, is_signed = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(cos, sin)
    ctx.is_signed, ctx.dtypes = is_signed, [query.dtype, key.dtype]


def _backward(ctx, grad_query: Tensor | None, grad_key: Tensor | None):
    cos, sin = ctx.saved_tensors
    grads = [
        grad if need else None for grad, need in zip((grad_query, grad_key), ctx.needs_input_grad[:2], strict=True)
    ]
    like = next((grad for grad in grads if grad is not None), None)
    if like is None:
        return None, None, None, None, None
    # A missing gradient becomes a tensor with no heads.
    given = [like[:, :0] if grad is None else grad for grad in grads]
    found = _rope_backward(*given, cos, sin, ctx.is_signed, *ctx.dtypes)
    return *(None if grad is None else of for grad, of in zip(grads, found, strict=True)), None, None, None


_rope_backward = library.define(
    "rope_backward(Tensor grad_query, Tensor grad_key, Tensor cos, Tensor sin, bool is_signed,"
    " ScalarType query_dtype, ScalarType key_dtype) -> (Tensor, Tensor)",
    _run_backward,
    lambda grad_query, grad_key, cos, sin, is_signed, query_dtype, key_dtype: (
        empty_out(grad_query, query_dtype),
        empty_out(grad_key, key_dtype),
    ),
)
_rope = library.define(
    "rope(Tensor query, Tensor key, Tensor cos, Tensor sin, bool is_signed) -> (Tensor, Tensor)",
    _run,
    _fake,
    _backward,
    _save,
)
