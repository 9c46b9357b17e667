"""llava_fast: train and run the LLaVA family of vision-language models, fast, with the same answers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from llava_fast.api import count_tokens, load
    from llava_fast.checkpoints.save import save
    from llava_fast.integrations.transformers import accelerate, restore

_HOMES = {
    "load": "llava_fast.api",
    "count_tokens": "llava_fast.api",
    "save": "llava_fast.checkpoints.save",
    "accelerate": "llava_fast.integrations.transformers",
    "restore": "llava_fast.integrations.transformers",
}

__all__ = ["__version__", "accelerate", "count_tokens", "load", "restore", "save"]


def __getattr__(name: str):
    """Import the parts that need torch only when they are used, so that `import llava_fast` is quick."""
    if name == "ops":
        return importlib.import_module("llava_fast.ops")
    if name not in _HOMES:
        raise AttributeError(f"module 'llava_fast' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
