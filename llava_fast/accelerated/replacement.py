"""Replaces a method of one object such that after deepcopy or pickle the replacement uses the copy's weights.

A replacement is `functools.partial(function, module)` of a module-level function, stored in the instance's dict. A
closure would keep using the original's weights; a bound method cannot be pickled as part of its own object.
"""

from __future__ import annotations

import functools
import inspect
import logging
import pickle
from collections.abc import Callable
from typing import Any

from torch import nn

logger = logging.getLogger("llava_fast.integrations")
TOLD = "_llava_fast_told"


def replace(module: nn.Module, name: str, function: Callable[..., Any], more: tuple[str, ...] = ()) -> bool:
    """Make `module.name(...)` call `function(module, ...)`. The signature, which Trainer and generate inspect, is that
    of the replaced method with `more` keywords. Returns False without a change if other code has already replaced the
    method."""
    if name in vars(module):
        return is_replaced(module, name)
    bound = functools.partial(function, module)
    bound.__signature__ = _with_keywords(stock_signature(type(module), name), more)  # type: ignore[attr-defined]
    setattr(module, name, bound)
    return True


def _with_keywords(signature: inspect.Signature, names: tuple[str, ...]) -> inspect.Signature:
    parameters = list(signature.parameters.values())
    rest = [parameters.pop()] if parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD else []
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]
    return signature.replace(parameters=[*parameters, *added, *rest])


def is_replaced(module: nn.Module, name: str) -> bool:
    """Whether `module.name` is one of this package's replacements that has not been wrapped since."""
    found = vars(module).get(name)
    return isinstance(found, functools.partial) and found.func.__module__.startswith("llava_fast.")


def put_back(module: nn.Module, name: str) -> bool:
    """Undo `replace`; False if the method was not replaced or the replacement has been wrapped since."""
    if not is_replaced(module, name):
        return False
    delattr(module, name)
    return True


def stock_signature(kind: type, name: str) -> inspect.Signature:
    """The signature of a bound method, without annotations that cannot be pickled. (The others show callers which
    `**kwargs` are accepted, such as `output_attentions`.)"""
    return _signature(getattr(kind, name))


@functools.lru_cache(maxsize=256)
def _signature(method: Callable[..., Any]) -> inspect.Signature:
    _, *parameters = inspect.signature(method).parameters.values()
    return inspect.Signature([_picklable(parameter) for parameter in parameters])


def _picklable(parameter: inspect.Parameter) -> inspect.Parameter:
    try:
        pickle.dumps(parameter.annotation)
    except (pickle.PicklingError, TypeError, AttributeError):
        return parameter.replace(annotation=inspect.Parameter.empty)
    return parameter


def by_name(module: nn.Module, name: str, args: tuple, kwargs: dict) -> dict:
    """All arguments of a call by name."""
    if not args:
        return kwargs
    return dict(zip(stock_signature(type(module), name).parameters, args, strict=False)) | kwargs


def stock(module: nn.Module, name: str, given: dict) -> Any:
    """Call the replaced stock method."""
    return getattr(type(module), name)(module, **given)


def tell_stock(module: nn.Module, what: str, why: str) -> None:
    """Log, once per reason, that a call takes the stock path."""
    told = vars(module).setdefault(TOLD, set())
    if (what, why) not in told:
        told.add((what, why))
        logger.warning("%s takes the stock path: %s", what, why)
