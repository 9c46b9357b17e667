"""llava-fast convert | merge-lora: write a checkpoint in another form."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from llava_fast.cli.options import Dtype, Model, ModelBase, Template, load_model


def convert(
    model: Model,
    output: Annotated[Path, typer.Argument(help="The directory to write; it must not exist yet, or be empty.")],
    layout: Annotated[
        Literal["hf", "original"], typer.Option(help="hf (transformers) or original (the LLaVA repositories').")
    ] = "hf",
    dtype: Dtype = None,
    model_base: ModelBase = None,
) -> None:
    """Rewrite a checkpoint in the other layout; answers stay the same at every image size.

    llava-fast convert liuhaotian/llava-v1.5-7b ./llava-1.5-7b-hf --layout hf
    """
    from llava_fast.checkpoints.save import save

    llava = load_model(model, "cpu", dtype or "auto", None, model_base)
    save(llava, output, layout=layout)
    typer.echo(f"wrote {output} in the {layout} layout")


def merge_lora(
    adapter: Annotated[str, typer.Argument(help="A directory with adapter_config.json, or a Hub id.")],
    output: Annotated[Path, typer.Argument(help="The directory to write; it must not exist yet, or be empty.")],
    model_base: Annotated[
        str | None, typer.Option(help="The model that the adapter was trained on. Default: the one that it names.")
    ] = None,
    layout: Annotated[
        Literal["hf", "original"] | None, typer.Option(help="As for convert. Default: the model's own.")
    ] = None,
    dtype: Dtype = None,
    chat_template: Template = None,
) -> None:
    """Write a whole model from an adapter and its base: LoRA as W + alpha / rank * B @ A, rounded once.

    DoRA, PiSSA and other adapters are merged by PEFT, or refused by name.

    \b
    llava-fast merge-lora runs/mine/adapter ./mine --model-base llava-hf/llava-1.5-7b-hf
    llava-fast merge-lora liuhaotian/llava-v1.5-7b-lora ./merged --model-base lmsys/vicuna-7b-v1.5 --layout hf

    A training with `lora` has already written its merged model, in the output's model/.
    """
    from llava_fast.checkpoints.adapters import check_adapter
    from llava_fast.checkpoints.save import save

    check_adapter(adapter)
    llava = load_model(adapter, "cpu", dtype or "auto", chat_template, model_base)
    layout = layout or llava.config.layout
    save(llava, output, layout=layout)
    typer.echo(f"wrote {output} in the {layout} layout")
