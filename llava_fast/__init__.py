"""llava_fast: train and run the LLaVA family of vision-language models, fast, with the same answers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from llava_fast.api import count_tokens, load

_HOMES = {"load": "llava_fast.api", "count_tokens": "llava_fast.api", "ops": "llava_fast.ops"}

__all__ = ["__version__", "count_tokens", "load"]


def __getattr__(name: str):
    """Import the parts that need torch only when they are used, so that `import llava_fast` is quick."""
    if name not in _HOMES:
        raise AttributeError(f"module 'llava_fast' has no attribute {name!r}")
    module = importlib.import_module(_HOMES[name])
    return module if _HOMES[name].endswith(name) else getattr(module, name)
