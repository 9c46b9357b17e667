"""What the processor hands on: a batch on the host, and images or videos that are not opened yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from llava_fast.inputs.pictures.tiles import UncutImages
from llava_fast.inputs.pictures.view import View
from llava_fast.inputs.plan.plan import TokenPlan

Cut = np.ndarray | tuple[np.ndarray, Sequence[View]]
"""The tiles of an image, or the image and its views where a device is to make them."""


@dataclass(frozen=True)
class Prepared:
    """A batch on the host: uint8 tiles [tiles, 3, H, W], or the images that a device is to cut into them, and the
    plan that places them."""

    tiles: np.ndarray | UncutImages
    plan: TokenPlan


@dataclass(frozen=True)
class Placeholder:
    """An image or video named in a prompt, not opened yet. `alone`: it is tiled as the only image of a request is."""

    kind: Literal["<image>", "<video>"]
    source: Any
    alone: bool
