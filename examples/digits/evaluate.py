"""Evaluate the digits demo model on held-out scans, with several image ablations, and write its model card.

python examples/digits/evaluate.py MODEL_DIR --canvases 1000

Writes MODEL_DIR/evaluation.json and MODEL_DIR/README.md. Canvases hold only scans that training never saw.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image
from tqdm import tqdm

import llava_fast
from llava_fast.demo import KINDS, PHRASINGS, Canvas, answer, compose, split_scans
from llava_fast.evaluate.metrics.text import edit_distance
from llava_fast.generation.prompt import read_prompt
from llava_fast.generation.runner import Runner
from llava_fast.generation.sampling import Sampling
from llava_fast.generation.scheduler import Scheduler
from llava_fast.generation.sequence import new_sequence

BATCH = 50
TILE = 32
GREY = 122  # near CLIP's mean

Pixels = Callable[[np.ndarray], np.ndarray]
Tiles = Callable[[torch.Tensor, np.random.Generator], torch.Tensor]


def blanked(image: np.ndarray) -> np.ndarray:
    return np.full_like(image, GREY)


def base_enlarged(image: np.ndarray) -> np.ndarray:
    """Reduce the image to the resolution of the base view: resized to one tile, then enlarged again."""
    small = Image.fromarray(image).resize((TILE, TILE), Image.Resampling.BICUBIC)
    return np.asarray(small.resize(image.shape[1::-1], Image.Resampling.BICUBIC))


def base_alone(tiles: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Keep the base view and make the grid's tiles grey."""
    return torch.cat([tiles[:1], torch.full_like(tiles[1:], GREY)])


