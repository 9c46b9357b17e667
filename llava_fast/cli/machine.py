"""`llava-fast doctor`, `tune` and `demo`: diagnose this machine, tune ops for it, and run the demo model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llava_fast.cli.options import Device, Dtype, Precision, Quantize


def doctor(
    model: Annotated[
        str | None, typer.Option(help="A Hugging Face checkpoint: show what accelerate would replace in it.")
    ] = None,
) -> None:
    """Show devices and versions, which implementation each op would use here and why, and what accelerate replaces.

    llava-fast doctor --model llava-hf/llava-v1.6-mistral-7b-hf
    """
    from llava_fast.doctor import report

    typer.echo(report(model))


def tune(
    model: Annotated[str | None, typer.Argument(help="A checkpoint directory or a Hub id. Default: the demo.")] = None,
    training: Annotated[bool, typer.Option("--training", help="Include the calls of a training step.")] = False,
    budget: Annotated[float, typer.Option(min=0.0, help="Seconds to spend on tests.")] = 600.0,
    device: Device = None,
    dtype: Dtype = None,
    precision: Precision = None,
    quantize: Quantize = None,
) -> None:
    """Find the fastest correct implementation of each op call that a model makes on this machine, and store it.

    llava-fast tune llava-hf/llava-v1.6-mistral-7b-hf --training
    """
    from llava_fast.tune import tune as run

    run(model, training, budget, device, dtype, precision, quantize)


def demo(
    image: Annotated[Path | None, typer.Option(help="Use your own image of digits instead.")] = None,
    question: Annotated[str, typer.Option(help="The question about your own image.")] = "What digits are written here?",
    seed: Annotated[int, typer.Option(help="Seed of the composed image.")] = 0,
    output: Annotated[Path, typer.Option(help="Where to save the composed image.")] = Path("llava_fast_demo.png"),
    compare: Annotated[bool, typer.Option(help="Also time transformers with the same weights.")] = True,
) -> None:
    """Ask a small trained LLaVA-NeXT about an image of handwritten digits, and time each stage.

    The model (a few MB) ships with the package and was trained in examples/digits.
    """
    from llava_fast.demo.run import run_demo

    run_demo(image, question, seed, output, compare)
