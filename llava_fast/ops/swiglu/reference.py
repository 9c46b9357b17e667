"""silu(gate) * up in plain PyTorch: the specification of `llava_fast.ops.swiglu`.

silu(gate) is rounded to gate's dtype before the product, as in the unfused steps. Source: Shazeer 2020.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up in the dtype of the product."""
    out = F.silu(gate)
    # In place if the dtype allows it: on a CPU the cost of large rows is mostly memory allocation.
    return out.mul_(up) if out.dtype == torch.promote_types(out.dtype, up.dtype) else out * up


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor, needed: list[bool]) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of gate and up, None where not needed; `up` may be empty if only its own gradient is needed."""
    of_gate = of_up = None
    if needed[1]:
        of_up = swiglu(gate, grad)
    if needed[0]:
        of_gate = (grad * up).to(gate.dtype)
        torch.ops.aten.silu_backward.grad_input(of_gate, gate, grad_input=of_gate)
    return of_gate, of_up
