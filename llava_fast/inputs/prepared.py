"""The processor's results: a batch on the host, and placeholders for images or videos that are not opened yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from llava_fast.inputs.pictures.tiles import UncutImages
from llava_fast.inputs.pictures.view import View
from llava_fast.inputs.plan.plan import TokenPlan

Cut = np.ndarray | tuple[np.ndarray, Sequence[View]]
"""The tiles of an image, or, if the device makes the tiles, the image and its views."""


@dataclass(frozen=True)
class Prepared:
    """A batch on the host: uint8 tiles [tiles, 3, H, W], or the images from which the device makes them, and the
    plan."""

    tiles: np.ndarray | UncutImages
    plan: TokenPlan


@dataclass(frozen=True)
class Placeholder:
    """An image or video of a prompt, not opened yet. `alone`: it is tiled like the only image of a request.
    `instruction`: see VisualPiece."""

    kind: Literal["<image>", "<video>"]
    source: Any
    alone: bool
    instruction: np.ndarray | None = None

    @property
    def origin(self) -> tuple[int, str, bool]:
        """Equal for placeholders of one request whose tiles are equal: the same object, tiled in the same way."""
        return id(self.source), self.kind, self.alone
