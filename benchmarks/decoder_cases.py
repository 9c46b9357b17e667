"""The decoder's ops at the sizes of a prompt with so many tiles: rms_norm, rope, swiglu, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.op_case import OpCase, Widths, doubled, first_gradient
from llava_fast import ops

TEXT, HEAD, EPS = 64, 128, 1e-5


def _rows(tiles: int, widths: Widths) -> int:
    return tiles * (widths.tile // widths.patch) ** 2 + TEXT


def _random(count: int, *shape: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype, device=device) for _ in range(count)]


def _plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return ops.rms_norm(x, weight, EPS)


def rms_norm(tiles: int, dtype: torch.dtype, device: torch.device, widths: Widths) -> OpCase:
    """A residual add and the RMSNorm after it, as within a layer."""
    rows, width = _rows(tiles, widths), widths.decoder
    given = _random(2, rows, width, dtype=dtype, device=device)
    weight = torch.randn(width, dtype=dtype, device=device)

    def run(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        return ops.add_rms_norm(x, residual, weight, EPS)[1]

    return OpCase(
        "add_rms_norm",
        f"{tiles} tiles",
        rows,
        5 * rows * width,
        4 * rows * width * dtype.itemsize,
        ("rms_norm_kernel",),
        lambda: run(*given, weight),
        lambda: _plain_norm(given[0] + given[1], weight),
        lambda: run(*doubled([*given, weight])),
    )


def rms_norm_gradients(tiles: int, dtype: torch.dtype, device: torch.device, widths: Widths) -> OpCase:
    """Both passes; what is compared is the gradient of x."""
    rows, width = _rows(tiles, widths), widths.decoder
    x, grad = _random(2, rows, width, dtype=dtype, device=device)
    given = [x, torch.randn(width, dtype=dtype, device=device)]
    return OpCase(
        "rms_norm_backward",
        f"{tiles} tiles",
        rows,
        13 * rows * width,
        5 * rows * width * dtype.itemsize,  # the forward pass runs too
        ("rms_norm_backward_kernel",),
        lambda: first_gradient(_norm, given, [grad]),
        lambda: first_gradient(_plain_norm, given, [grad]),
        lambda: first_gradient(_norm, doubled(given), [grad.double()]),
    )


def _turned(tiles: int, dtype: torch.dtype, device: torch.device, widths: Widths) -> tuple[list[Tensor], list[Tensor]]:
    """([query, key], [cos, sin]) as transformers has them: views of [1, S, H, D], as many key heads as query heads."""
    size = min(HEAD, widths.decoder)
    rows = _rows(tiles, widths)
    both = _random(2, 1, rows, widths.decoder // size, size, dtype=dtype, device=device)
    angle = torch.rand(1, rows, size // 2, device=device).repeat(1, 1, 2) * 6
    return [x.transpose(1, 2) for x in both], [angle.cos().to(dtype), angle.sin().to(dtype)]


def _plain_rope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]

    return turn(query), turn(key)


def rope(tiles: int, dtype: torch.dtype, device: torch.device, widths: Widths) -> OpCase:
    """Queries and keys of one layer; what is compared is the queries."""
    given, tables = _turned(tiles, dtype, device, widths)
    values = 2 * given[0].numel()
    return OpCase(
        "rope",
        f"{tiles} tiles",
        _rows(tiles, widths),
        3 * values,
        2 * values * dtype.itemsize,
        ("rope_kernel",),
        lambda: ops.rope(*given, *tables)[0],
        lambda: _plain_rope(*given, *tables)[0],
        lambda: ops.rope(*doubled(given), *doubled(tables))[0],
    )


def rope_gradients(tiles: int, dtype: torch.dtype, device: torch.device, widths: Widths) -> OpCase:
    """Both passes; what is compared is the gradient of the queries."""
    given, tables = _turned(tiles, dtype, device, widths)
    grads = [torch.randn_like(x) for x in given]
    values, exact = 2 * given[0].numel(), doubled(tables)
    return OpCase(
        "rope_backward",
        f"{tiles} tiles",
        _rows(tiles, widths),
        6 * values,
        4 * values * dtype.itemsize,
        ("rope_kernel",),
        lambda: first_gradient(lambda q, k: ops.rope(q, k, *tables), given, grads),
        lambda: first_gradient(lambda q, k: _plain_rope(q, k, *tables), given, grads),
        lambda: first_gradient(lambda q, k: ops.rope(q, k, *exact), doubled(given), doubled(grads)),
    )


def _gated(tiles: int, dtype: torch.dtype, device: torch.device, widths: Widths) -> list[Tensor]:
    """gate, up and a gradient at the width of Llama's MLP: 43/16 of the decoder's."""
    return _random(3, _rows(tiles, widths), widths.decoder * 43 // 16, dtype=dtype, device=device)


def _plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def swiglu(tiles: int, dtype: torch.dtype, device: torch.device, widths: Widths) -> OpCase:
    gate, up, _ = _gated(tiles, dtype, device, widths)
    return OpCase(
        "swiglu",
        f"{tiles} tiles",
        len(gate),
        6 * gate.numel(),
        3 * gate.numel() * dtype.itemsize,
        ("swiglu_kernel",),
        lambda: ops.swiglu(gate, up),
        lambda: _plain_swiglu(gate, up),
        lambda: ops.swiglu(gate.double(), up.double()),
    )


def swiglu_gradients(tiles: int, dtype: torch.dtype, device: torch.device, widths: Widths) -> OpCase:
    """Both passes; what is compared is the gradient of the gate."""
    gate, up, grad = _gated(tiles, dtype, device, widths)
    return OpCase(
        "swiglu_backward",
        f"{tiles} tiles",
        len(gate),
        18 * gate.numel(),
        8 * gate.numel() * dtype.itemsize,  # the forward pass runs too
        ("swiglu_backward_kernel",),
        lambda: first_gradient(ops.swiglu, [gate, up], [grad]),
        lambda: first_gradient(_plain_swiglu, [gate, up], [grad]),
        lambda: first_gradient(ops.swiglu, doubled([gate, up]), [grad.double()]),
    )


DECODER_CASES = (rms_norm, rms_norm_gradients, rope, rope_gradients, swiglu, swiglu_gradients)
