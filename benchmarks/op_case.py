"""A benchmark case of one op: sizes, lower bounds, and the implementations to compare. The cases are in *_cases.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Widths:
    """Widths of the tower, its MLP and the decoder, sizes of tiles and patches in pixels, and the vocabulary size."""

    vision: int = 1024
    mlp: int = 4096
    decoder: int = 4096
    tile: int = 336
    patch: int = 14
    vocabulary: int = 32064


@dataclass(frozen=True)
class OpCase:
    """One op at one size.

    run      the op on the requested backend; with `trained`, also its backward pass.
    plain    the same in unfused PyTorch (cuBLAS), as a careful user would write it.
    exact    the op's reference in float64.
    kernels  the Triton kernels to tune; `rows` is the number of rows for the lookup in their tables.
    comparable  plain() computes the same output. False: it computes only a lower bound of the work; its error is not
             checked.
    backend  of the op, to be measured.
    limit    the error allowed, ||found - exact|| / ||exact||; None: what the dtype allows.
    bare     the baseline of a target, if it is not `plain` (docs/performance.md, "Targets").
    wall     times are wall-clock times, including host work, instead of GPU times.
    """

    op: str
    label: str
    rows: int
    flops: float
    bytes: float
    kernels: tuple[str, ...]
    run: Callable[[], Tensor]
    plain: Callable[[], Tensor]
    exact: Callable[[], Tensor]
    comparable: bool = True
    backend: str = "triton"
    limit: float | None = None
    bare: Callable[[], object] | None = None
    wall: bool = False


def first_gradient(run: Callable, given: list[Tensor], grads: list[Tensor]) -> Tensor:
    """Run both passes and return the gradient of the first argument."""
    leaves = [leaf.detach().requires_grad_() for leaf in given]
    outs = run(*leaves)
    return torch.autograd.grad(outs if isinstance(outs, tuple) else (outs,), leaves, grads)[0]


def doubled(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]