def shuffled(tiles: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Permute the tiles of the grid and keep the base view."""
    turn = int(rng.integers(1, len(tiles) - 1))
    order = rng.permutation(len(tiles) - 1)
    moved = np.empty_like(order)
    moved[order] = np.roll(order, turn)
    return torch.cat([tiles[:1], tiles[1:][torch.from_numpy(moved)]])


CONDITIONS: dict[str, tuple[Pixels | None, Tiles | None]] = {
    "whole image": (None, None),
    "image blanked": (blanked, None),
    "base view alone": (None, base_alone),
    "base view enlarged": (base_enlarged, None),
    "tiles shuffled": (None, shuffled),
}


def main(
    model_dir: Annotated[Path, typer.Argument(help="The model to measure; its card is written beside it.")],
    canvases: Annotated[int, typer.Option(help="How many held-out canvases.")] = 1000,
    note: Annotated[str, typer.Option(help="A sentence for the card on how this model was trained.")] = "",
) -> None:
    """Evaluate and write the card."""
    model = llava_fast.load(model_dir, device="cpu")
    _, held_out = split_scans()
    rng = np.random.default_rng(2026)
    drawn = [compose(rng, held_out) for _ in range(canvases)]
    results = {name: evaluate(model, drawn, *edits, name) for name, edits in CONDITIONS.items()}
    results["majority guess"] = majority_guess(drawn)
    report = {"canvases": canvases, "parameters": sum(p.numel() for p in model.parameters()), "results": results}
    (model_dir / "evaluation.json").write_text(json.dumps(report, indent=1) + "\n")
    (model_dir / "README.md").write_text(card(report, note))
    print(table(results))


@torch.inference_mode()
def evaluate(model, canvases: list[Canvas], pixels: Pixels | None, tiles: Tiles | None, name: str) -> dict[str, float]:
    """Return the share of exact answers to each kind of question, with rotating phrasings. "none": the share of
    canvases without digits that are read as empty. "digits": 1 - edits / digits, where an edit is a missed, invented or
    misread digit."""
    rng = np.random.default_rng(7)
    right, edits, written = Counter(), 0, 0
    for kind in KINDS:
        for number, first in enumerate(tqdm(range(0, len(canvases), BATCH), desc=f"{name}, {kind}", leave=False)):
            part = canvases[first : first + BATCH]
            question = PHRASINGS[kind][number % len(PHRASINGS[kind])]
            for canvas, text in zip(part, answers(model, part, question, pixels, tiles, rng), strict=True):
                correct = text == answer(kind, canvas.digits)
                right[kind] += correct
                if kind == "read" and canvas.digits:
                    written += len(canvas.digits)
                    edits += edit_distance(text.split(), [str(digit) for digit in canvas.digits])
                elif kind == "read":
                    right["none"] += correct
    empty = sum(not canvas.digits for canvas in canvases)
    shares = {kind: right[kind] / len(canvases) for kind in KINDS}
    return {"digits": 1 - edits / written, **shares, "none": right["none"] / max(empty, 1)}


def answers(
    model, canvases: list[Canvas], question: str, pixels: Pixels | None, tiles: Tiles | None, rng: np.random.Generator
) -> list[str]:
    """Return the model's answers, with edited pixels or edited tiles."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    images = [pixels(c.image) if pixels else c.image for c in canvases]
    scheduler, sequences = Scheduler(Runner(model)), []
    for image in images:
        request = {"messages": [{"role": "user", "content": content}], "images": [image]}
        prompt = read_prompt(model.processor, request)
        if tiles:
            for part in prompt.parts:
                part.tiles = [tiles(torch.from_numpy(cut), rng).numpy() for cut in part.tiles]
        sequences.append(new_sequence(model, prompt, Sampling(max_new_tokens=8)))
        scheduler.add(sequences[-1])
    while not scheduler.is_idle:
        scheduler.step()
    return [sequence.text.text.strip() for sequence in sequences]


def majority_guess(canvases: list[Canvas]) -> dict[str, float]:
    """Return the score of always giving the most frequent answer of each kind (for "digits": the most frequent
    digit)."""
    digits = Counter(digit for canvas in canvases for digit in canvas.digits)
    scores = {"digits": max(count for count in digits.values()) / digits.total(), "none": 0.0}
    for kind in KINDS:
        given = Counter(answer(kind, canvas.digits) for canvas in canvases)
        scores[kind] = given.most_common(1)[0][1] / len(canvases)
    return scores


def table(results: dict[str, dict[str, float]]) -> str:
    """Format the results as a Markdown table in percent."""
    columns = ["digits", *KINDS, "none"]
    names = {"digits": "digits right", "read": "read exactly", "top_left": "top left", "none": "no digit there"}
    lines = ["| | " + " | ".join(names.get(c, c) for c in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, scores in results.items():
        lines.append(f"| {name} | " + " | ".join(f"{100 * scores[c]:.1f}" for c in columns) + " |")
    return "\n".join(lines)


def card(report: dict, note: str) -> str:
    return f"""# Digits: the demo model of llava_fast

A LLaVA-NeXT of {report["parameters"]:,} parameters (CLIP tower, two-layer projector, Llama decoder; Hugging Face
`llava_next` layout) that answers questions about handwritten digits. It exists so that the whole engine can be tried
and tested on something real; it knows nothing else.

**Made by** the scripts and recipes of `examples/digits`, with this package's own trainer, on canvases composed from the
8x8 scans that scikit-learn ships (`load_digits`; Alpaydin and Kaynak, UCI, CC BY 4.0), over plain colours and crops of
its `china.jpg` and `flower.jpg`: 0 to 5 digits a canvas, sides of 90 to 400 pixels, many shapes, sizes, strokes,
contrasts, both polarities, slight rotation. {note}

**Measured by** `examples/digits/evaluate.py` on {report["canvases"]} canvases of scans that training never saw, in
percent. An answer counts if it is exactly right; "digits right" is 1 - edits / digits, an edit being a digit missed,
invented or misread; "no digit there" is the share of empty canvases read as "none".

{table(report["results"])}

"Image blanked" is all grey; "base view alone" has the grid's tiles grey; "base view enlarged" is the image squashed to
one tile and enlarged to its own size, so that the tiles show no more than the base view does; "tiles shuffled" moves
every tile of the grid; "majority guess" always gives the commonest answer.

**Limits.** Scans of 8x8 pixels look only roughly like pen on paper: expect less on photographs. Digits larger than
about a quarter of the longer side, more than five, ink within 90 of 255 levels of its background, or a busy background
are outside what it was trained on.
"""


if __name__ == "__main__":
    typer.run(main)
