"""Arguments and options shared by several commands."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

Model = Annotated[str, typer.Argument(help="A checkpoint directory (Hugging Face or original layout) or a Hub id.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ... Default: CUDA if there is one.")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16. Default: the checkpoint's (CPU: float32).")
]
Template = Annotated[
    str | None,
    typer.Option(help="Use this built-in chat template, not the checkpoint's: vicuna_v1, llama_2, mistral, ..."),
]
ModelBase = Annotated[str | None, typer.Option(help="The base model, for a LoRA or projector-only directory.")]
Quantize = Annotated[
    Literal["int8", "int4"] | None,
    typer.Option(help="Quantise the decoder's weights to 8 or 4 bits while loading. Default: as stored."),
]
KvCache = Annotated[
    Literal["int8"] | None,
    typer.Option(help="Keep keys and values in 8 bits while answering. Default: in the decoder's dtype."),
]

Precision = Annotated[
    Literal["int8", "fp8"] | None,
    typer.Option(help="Multiply images' and prompts' rows in 8 bits, on CUDA where that is faster. Default: --dtype."),
]


def load_model(
    model: str,
    device: str | None,
    dtype: str | None,
    chat_template: str | None,
    model_base: str | None,
    **options: Any,
) -> Any:
    from llava_fast.api import load

    return load(model, device=device, dtype=dtype, chat_template=chat_template, model_base=model_base, **options)
