"""Measure the digits demo model on held-out scans, with its sight taken away in several ways, and write its card.

python examples/digits/evaluate.py MODEL_DIR --canvases 1000

Writes MODEL_DIR/evaluation.json and MODEL_DIR/README.md. Canvases hold only scans that training never saw.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from tqdm import tqdm

import llava_fast
from llava_fast.demo import KINDS, PHRASINGS, Canvas, answer, compose, split_scans
from llava_fast.generation import engine
from llava_fast.inputs import anyres

BATCH = 50
GREY = 122  # near CLIP's mean

Edit = Callable[[torch.Tensor, np.random.Generator], torch.Tensor]


def as_is(tiles: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    return tiles


def blanked(tiles: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    return torch.full_like(tiles, GREY)


def base_alone(tiles: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    return torch.cat([tiles[:1], torch.full_like(tiles[1:], GREY)])


def tiles_shuffled(tiles: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    return torch.cat([tiles[:1], tiles[1:][torch.from_numpy(rng.permutation(len(tiles) - 1))]])


CONDITIONS: dict[str, Edit] = {
    "whole image": as_is,
    "image blanked": blanked,
    "base view alone": base_alone,
    "tiles shuffled": tiles_shuffled,
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
    results = {name: evaluate(model, drawn, edit, name) for name, edit in CONDITIONS.items()}
    results["majority guess"] = majority_guess(drawn)
    report = {"canvases": canvases, "parameters": sum(p.numel() for p in model.parameters()), "results": results}
    (model_dir / "evaluation.json").write_text(json.dumps(report, indent=1) + "\n")
    (model_dir / "README.md").write_text(card(report, note))
    print(table(results))


@torch.inference_mode()
def evaluate(model, canvases: list[Canvas], edit: Edit, name: str) -> dict[str, float]:
    """Share of exact answers for each kind of question, and "digits": of digits read right in their place."""
    rng = np.random.default_rng(7)
    right, placed, written = Counter(), 0, 0
    for kind in KINDS:
        for first in tqdm(range(0, len(canvases), BATCH), desc=f"{name}, {kind}", leave=False):
            part = canvases[first : first + BATCH]
            for canvas, text in zip(part, answers(model, part, PHRASINGS[kind][0], edit, rng), strict=True):
                expected = answer(kind, canvas.digits)
                right[kind] += text == expected
                if kind == "read":
                    written += len(canvas.digits)
                    if canvas.digits:
                        placed += sum(a == b for a, b in zip(text.split(), expected.split(), strict=False))
    return {"digits": placed / written, **{kind: right[kind] / len(canvases) for kind in KINDS}}


def answers(model, canvases: list[Canvas], question: str, edit: Edit, rng: np.random.Generator) -> list[str]:
    """The model's answers, its tiles edited between cutting and looking."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    requests = [{"messages": [{"role": "user", "content": content}], "images": [c.image]} for c in canvases]
    batch = model.prepare(requests)
    counts = [anyres.image_rows(model.config.geometry, *c.image.shape[:2]).tiles for c in canvases]
    batch = dataclasses.replace(batch, tiles=torch.cat([edit(tiles, rng) for tiles in batch.tiles.split(counts)]))
    options = engine.GenerationOptions.of(max_new_tokens=8)
    sequences = [engine.new_sequence(model, options, [], 8, None) for _ in canvases]
    cache = model.decoder.new_cache(len(canvases), max(batch.plan.lengths) + 8)
    for _ in engine.steps(model, batch, sequences, cache):
        pass
    return [sequence.text.text.strip() for sequence in sequences]


def majority_guess(canvases: list[Canvas]) -> dict[str, float]:
    """What always giving each kind's commonest answer would score; for "digits", the commonest digit."""
    digits = Counter(digit for canvas in canvases for digit in canvas.digits)
    scores = {"digits": digits.most_common(1)[0][1] / digits.total()}
    for kind in KINDS:
        given = Counter(answer(kind, canvas.digits) for canvas in canvases)
        scores[kind] = given.most_common(1)[0][1] / len(canvases)
    return scores


def table(results: dict[str, dict[str, float]]) -> str:
    """The results as a Markdown table, in percent."""
    columns = ["digits", *KINDS]
    names = {"digits": "digits right", "read": "canvas read exactly", "top_left": "top left"}
    lines = ["| | " + " | ".join(names.get(c, c) for c in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, scores in results.items():
        lines.append(f"| {name} | " + " | ".join(f"{100 * scores[c]:.1f}" for c in columns) + " |")
    return "\n".join(lines)


def card(report: dict, note: str) -> str:
    return f"""# Digits: the demo model of llava_fast

A LLaVA-NeXT of {report["parameters"]:,} parameters (CLIP tower, two-layer projector, Llama decoder; Hugging Face
`llava_next` layout) that answers questions about handwritten digits. It exists so that the whole engine can be tried
and tested on something real; it knows nothing else.

**Made by** `examples/digits/train.py` from random weights, on canvases composed on the fly from the 8x8 scans that
scikit-learn ships (`load_digits`; Alpaydin and Kaynak, UCI, CC BY 4.0), over plain colours and crops of its
`china.jpg` and `flower.jpg`: 0 to 5 digits a canvas, sides of 90 to 400 pixels, many shapes, sizes, strokes, contrasts,
both polarities, slight rotation. {note}

**Measured by** `examples/digits/evaluate.py` on {report["canvases"]} canvases of scans that training never saw (percent;
an answer counts if it is exactly right, "digits right" counts digits in their place):

{table(report["results"])}

"Image blanked" and "base view alone" paint tiles grey; "tiles shuffled" permutes the grid's tiles; "majority guess"
always gives the commonest answer.

**Limits.** Scans of 8x8 pixels look only roughly like pen on paper: expect less on photographs. Larger digits than about
a quarter of the picture's longer side, more than five, or a busy background are outside what it was trained on.
"""


if __name__ == "__main__":
    typer.run(main)
