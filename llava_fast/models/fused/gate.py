"""The gate: whether a fused op replaces modules in this call. All conditions are in RULES and `takes`.

An op reads weights instead of calling the modules that own them, so it may run only if those modules are unchanged
since they were built. A module that is wrapped (LoRA), hooked, quantised, parametrised or sharded keeps its own
forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from llava_fast.ops import backend

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Rule:
    """When an op replaces modules.

    modules   the modules that it replaces, in words.
    traced    whether a graph traced by torch.compile contains the op (True), or PyTorch's ops, which inductor fuses.
    autocast  whether the op runs under autocast as the modules would.
    stock     whether on a CPU, in float32, the op's reference is faster than the steps of a transformers module, for
              inputs of at least LEAST values.
    """

    modules: str
    traced: bool
    autocast: bool = True
    stock: bool = False


RULES = {
    "linear": Rule("a decoder's Linear in bfloat16 on a CPU, for many rows", traced=False, autocast=False),
    "layer_norm": Rule("a tower's LayerNorm, with the add or the LayerNorm before it", traced=True),
    "linear_act": Rule("a tower's first MLP Linear and its activation", traced=True),
    "assemble_inputs": Rule("the projector's Linears and the placement of rows", traced=True, autocast=False),
    "rms_norm": Rule("a decoder's RMSNorm, with the add before it", traced=False, stock=True),
    "rope": Rule("rotary embedding of queries and keys", traced=False, stock=True),
    "paged_attention": Rule("rotary embedding and attention of a decoding step", traced=False, autocast=False),
    "scaled_linear": Rule("a Linear of a model loaded with `precision`, for many rows", traced=False, autocast=False),
    "swiglu": Rule("the product of a gated MLP's two halves", traced=False),
}


def takes(
    op: str, x: Tensor, kind: type[nn.Module] = nn.Module, *modules: nn.Module, operands: Sequence[Tensor] = ()
) -> bool:
    """Whether `op` runs for x in this call, in place of `modules`: each must be a plain `kind`. `operands` are tensors
    that must have x's dtype."""
    rule = RULES[op]
    wanted = rule.traced if torch.compiler.is_compiling() else backend.serves(op, x.device.type)
    return (
        wanted
        and (rule.autocast or not torch.is_autocast_enabled(x.device.type))
        and all(is_plain(module, kind) for module in modules)
        and all(part.dtype == x.dtype for part in operands)
    )


def takes_for_stock(op: str, x: Tensor) -> bool:
    """Whether `op` runs for x in this call in place of the steps of a transformers module. Never in a traced graph,
    which is the stock one."""
    if not is_worth_asking(x) or type(x) is not Tensor or x.dtype not in _FLOATS:
        return False
    if x.is_cpu and backend.requested() == "auto":
        return RULES[op].stock and x.dtype == torch.float32
    return takes(op, x)


def is_worth_asking(x: Tensor) -> bool:
    """False if no op can replace modules of a transformers model: in a traced graph, and for an input on a CPU so small
    that calling an op costs more than it saves. A cheap check, because a decoding step makes it at every module.
    """
    return not torch.compiler.is_compiling() and (not x.is_cpu or x.numel() >= LEAST or backend.requested() != "auto")


LEAST = 1 << 17
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def is_plain(module: nn.Module, kind: type[M]) -> TypeGuard[M]:
    """Whether an op may read a module's weights instead of calling it: it is exactly a `kind`, untouched, with ordinary
    parameters.
    """
    return is_untouched(module, kind) and all(
        parameter is None or is_plain_parameter(parameter) for parameter in module._parameters.values()
    )


def is_untouched(module: nn.Module, kind: type[M]) -> TypeGuard[M]:
    """Whether a module is an exact `kind` without hooks, parametrisation (which changes the type) or a forward of its
    own. Asked at each call."""
    return (
        type(module) is kind
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and "forward" not in vars(module)
    )


def is_plain_parameter(parameter: object) -> bool:
    """True for an ordinary parameter: not None, sharded (DTensor) or quantised. Fake parameters (torch's
    FakeTensorMode) count as ordinary.
    """
    return type(parameter) is nn.Parameter or (
        isinstance(parameter, FakeTensor) and isinstance(parameter, nn.Parameter)
    )
