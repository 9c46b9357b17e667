"""The parts of a model that recipes name, and the part of each parameter."""

from __future__ import annotations

PARTS = ("vision_tower", "projector", "decoder")


def part_of(name: str) -> str:
    """The part of the model to which a parameter belongs. The newline row belongs to the projector, as in LLaVA."""
    return next((piece for piece in name.split(".") if piece in PARTS), "projector")
