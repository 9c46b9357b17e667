"""Generate the demo model's training data: canvases as PNG files, and JSON in LLaVA's format.

    python examples/digits/make_data.py OUT_DIR

    OUT_DIR/easy.json         canvases of one or two digits, for stage 1
    OUT_DIR/full.json         canvases of none to five, for stage 2
    OUT_DIR/preferences.jsonl canvases of two to five, with the first digit alone as the preferred answer, for DPO
    OUT_DIR/images/           the images

Every canvas has one conversation with questions of all kinds. Canvas n does not depend on the number of canvases. Only
training scans are used. evaluate.py uses the others.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image
from tqdm import tqdm

from llava_fast.demo import KINDS, Canvas, answer, ask, compose, split_scans

EASY_SHARES = (0.0, 0.5, 0.5)  # of canvases with 0, 1, 2 digits
FULL_SHARES = (0.04, 0.08, 0.12, 0.2, 0.26, 0.3)  # 0 to 5: order is hard
PAIR_SHARES = (0.0, 0.0, 0.25, 0.25, 0.25, 0.25)


def main(
    output: Annotated[Path, typer.Argument(help="The directory to write.")],
    easy: Annotated[int, typer.Option(help="Canvases of one or two digits.")] = 8000,
    full: Annotated[int, typer.Option(help="Canvases of none to five digits.")] = 40000,
    pairs: Annotated[int, typer.Option(help="Canvases with a preferred and a rejected reading.")] = 1000,
    workers: Annotated[int, typer.Option(help="Processes that compose.")] = 2,
) -> None:
    """Write the digits training data to OUTPUT: about 45 KB and a few milliseconds a canvas."""
    (output / "images").mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(workers) as pool:

        def made(name: str, number: int, make: Callable[[int], dict[str, Any]]) -> list[dict[str, Any]]:
            return list(tqdm(pool.map(make, range(number), chunksize=64), name, number, unit="canvas"))

        for name, number, shares in (("easy", easy, EASY_SHARES), ("full", full, FULL_SHARES)):
            samples = made(name, number, partial(conversation, output, name, shares))
            (output / f"{name}.json").write_text(json.dumps(samples), encoding="utf-8")
        lines = [json.dumps(sample) for sample in made("preferences", pairs, partial(preference, output))]
        (output / "preferences.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def conversation(output: Path, name: str, shares: tuple[float, ...], number: int) -> dict[str, Any]:
    """Write a canvas to a file and return a conversation with a question of each kind."""
    rng, canvas, image = draw(output, name, shares, number)
    turns = []
    for place, kind in enumerate(rng.permutation(KINDS)):
        question = ask(rng, kind)
        turns.append({"from": "human", "value": question if place else f"<image>\n{question}"})
        turns.append({"from": "gpt", "value": answer(kind, canvas.digits)})
    return {"id": f"{name}-{number}", "image": image, "conversations": turns}


def preference(output: Path, number: int) -> dict[str, Any]:
    """Return a preference pair for reading a canvas. Chosen is its first digit, rejected all its digits."""
    rng, canvas, image = draw(output, "preferences", PAIR_SHARES, number)
    chosen, rejected = answer("top_left", canvas.digits), answer("read", canvas.digits)
    question = f"<image>\n{ask(rng, 'read')}"
    return {"id": f"pair-{number}", "image": image, "prompt": question, "chosen": chosen, "rejected": rejected}


@cache
def training_scans() -> np.ndarray:
    return split_scans()[0]


def draw(output: Path, name: str, shares: tuple[float, ...], number: int) -> tuple[np.random.Generator, Canvas, str]:
    """Return the random generator of canvas `number`, the canvas, and the path of its image in `output`."""
    rng = np.random.default_rng([len(name), number])
    canvas = compose(rng, training_scans(), int(rng.choice(len(shares), p=shares)))
    image = f"images/{name}-{number}.png"
    Image.fromarray(canvas.image).save(output / image, compress_level=1)
    return rng, canvas, image


if __name__ == "__main__":
    typer.run(main)
