"""Measure the effect of preference tuning on held-out canvases.

    python examples/digits/preferences.py BEFORE AFTER

For canvases of two to five digits, print the percentage of answers that are a single digit, that are the first digit
(preferred), and that read the whole canvas correctly (rejected).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from evaluate import answers

import llava_fast
from llava_fast.demo import PHRASINGS, Canvas, answer, compose, split_scans

BATCH = 25


def main(
    before: Annotated[Path, typer.Argument(help="The model that tuning began from.")],
    after: Annotated[Path, typer.Argument(help="The tuned model.")],
    canvases: Annotated[int, typer.Option(help="How many held-out canvases.")] = 500,
) -> None:
    """Print the shares of both models."""
    asked = draw_canvases(canvases)
    print(f"{len(asked)} held-out canvases\n{'':8}  one digit alone  the right one  all, rightly")
    for name, path in (("before", before), ("after", after)):
        alone, right, whole = shares(llava_fast.load(path, device="cpu"), asked)
        print(f"{name:8}  {alone:15.1%}  {right:13.1%}  {whole:12.1%}")


def draw_canvases(number: int) -> list[Canvas]:
    """Return canvases of two to five held-out scans."""
    rng = np.random.default_rng(2027)
    _, held_out = split_scans()
    return [compose(rng, held_out, int(rng.integers(2, 6))) for _ in range(number)]


@torch.inference_mode()
def shares(model: llava_fast.Llava, asked: list[Canvas]) -> tuple[float, float, float]:
    """Return the shares of answers that are a single digit, the first digit, and all digits correctly."""
    rng = np.random.default_rng(7)
    counts = np.zeros(3)
    for number, first in enumerate(range(0, len(asked), BATCH)):
        part = asked[first : first + BATCH]
        question = PHRASINGS["read"][number % len(PHRASINGS["read"])]
        for canvas, text in zip(part, answers(model, part, question, None, None, rng), strict=True):
            counts += [
                text.isdigit() and len(text) == 1,
                text == answer("top_left", canvas.digits),
                text == answer("read", canvas.digits),
            ]
    return tuple(counts / len(asked))


if __name__ == "__main__":
    typer.run(main)
