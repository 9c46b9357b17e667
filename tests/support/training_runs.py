"""What a run left behind, and runs that do not come to their end."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llava_fast.train.metrics import FILE, read_metrics
from llava_fast.train.parallel import World
from llava_fast.train.run import train
from llava_fast.train.trainer import Trainer
from tests.support import tiny

ALONE = World(0, 1, torch.device("cpu"))
SHAPES = {  # of two processes, as `parallel` of a recipe
    "ddp": {"kind": "ddp"},
    "fsdp2": {"kind": "fsdp2"},
    "tensor": {"kind": "fsdp2", "tensor": 2},
}


def losses(recipe) -> list[float]:
    """A run's loss at each step, none missing and none twice."""
    values = read_metrics(recipe.output / FILE)
    assert [each["step"] for each in values] == list(range(1, len(values) + 1))
    return [each["loss"] for each in values]


def break_off(recipe, steps: int, start=train) -> None:
    """Run a recipe, which fails when so many steps are done; `start` runs it."""
    step = Trainer.step
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Trainer, "step", lambda self, batch: 1 / 0 if batch.step == steps else step(self, batch))
        with pytest.raises(ZeroDivisionError):
            start(recipe)


def steps(recipe) -> list[dict]:
    """The metrics of every step of a run."""
    return read_metrics(recipe.output / FILE)


def write_picture(folder: Path, rng: np.random.Generator, number: int) -> str:
    """A picture of a random size, saved in `folder`; returns its file's name."""
    size = [int(side) for side in rng.integers(30, 130, 2)]
    Image.fromarray(tiny.picture(*size, seed=number)).save(folder / f"{number}.png")
    return f"{number}.png"


def objective_recipes(make_recipe, section: str, file: Path):
    """Recipes over the samples of a file, for the objective of this `section` of a recipe; the first argument of what
    is returned is the section."""

    def make(settings=None, **changes):
        data = {"sources": [{"path": str(file)}]} | changes.pop("data", {})
        return make_recipe(**{section: settings or {}, "batch_size": 6, "data": data} | changes)

    return make
