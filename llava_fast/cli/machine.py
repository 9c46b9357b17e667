"""llava-fast doctor | tune | demo: what this machine has, what runs fastest on it, and a first answer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llava_fast.cli.options import Device, Dtype


def doctor(
    model: Annotated[
        str | None, typer.Option(help="A Hugging Face checkpoint: say what accelerate would replace in it.")
    ] = None,
) -> None:
    """Say what this machine has, which implementation each op would use here and why, and what accelerate replaces.

    llava-fast doctor --model llava-hf/llava-v1.6-mistral-7b-hf
    """
    from llava_fast.doctor import report

    typer.echo(report(model))


def tune(
    model: Annotated[str | None, typer.Argument(help="A checkpoint directory or a Hub id. Default: the demo.")] = None,
    training: Annotated[bool, typer.Option("--training", help="A training step's calls too.")] = False,
    budget: Annotated[float, typer.Option(min=0.0, help="Seconds that proofs may take.")] = 600.0,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Find for each kind of call that a model makes which form of an op is right and fastest here, and keep it.

    llava-fast tune llava-hf/llava-v1.6-mistral-7b-hf --training
    """
    from llava_fast.tune import tune as run

    run(model, training, budget, device, dtype)


def demo(
    image: Annotated[Path | None, typer.Option(help="Read the digits of your own picture instead.")] = None,
    question: Annotated[str, typer.Option(help="What to ask of your own picture.")] = "What digits are written here?",
    seed: Annotated[int, typer.Option(help="Which held-out canvas to compose.")] = 0,
    output: Annotated[Path, typer.Option(help="Where the composed picture is saved.")] = Path("llava_fast_demo.png"),
    compare: Annotated[bool, typer.Option(help="Time transformers on the same weights beside it.")] = True,
) -> None:
    """Open a picture of handwritten digits, ask a small trained LLaVA-NeXT about it, and time each stage.

    The model (a few MB) ships with the package and was trained in examples/digits.
    """
    from llava_fast.demo.run import run_demo

    run_demo(image, question, seed, output, compare)
