"""Several Linear layers of one input as one matrix product, their weights laid end to end.

Only where backend "triton" is asked for: on a CPU one product of 3 x 1024 columns takes as long as three of 1024, and
no GPU has been measured. Frozen weights that lie end to end in memory are joined as they are; others are joined at each
call, which moves a few megabytes. No joined copy is kept: it would go stale when someone writes a weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
    weight = _joined([linear.weight for linear in linears])
    bias = None if linears[0].bias is None else _joined([linear.bias for linear in linears])
    return F.linear(x, weight, bias).split([linear.out_features for linear in linears], dim=-1)


def lay_end_to_end(*linears: nn.Module) -> None:
    """Move the weights of `linears` end to end in memory, and their biases, if they are ones that `run_linears` joins.

    The parameters stay the same objects with the same values, but share one storage, which `give_own_storages` hides
    from checkpoints. They part again when they move to another device or dtype one by one."""
    if not _can_be_joined(linears):
        return
    for name in ("weight", "bias"):
        parts = [getattr(linear, name) for linear in linears]
        if parts[0] is None or _lie_end_to_end(parts):
            continue
        with torch.inference_mode(parts[0].is_inference()), torch.no_grad():
            joined = torch.cat(parts)
        for part, moved in zip(parts, joined.split([len(part) for part in parts]), strict=True):
            part.data = moved


def give_own_storages(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: object) -> None:
    """A hook on `module`'s state_dict: its tensors that share a storage become the same memory under storages of their
    own. safetensors refuses tensors that do not fill their storage, and accelerate writes only one of those that share
    one. With keep_vars=True, which gives parameters, they are left as they are."""
    for name in (prefix + name for name, _ in module.named_parameters()):
        tensor = state_dict.get(name)
        if type(tensor) is Tensor and not tensor.is_meta and tensor.untyped_storage().nbytes() > tensor.nbytes:
            state_dict[name] = torch.from_dlpack(tensor.view(torch.uint8)).view(tensor.dtype)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """[sum of rows, ...]: the memory of the parts as it is, if no gradient has to find its way back to each."""
    needs_gradient = torch.is_grad_enabled() and any(part.requires_grad for part in parts)
    if needs_gradient or not _lie_end_to_end(parts):
        return torch.cat(list(parts))
    first = parts[0].detach()
    return first.as_strided((sum(len(part) for part in parts), *first.shape[1:]), first.stride())


def _lie_end_to_end(parts: Sequence[Tensor]) -> bool:
    storage, place = parts[0].untyped_storage()._cdata, parts[0].storage_offset()
    for part in parts:
        if part.untyped_storage()._cdata != storage or part.storage_offset() != place or not part.is_contiguous():
            return False
        place += part.numel()
    return True


def _can_be_joined(linears: Sequence[nn.Module]) -> bool:
    """Whether all are plain Linears, of ordinary parameters (none sharded or quantised) of one dtype on one device, all
    or none with a bias."""
    if not all(is_plain(linear, nn.Linear) for linear in linears):
        return False  # and may have no weight, or one that is made when it is asked for
    biases = [linear.bias for linear in linears if linear.bias is not None]
    parts = [*(linear.weight for linear in linears), *biases]
    return (
        all(is_plain_parameter(part) for part in parts)
        and len({(part.dtype, part.device) for part in parts}) == 1
        and len(biases) in (0, len(linears))
    )
