"""How far preference tuning moved a model: held-out canvases read before and after.

    python examples/digits/preferences.py BEFORE AFTER

Of canvases whose digits are not in rising order, in percent: answers that sort them (preferred), answers in reading
order (rejected before all else), and answers with the right digits in whatever order.
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
    asked = unsorted_canvases(canvases)
    print(f"{len(asked)} held-out canvases\n{'':8}  rising order  reading order  right digits")
    for name, path in (("before", before), ("after", after)):
        rising, reading, right = shares(llava_fast.load(path, device="cpu"), asked)
        print(f"{name:8}  {rising:11.1%}  {reading:13.1%}  {right:12.1%}")


def unsorted_canvases(number: int) -> list[Canvas]:
    """Canvases of two to five held-out scans that are not in rising order."""
    rng = np.random.default_rng(2027)
    _, held_out = split_scans()
    drawn = []
    while len(drawn) < number:
        canvas = compose(rng, held_out, int(rng.integers(2, 6)))
        if canvas.digits != sorted(canvas.digits):
            drawn.append(canvas)
    return drawn


@torch.inference_mode()
def shares(model: llava_fast.Llava, asked: list[Canvas]) -> tuple[float, float, float]:
    """Shares of answers in rising order, in reading order, and with the right digits."""
    rng = np.random.default_rng(7)
    counts = np.zeros(3)
    for number, first in enumerate(range(0, len(asked), BATCH)):
        part = asked[first : first + BATCH]
        question = PHRASINGS["read"][number % len(PHRASINGS["read"])]
        for canvas, text in zip(part, answers(model, part, question, None, None, rng), strict=True):
            rising, reading = answer("read", sorted(canvas.digits)), answer("read", canvas.digits)
            counts += [text == rising, text == reading, sorted(text.split()) == rising.split()]
    return tuple(counts / len(asked))


if __name__ == "__main__":
    typer.run(main)
