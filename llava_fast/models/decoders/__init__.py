"""Decoders: each kind is one file here and one line below, by its model_type in transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llava_fast.models.registry import Registry

if TYPE_CHECKING:
    from llava_fast.models.decoders.base import DecoderConfig

DECODERS: Registry[DecoderConfig] = Registry(
    __name__,
    {
        "llama": "llama:LlamaConfig",
        "mistral": "llama:MistralConfig",
        "mpt": "mpt:MptConfig",
        "opt": "hosted:OptConfig",
        "phi": "hosted:PhiConfig",
        "qwen": "qwen:QwenConfig",
        "qwen2": "llama:Qwen2Config",
        "qwen3": "qwen3:Qwen3Config",
        "stablelm": "hosted:StableLmConfig",
        "t5": "t5:T5Config",
    },
)
