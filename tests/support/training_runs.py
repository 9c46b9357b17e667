"""What a run left behind, and runs that do not come to their end."""

import pytest

from llava_fast.train.metrics import FILE, read_metrics
from llava_fast.train.run import train
from llava_fast.train.trainer import Trainer

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
