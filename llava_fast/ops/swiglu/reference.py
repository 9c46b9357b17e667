"""silu(gate) * up in plain PyTorch: the specification of `llava_fast.ops.swiglu`.

silu(gate) is rounded to gate's dtype before the product, as the two steps one by one have it. Source: Shazeer 2020.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """In the dtype that the product has."""
    out = F.silu(gate)
    # In place where that changes no dtype: fresh memory is what large rows cost most on a CPU.
    return out.mul_(up) if out.dtype == torch.promote_types(out.dtype, up.dtype) else out * up


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor, needed: list[bool]) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of gate and up, None where not needed; `up` may be empty where only its own gradient is."""
    of_gate = of_up = None
    if needed[1]:
        of_up = swiglu(gate, grad)
    if needed[0]:
        of_gate = (grad * up).to(gate.dtype)
        torch.ops.aten.silu_backward.grad_input(of_gate, gate, grad_input=of_gate)
    return of_gate, of_up
