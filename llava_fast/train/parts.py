"""The parts of a model that recipes name, and the part of each parameter."""

from __future__ import annotations

import re

PARTS = ("vision_tower", "projector", "decoder")


def part_of(name: str) -> str:
    """The part of the model to which a parameter belongs. The newline row belongs to the projector, as in LLaVA."""
    return next((piece for piece in name.split(".") if piece in PARTS), "projector")


def is_factor(name: str) -> bool:
    """Whether a parameter is a factor of an adapter that PEFT inserted."""
    return _FACTOR.search(name) is not None


_FACTOR = re.compile(r"\.lora_[AB]\.")  # a Monkey's own windows have lora_a and lora_b
