"""Whether a module is just what it was built as, so that an op may read its weights instead of calling it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from llava_fast.ops import backend


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """True for an exact `kind` without hooks, parametrisation (which changes the type) or a replaced forward.

    A wrapped (LoRA), hooked or quantised module must run its own forward; this is asked at each call.
    """
    return (
        type(module) is kind
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and "forward" not in vars(module)
    )


def is_plain_parameter(parameter: object) -> bool:
    """True for an ordinary parameter: not None, sharded (DTensor) or quantised. What stands for one while a program is
    traced (torch's FakeTensorMode) is one too."""
    return type(parameter) is nn.Parameter or (
        isinstance(parameter, FakeTensor) and isinstance(parameter, nn.Parameter)
    )


def fuses_projector(features: Tensor, weights: list[Tensor], biases: list[Tensor], table: Tensor) -> bool:
    """Whether projector and placement run as one op (ops.assemble_inputs): a backend fuses them, all operands have one
    dtype, and autocast, which would give the projected rows another dtype than the embedding `table`, is off."""
    dtypes = {part.dtype for part in (features, table, *weights, *biases)}
    device = table.device.type
    return len(dtypes) == 1 and not torch.is_autocast_enabled(device) and backend.fuses("assemble_inputs", device)
