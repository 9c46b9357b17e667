"""Several Linear layers of one input as one matrix product, their weights laid end to end.

Only where backend "triton" is asked for: on a CPU one product of 3 x 1024 columns takes as long as three of 1024, and
no GPU has been measured. The weights are joined at each call: that moves a few megabytes. A copy that is kept would go
stale when someone writes a weight through `.data`, and weights that share a storage are lost by savers (accelerate's,
safetensors') that take them for tied ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llava_fast.models.modules import is_plain, is_plain_parameter
from llava_fast.ops import backend


def run_linears(x: Tensor, *linears: nn.Module) -> tuple[Tensor, ...]:
    """The results of `linears` for one x [..., in features]: by one product if all are plain, else (or when
    torch.compile traces) by their calls."""
    if torch.compiler.is_compiling() or backend.requested() != "triton" or not _can_be_joined(linears):
        return tuple(linear(x) for linear in linears)
    weight = torch.cat([linear.weight for linear in linears])
    bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])
    return F.linear(x, weight, bias).split([linear.out_features for linear in linears], dim=-1)


def _can_be_joined(linears: tuple[nn.Module, ...]) -> bool:
    """Whether all are plain Linears, of ordinary parameters (none sharded or quantised) of one dtype, all or none with
    a bias."""
    if not all(is_plain(linear, nn.Linear) for linear in linears):
        return False  # and may have no weight, or one that is made when it is asked for
    biases = [linear.bias for linear in linears if linear.bias is not None]
    parts = [*(linear.weight for linear in linears), *biases]
    return (
        all(is_plain_parameter(part) for part in parts)
        and len({part.dtype for part in parts}) == 1
        and len(biases) in (0, len(linears))
    )
