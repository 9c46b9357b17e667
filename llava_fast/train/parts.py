"""The parts of a model that a recipe names, and the part that a parameter belongs to."""

from __future__ import annotations

PARTS = ("vision_tower", "projector", "decoder")


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to. The newline row goes with the projector, as in LLaVA."""
    return next((piece for piece in name.split(".") if piece in PARTS), "projector")
