"""LayerNorm together with the step before it, so that the rows between the two are not written and read again.

`pending` is a step of the residual stream x that is still to be taken: None (no step), a tensor of x's shape to add, or
a LayerNorm to apply. The two are one op where a backend fuses them, and PyTorch's own steps elsewhere: an op that only
runs those same steps costs 20 microseconds of a call, which a small tower on a CPU would feel.
"""

from __future__ import annotations

from torch import Tensor, nn

from llava_fast.models.modules import is_plain, is_plain_parameter
from llava_fast.ops import add_layer_norm, backend, double_layer_norm, layer_norm

Pending = Tensor | nn.Module | None


def finish(x: Tensor, pending: Pending) -> Tensor:
    """x after its pending step."""
    if pending is None:
        return x
    return x + pending if isinstance(pending, Tensor) else pending(x)


def finish_and_norm(x: Tensor, pending: Pending, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """(s, norm(s)) where s is x after its pending step. A norm that is wrapped or hooked runs its own forward."""
    adds = isinstance(pending, Tensor)
    fuses = backend.fuses("layer_norm", x.device.type)
    if not (fuses and _is_plain_norm(norm) and (pending is None or adds or _is_plain_norm(pending))):
        s = finish(x, pending)
        return s, norm(s)
    if pending is None:
        return x, layer_norm(x, norm.weight, norm.bias, norm.eps)
    if adds:
        return add_layer_norm(x, pending, norm.weight, norm.bias, norm.eps)
    return double_layer_norm(x, pending.weight, pending.bias, pending.eps, norm.weight, norm.bias, norm.eps)


def _is_plain_norm(module: nn.Module) -> bool:
    """Whether it is a LayerNorm over the last dimension with ordinary parameters (not sharded, none missing)."""
    return is_plain(module, nn.LayerNorm) and all(
        is_plain_parameter(parameter) and parameter.dim() == 1 for parameter in (module.weight, module.bias)
    )
