"""The classes that vLLM's registry names. vLLM's own, if its API is not the one that `classes` was written for."""

from __future__ import annotations

import importlib

from llava_fast.integrations.vllm import ARCHITECTURES, tell


def _found() -> dict[str, type]:
    try:
        from llava_fast.integrations.vllm.classes import fast_class

        return {name: fast_class(_stock(name)) for name in ARCHITECTURES}
    except Exception as problem:  # a name that moved, a parameter that is gone: of any type
        tell(f"vLLM's own LLaVA classes stay: its API differs ({type(problem).__name__}: {problem})")
        return {name: _stock(name) for name in ARCHITECTURES}


def _stock(name: str) -> type:
    return getattr(importlib.import_module(f"vllm.model_executor.models.{ARCHITECTURES[name]}"), name)


globals().update(_found())
