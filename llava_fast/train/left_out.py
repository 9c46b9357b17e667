"""Samples that could not be read at their step: all processes exchange them and act alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llava_fast.errors import TrainingError
from llava_fast.train.data.loader import LeftOut
from llava_fast.train.parallel import World

if TYPE_CHECKING:
    from llava_fast.train.recipe import Recipe


def left_out_together(recipe: Recipe, world: World, found: Sequence[LeftOut], when: str) -> list[LeftOut]:
    """The samples that any process `found` bad, in order of their numbers; every process calls this and gets the same.

    when  where they were found, as "step 12", for errors.
    Raises TrainingError, on every process, unless the recipe skips such samples, and if processes that run the same
    samples did not find the same.
    """
    held = world.gather(found)
    shared = len(held) // world.size  # processes that run the same samples
    groups = [held[start : start + shared] for start in range(0, len(held), shared)]
    if differs := [group for group in groups if any(list(each) != list(group[0]) for each in group)]:
        raise TrainingError(f"{when}: a sample was read by one process and not by another: {differs[0]}. Start again")
    left_out = sorted(sample for group in groups for sample in group[0])
    if left_out and recipe.data.on_problem == "stop":
        more = f" ({len(left_out) - 1} more samples have a problem)" if len(left_out) > 1 else ""
        raise TrainingError(
            f"{when}: {left_out[0].problem}{more}. Mend it, or take it out of the data, and start again; or set "
            "data.on_problem: skip"
        )
    return left_out
