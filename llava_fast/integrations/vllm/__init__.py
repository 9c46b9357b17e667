"""vLLM with this package's tiles, tower and projector: `pip install llava_fast` beside vLLM is enough.

vLLM calls `register` in each of its processes (entry point group "vllm.general_plugins"). It names our classes for
LLaVA's four architectures as strings, so that neither vLLM's models nor ours are imported until one is served. vLLM
keeps the scheduler, the paged cache, parallelism and the language model. LLAVA_FAST_VLLM=0 turns it off.
"""

from __future__ import annotations

import logging
import os

ARCHITECTURES = {
    "LlavaForConditionalGeneration": "llava",
    "LlavaNextForConditionalGeneration": "llava_next",
    "LlavaNextVideoForConditionalGeneration": "llava_next_video",
    "LlavaOnevisionForConditionalGeneration": "llava_onevision",
}
"""vLLM's class -> its module in vllm.model_executor.models, which is also transformers' model_type."""
TRIED = ("0.32", "0.33")
"""The first and the last minor version of vLLM that the tests of `make test-vllm` were run with, both included."""
SWITCH = "LLAVA_FAST_VLLM"
_TOLD = "LLAVA_FAST_VLLM_TOLD"
logger = logging.getLogger("llava_fast.integrations")


def register() -> None:
    """The entry point. An error in here leaves vLLM's own classes in place, with one warning."""
    if os.environ.get(SWITCH, "1") == "0":
        return
    try:
        import vllm
        from vllm import ModelRegistry

        _warn_if_untried(vllm.__version__)
        for name in ARCHITECTURES:
            ModelRegistry.register_model(name, f"{__name__}.models:{name}")
    except Exception as problem:  # of an API that we do not know; vLLM must start all the same
        tell(f"vLLM's own LLaVA classes stay: {type(problem).__name__}: {problem}")


def tell(message: str) -> None:
    """Log a warning once, also where vLLM starts further processes, which inherit the environment."""
    told = os.environ.get(_TOLD, "").split("\n")
    if message not in told:
        os.environ[_TOLD] = "\n".join([*told, message])
        logger.warning("%s", message)


def _warn_if_untried(version: str) -> None:
    first, last = (_numbers(tried) for tried in TRIED)
    if not first <= _numbers(version) <= last:
        tried = TRIED[0] if first == last else " to ".join(TRIED)
        tell(f"vLLM {version} is untried: llava_fast was tested with {tried}. {SWITCH}=0 leaves vLLM as it is")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int("".join(filter(str.isdigit, part)) or 0) for part in version.split(".")[:2])
