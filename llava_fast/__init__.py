"""llava_fast: trains and runs the LLaVA family of vision-language models, fast, with the same answers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from llava_fast.errors import (
    BackendError,
    BatchError,
    CacheFullError,
    CheckpointError,
    DataError,
    EndpointError,
    EvaluationError,
    GenerationError,
    ImageError,
    LlavaFastError,
    MissingFileError,
    MissingPackageError,
    PixelError,
    PlanError,
    PromptTooLongError,
    QuantisationError,
    RecipeError,
    RequestError,
    ServeError,
    TrainingError,
    UnsupportedModelError,
)
from llava_fast.version import __version__

if TYPE_CHECKING:
    from llava_fast import ops
    from llava_fast.accelerated.patch import accelerate, restore
    from llava_fast.api import count_tokens, load
    from llava_fast.calibration.run import calibrate
    from llava_fast.checkpoints.assemble import Assembly
    from llava_fast.checkpoints.save import save
    from llava_fast.generation.chat import Chat
    from llava_fast.generation.grammar import Grammar
    from llava_fast.generation.llava import Llava
    from llava_fast.generation.ranking import Candidate
    from llava_fast.generation.sampling import Sampling
    from llava_fast.generation.sequence import Generation, Usage
    from llava_fast.inputs.options import ProcessorOptions
    from llava_fast.inputs.processor import Processor
    from llava_fast.models.quantised import Quantisation
    from llava_fast.models.retrieval import RetrievalModel
    from llava_fast.retrieval import assemble_stage_one, assemble_stage_two, load_retrieval

_MODULES = {
    "Assembly": "checkpoints.assemble",
    "Candidate": "generation.ranking",
    "Chat": "generation.chat",
    "Generation": "generation.sequence",
    "Grammar": "generation.grammar",
    "Llava": "generation.llava",
    "Processor": "inputs.processor",
    "ProcessorOptions": "inputs.options",
    "Quantisation": "models.quantised",
    "RetrievalModel": "models.retrieval",
    "Sampling": "generation.sampling",
    "Usage": "generation.sequence",
    "accelerate": "accelerated.patch",
    "assemble_stage_one": "retrieval",
    "assemble_stage_two": "retrieval",
    "calibrate": "calibration.run",
    "count_tokens": "api",
    "load": "api",
    "load_retrieval": "retrieval",
    "restore": "accelerated.patch",
    "save": "checkpoints.save",
}
"""Public name -> the module that defines it, imported when the name is first used: torch takes seconds."""

__all__ = [
    "Assembly",
    "BackendError",
    "BatchError",
    "CacheFullError",
    "Candidate",
    "Chat",
    "CheckpointError",
    "DataError",
    "EndpointError",
    "EvaluationError",
    "Generation",
    "GenerationError",
    "Grammar",
    "ImageError",
    "Llava",
    "LlavaFastError",
    "MissingFileError",
    "MissingPackageError",
    "PixelError",
    "PlanError",
    "Processor",
    "ProcessorOptions",
    "PromptTooLongError",
    "Quantisation",
    "QuantisationError",
    "RecipeError",
    "RequestError",
    "RetrievalModel",
    "Sampling",
    "ServeError",
    "TrainingError",
    "UnsupportedModelError",
    "Usage",
    "__version__",
    "accelerate",
    "assemble_stage_one",
    "assemble_stage_two",
    "calibrate",
    "count_tokens",
    "load",
    "load_retrieval",
    "ops",
    "restore",
    "save",
]


def __getattr__(name: str):
    if name == "ops":
        return importlib.import_module("llava_fast.ops")
    if name not in _MODULES:
        raise AttributeError(f"module 'llava_fast' has no attribute {name!r}")
    found = getattr(importlib.import_module(f"llava_fast.{_MODULES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
