"""A tiny data set in LLaVA's format, with its pictures."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from tests.support import tiny

WORDS = "hello the red small box on a table near two green cups says nothing at all".split()


def words(rng: np.random.Generator, least: int, most: int) -> str:
    return " ".join(rng.choice(WORDS, int(rng.integers(least, most))))


def write_data(folder: Path, samples: int = 22, seed: int = 0) -> Path:
    """data.json with one image, two images or none in a sample, one turn or two, and the pictures."""
    rng = np.random.default_rng(seed)
    records = []
    for number in range(samples):
        images = [1, 1, 0, 2][number % 4]
        names = []
        for place in range(images):
            names.append(f"{number}_{place}.png")
            size = [int(side) for side in rng.integers(30, 130, 2)]
            Image.fromarray(tiny.picture(*size, seed=number)).save(folder / names[-1])
        turns = [{"from": "human", "value": "<image>\n" * images + words(rng, 2, 9)}]
        turns.append({"from": "gpt", "value": words(rng, 1, 12)})
        if number % 3 == 0:
            turns += [{"from": "human", "value": words(rng, 2, 5)}, {"from": "gpt", "value": words(rng, 1, 7)}]
        image = {0: {}, 1: {"image": names[0] if names else None}}.get(images, {"image": names})
        records.append({"id": f"sample-{number}", **image, "conversations": turns})
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    return path
