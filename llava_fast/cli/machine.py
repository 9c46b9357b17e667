"""llava-fast doctor | demo: what this machine has, and a first answer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


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
