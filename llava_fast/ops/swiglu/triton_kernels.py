"""swiglu in Triton: elementwise over possibly strided rows (halves of a wider product). Backward recomputes silu(gate).

Bytes for R rows of C values of b bytes: forward 3RCb, backward 5RCb.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from llava_fast.ops import triton_support
from llava_fast.ops.triton_support import Specimen


@triton.jit
def swiglu_kernel(gate_ptr, up_ptr, out_ptr, gate_stride, up_stride, width, BLOCK: tl.constexpr):
    """out = silu(gate), rounded to its dtype, times up."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    silu = (gate * tl.sigmoid(gate)).to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row * width + columns, (silu * up).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward_kernel(
    grad_ptr,
    gate_ptr,
    up_ptr,
    of_gate_ptr,
    of_up_ptr,
    grad_stride,
    gate_stride,
    up_stride,
    width,
    BLOCK: tl.constexpr,
):
    """The gradients of gate and of up; the pointer of a gradient that is not needed is None."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    grad = tl.load(grad_ptr + row * grad_stride + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    if of_up_ptr is not None:
        of_up = grad * gate * sigmoid
        tl.store(of_up_ptr + row * width + columns, of_up.to(of_up_ptr.dtype.element_ty), mask=inside)
    if of_gate_ptr is not None:
        up = tl.load(up_ptr + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
        of_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
        tl.store(of_gate_ptr + row * width + columns, of_gate.to(of_gate_ptr.dtype.element_ty), mask=inside)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Both [..., width] of one dtype; the result is contiguous."""
    out = gate.new_empty(gate.shape)
    if out.numel():
        gate, up = _rows(gate), _rows(up)
        rows, width = gate.shape
        launch = triton_support.config("swiglu_kernel", gate.device, rows)
        grid = (rows, triton.cdiv(width, launch["BLOCK"]))
        swiglu_kernel[grid](gate, up, out, gate.stride(0), up.stride(0), width, **launch)
    return out


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor, needed: list[bool]) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of gate and up, None where not needed; `up` may be empty if only its own gradient is needed."""
    of_gate, of_up = (gate.new_empty(gate.shape) if need else None for need in needed)
    if gate.numel():
        grad, gate = _rows(grad), _rows(gate)
        up = _rows(up) if needed[0] else gate
        rows, width = gate.shape
        launch = triton_support.config("swiglu_backward_kernel", gate.device, rows)
        grid = (rows, triton.cdiv(width, launch["BLOCK"]))
        strides = (grad.stride(0), gate.stride(0), up.stride(0))
        swiglu_backward_kernel[grid](grad, gate, up, of_gate, of_up, *strides, width, **launch)
    return of_gate, of_up


def _rows(x: Tensor) -> Tensor:
    """x as [rows, width] with contiguous rows; a view if possible."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def specimens() -> list[Specimen]:
    """How each kernel is compiled: for widths and strides that are multiples of 16, and for width 4864 + 1."""
    found = []
    for dtype in ("bf16", "fp16", "fp32"):
        found.append(_specimen(swiglu_kernel, dtype, dtype))
        found.append(_specimen(swiglu_kernel, f"{dtype} any width", dtype, ragged=True))
        for form, absent in {"both": (), "gate": ("of_up_ptr",), "up": ("of_gate_ptr",)}.items():
            found.append(_specimen(swiglu_backward_kernel, f"{dtype} {form}", dtype, absent))
    return found


def _specimen(kernel, label: str, dtype: str, absent: tuple[str, ...] = (), ragged: bool = False) -> Specimen:
    names = [name for name in kernel.arg_names if name.islower() and name not in absent]
    signature = {name: f"*{dtype}" if name.endswith("_ptr") else "i32" for name in names}
    aligned = tuple(name for name in names if name.endswith("_ptr") or not ragged)
    return Specimen("swiglu", kernel, signature, dict.fromkeys(absent), label, aligned=aligned)
