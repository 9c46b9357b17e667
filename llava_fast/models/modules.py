"""Whether a module is just what it was built as, so that an op may read its weights instead of calling it."""

from __future__ import annotations

from torch import nn
from torch._subclasses import FakeTensor


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
