"""Samples that could not be read at their step: all processes exchange them and make the same decision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llava_fast.errors import TrainingError
from llava_fast.train.data.loader import LeftOut
from llava_fast.train.parallel import World

if TYPE_CHECKING:
    from llava_fast.train.recipe import Recipe


def left_out_together(recipe: Recipe, world: World, found: Sequence[LeftOut], when: str) -> list[LeftOut]:
    """The samples that some process could not use, sorted by number. A collective; the result is the same on all
    processes.

    found  this process's samples. when: where they were found, such as "step 12", for errors.
    Raises TrainingError on every process unless the recipe skips such samples, and if processes that run the same
    samples found different ones.
    """
    held = world.gather(found)
    shared = len(held) // world.size  # number of processes that run the same samples
    groups = [held[start : start + shared] for start in range(0, len(held), shared)]
    if differs := [group for group in groups if any(list(each) != list(group[0]) for each in group)]:
        raise TrainingError(f"{when}: one process could read a sample and another could not: {differs[0]}. Start again")
    left_out = sorted(sample for group in groups for sample in group[0])
    if left_out and recipe.data.on_problem == "stop":
        more = f" ({len(left_out) - 1} more samples have a problem)" if len(left_out) > 1 else ""
        raise TrainingError(
            f"{when}: {left_out[0].problem}{more}. Fix it or remove it from the data, and start again; or set "
            "data.on_problem: skip"
        )
    return left_out
