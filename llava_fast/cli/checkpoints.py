"""`llava-fast convert` and `llava-fast merge-lora`: convert checkpoints."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from llava_fast.cli.options import Dtype, Model, ModelBase, Quantize, Template, load_model


def convert(
    model: Model,
    output: Annotated[Path, typer.Argument(help="The directory to write; it must not exist yet, or be empty.")],
    layout: Annotated[
        Literal["hf", "original"], typer.Option(help="hf (transformers) or original (the LLaVA repositories').")
    ] = "hf",
    dtype: Dtype = None,
    quantize: Quantize = None,
    group: Annotated[
        int | None, typer.Option(help="Values that share a scale: 32, 64 or 128. Default: int4 32, int8 a whole row.")
    ] = None,
    zero_points: Annotated[bool, typer.Option("--zero-points", help="int4: a zero point for each group.")] = False,
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Calibrate the quantised weights with samples of this training data (LLaVA's format, JSON or JSON "
            "lines), images included. Needs pip install 'llava_fast\\[calibrate]'.",
        ),
    ] = None,
    method: Annotated[
        Literal["gptq", "awq"] | None, typer.Option(help="How --calibrate chooses them. Default: gptq.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="How many samples calibrate, drawn by --seed. Default: 256, or all.")
    ] = None,
    images: Annotated[
        str | None, typer.Option(help="The folder of the data's images. Default: that of the data file.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of the order in which samples are drawn. Default: 0.")
    ] = None,
    model_base: ModelBase = None,
    text_encoder: Annotated[
        str | None, typer.Option(help="Begin BLIP-2's stage 1: MODEL's tower, and a Q-Former from this BERT.")
    ] = None,
    decoder: Annotated[
        str | None, typer.Option(help="Begin BLIP-2's stage 2: MODEL of stage 1, and this language model.")
    ] = None,
) -> None:
    """Convert a checkpoint to the other layout, with the same answers at every image size; or quantise its weights to 8
    or 4 bits in the compressed-tensors format, rounded to nearest or calibrated with data; or make a new BLIP-2 for
    its stage 1 or 2.

    \b
    llava-fast convert liuhaotian/llava-v1.5-7b ./llava-1.5-7b-hf --layout hf
    llava-fast convert llava-hf/llava-1.5-7b-hf ./llava-1.5-7b-int4 --quantize int4
    llava-fast convert Salesforce/blip2-opt-2.7b ./stage-one --text-encoder bert-base-uncased
    llava-fast convert runs/blip-2-stage1/model ./stage-two --decoder facebook/opt-2.7b
    llava-fast convert llava-hf/llava-1.5-7b-hf ./llava-1.5-7b-gptq --quantize int4 --group 128 --calibrate data.json
    """
    if text_encoder is not None or decoder is not None:
        other = (quantize, group, zero_points or None, calibrate, method, samples, images, seed, model_base, dtype)
        _begin(model, output, text_encoder, decoder, any(option is not None for option in other))
        return
    from tqdm import tqdm

    from llava_fast.checkpoints.load import load_checkpoint
    from llava_fast.checkpoints.save import check_destination, check_layout, save
    from llava_fast.errors import QuantisationError
    from llava_fast.models.config import RetrievalConfig
    from llava_fast.models.quantised import Quantisation

    if quantize is None and (group is not None or zero_points):
        raise QuantisationError("--group and --zero-points need --quantize")
    if calibrate is not None and quantize is None:
        raise QuantisationError("--calibrate needs --quantize int4 or int8")
    if calibrate is None and (method, samples, images, seed) != (None,) * 4:
        raise QuantisationError("--method, --samples, --images and --seed need --calibrate DATA")
    check_destination(output)
    quantisation = quantize and Quantisation(quantize, group, symmetric=not zero_points)
    config = load_checkpoint(model, model_base=model_base).config
    if not isinstance(config, RetrievalConfig):  # which `load` explains
        check_layout(config, layout, quantised=quantisation is not None)
    bar = functools.partial(tqdm, desc="read", unit=" tensors", dynamic_ncols=True)
    if quantisation is not None and calibrate is not None:
        from llava_fast.calibration.run import calibrate as run_calibration
        from llava_fast.calibration.run import check_request

        method = method or "gptq"
        check_request(method, samples)
        if layout != "hf":
            raise QuantisationError("quantised weights are saved in the hf layout alone: leave --layout out")
        llava = load_model(model, "cpu", dtype or "auto", None, model_base, progress=bar)
        reading = functools.partial(tqdm, desc="samples", unit=" samples", dynamic_ncols=True)
        options: dict[str, Any] = {"samples": samples, "images": images, "seed": seed or 0, "progress": reading}
        run_calibration(llava, calibrate, quantisation, method=method, **options)
    else:
        llava = load_model(model, "cpu", dtype or "auto", None, model_base, quantize=quantisation, progress=bar)
    save(llava, output, layout=layout)
    typer.echo(f"wrote {output} in the {layout} layout")


def _begin(model: str, output: Path, text_encoder: str | None, decoder: str | None, other: bool) -> None:
    from llava_fast.errors import CheckpointError
    from llava_fast.retrieval import assemble_stage_one, assemble_stage_two

    if (text_encoder is not None and decoder is not None) or other:
        raise CheckpointError("--text-encoder (stage 1) or --decoder (stage 2) is given alone, without other options")
    if text_encoder is not None:
        assemble_stage_one(output, text_encoder, model)
    elif decoder is not None:
        assemble_stage_two(output, model, decoder)
    typer.echo(f"wrote {output}")


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

    DoRA, PiSSA and other adapters are merged by PEFT, or rejected with an error that names them.

    \b
    llava-fast merge-lora runs/mine/adapter ./mine --model-base llava-hf/llava-1.5-7b-hf
    llava-fast merge-lora liuhaotian/llava-v1.5-7b-lora ./merged --model-base lmsys/vicuna-7b-v1.5 --layout hf

    Training with `lora` already writes the merged model, to the output's model/.
    """
    from llava_fast.checkpoints.adapters import check_adapter
    from llava_fast.checkpoints.save import check_destination, save

    check_adapter(adapter)
    check_destination(output)
    llava = load_model(adapter, "cpu", dtype or "auto", chat_template, model_base)
    layout = layout or llava.config.layout
    save(llava, output, layout=layout)
    typer.echo(f"wrote {output} in the {layout} layout")
