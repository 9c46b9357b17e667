"""Functions specified by name as `module:function`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from llava_fast.errors import DataError


def function(name: str, what: str) -> Callable[..., Any]:
    """Import and return `module:function`. Raises DataError."""
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise DataError(f"{what} {name!r} is neither built in nor a function of yours, as module:function")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise DataError(f"{what} {name!r} cannot be imported: {error}") from None
    if not callable(found):
        raise DataError(f"{what} {name!r} is no function")
    return found
