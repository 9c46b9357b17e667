"""What a case of one op is: sizes, floors, and the three ways to compute it; the cases are in *_cases.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Widths:
    """Of the tower, its MLP, the decoder; pixels of a tile and of a patch; the vocabulary."""

    vision: int = 1024
    mlp: int = 4096
    decoder: int = 4096
    tile: int = 336
    patch: int = 14
    vocabulary: int = 32064


@dataclass(frozen=True)
class OpCase:
    """One op at one size.

    run      the op, on whatever backend is asked for; with `trained`, also its backward pass.
    plain    the same in unfused PyTorch (cuBLAS), as a careful user would write it.
    exact    the op's reference in float64.
    kernels  the Triton kernels whose configuration decides its time; `rows` is what their tables are asked for.
    comparable  plain() computes the same output. False: it computes only a lower bound of the work; its error is not
             checked.
    backend  of the op, to be measured.
    limit    the error allowed, ||found - exact|| / ||exact||; None: what the dtype allows.
    bare     what a target is stated against, where that is not `plain` (docs/performance.md, "Targets").
    wall     its times are the wall clock's, host work included, instead of the GPU's alone.
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
    """Both passes; the first argument's gradient."""
    leaves = [leaf.detach().requires_grad_() for leaf in given]
    outs = run(*leaves)
    return torch.autograd.grad(outs if isinstance(outs, tuple) else (outs,), leaves, grads)[0]


def doubled(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]
