"""What every kernel's tests share: where they run, in which dtypes, and how far a result may lie from float64."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from llava_fast.ops import use_backend
from llava_fast.ops.selection import store, tables
from llava_fast.ops.selection.verdict import Verdict

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if DEVICE == "cuda" else (torch.float32, torch.float16)
"""The interpreter's bfloat16 casts truncate, so bfloat16 is checked on a GPU."""

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Largest ||out - exact|| / ||exact||: a few roundings of the dtype, whatever the sum's length (float32 sums)."""


def relative(found: Tensor, exact: Tensor) -> float:
    """||found - exact|| / ||exact|| in float64; infinite for NaN, an unwritten output or another shape."""
    assert found.shape == exact.shape, f"shape {tuple(found.shape)}, expected {tuple(exact.shape)}"
    found, exact = found.detach().double().cpu(), exact.detach().double().cpu()
    error = ((found - exact).norm() / exact.norm().clamp_min(1e-30)).item() if exact.numel() else 0.0
    return error if error == error else float("inf")


@contextlib.contextmanager
def running(form: str) -> Iterator[None]:
    """Inside the block ops run this form: a backend, or "cublas", which only a verdict takes."""
    if form != "cublas":
        with use_backend(form):
            yield
        return
    settings = tables.settings()
    before, pins = settings.pinned, dict.fromkeys(("linear_act", "assemble_inputs"), Verdict(backend=form))
    settings.pinned = store.Table(verdicts=pins)
    try:
        yield
    finally:
        settings.pinned = before


def check_op(op, args: list, trained: list[int], backend: str, exact_op=None, tolerance: float | None = None) -> None:
    """Run `op` on `backend` and compare output and gradients with the reference (or `exact_op`) in float64 on the CPU.

    `args` holds tensors, lists and named tuples of them, and other values; `op` must hold no tensors of its own, or
    the exact side would meet some of the device's. Floating tensors are cast to float64 for the reference.
    `trained` are the indices of tensors that want a gradient; the others must get none.
    """
    exact_args = tree_map_only(Tensor, _exact, args)
    args = tree_map_only(Tensor, Tensor.detach, args)  # no copies: a copy of a strided view is contiguous
    for index in trained:
        args[index].requires_grad_()
        exact_args[index].requires_grad_()
    with running(backend):
        out = op(*args)
    with use_backend("reference"):  # "auto" may be the very kernel that is checked
        exact = (exact_op or op)(*exact_args)
    limit = tolerance or TOLERANCE[out.dtype]
    assert relative(out, exact) <= limit, f"output: {relative(out, exact):.1e}"
    if not trained:
        assert not out.requires_grad
        return
    grad = torch.randn(exact.shape, dtype=torch.float64)
    with use_backend("reference"):
        expected = torch.autograd.grad(exact, [exact_args[i] for i in trained], grad.to(out.dtype).double())
    with running(backend):
        found = torch.autograd.grad(out, [args[i] for i in trained], grad.to(out.device, out.dtype))
    for index, mine, theirs in zip(trained, found, expected, strict=True):
        assert mine.dtype == args[index].dtype
        assert relative(mine, theirs) <= limit, f"gradient of argument {index}: {relative(mine, theirs):.1e}"


def _exact(tensor: Tensor) -> Tensor:
    """Its own copy on the CPU, in float64 if it is floating."""
    return tensor.detach().to("cpu", torch.float64 if tensor.is_floating_point() else tensor.dtype, copy=True)
