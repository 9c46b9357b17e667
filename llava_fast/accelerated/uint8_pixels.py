"""uint8 pixels as inputs of a transformers model: their argument names, and the processor's normalisation, read once
and kept with the model.

Stock models do not use these names, so none mistakes unnormalised pixels for normalised ones. The normalisation is
folded into the patch embedding if that is a plain Conv2d (see ops.patch_embed); otherwise pixels are looked up in a
table of values computed by the processor's arithmetic.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from llava_fast.errors import PixelError
from llava_fast.inputs.pictures.preprocessing import fold_values

NAMES = {"pixel_values_uint8": "pixel_values", "pixel_values_videos_uint8": "pixel_values_videos"}
"""Argument name of uint8 pixels -> that of normalised pixels."""
SETTING = "_llava_fast_normalisations"


class Normalisation(NamedTuple):
    """A processor's normalisation: x * factor, then (x - mean) / std per channel."""

    factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def folded(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(mean, std) for pixels scaled to 0..1 instead of by the factor."""
        return fold_values(True, self.factor, True, self.mean, self.std)

    def levels(self) -> np.ndarray:
        """float32 [3, 256]: each pixel value in each channel, normalised with transformers' arithmetic."""
        from transformers.image_transforms import normalize, rescale
        from transformers.image_utils import ChannelDimension

        first = ChannelDimension.FIRST
        every = np.ascontiguousarray(np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256)))
        rescaled = rescale(every, self.factor, data_format=first, input_data_format=first)
        made = normalize(rescaled, self.mean, self.std, first, first)
        return np.ascontiguousarray(made[:, 0], np.float32)

    @torch.compiler.disable
    def normalised(self, pixels: Tensor) -> Tensor:
        """uint8 [..., 3, H, W] to float32 [..., 3, H, W], with the exact values of transformers' processor."""
        levels = _levels(self, pixels.device)
        return torch.stack([levels[channel][pixels.select(-3, channel).int()] for channel in range(3)], dim=-3)


@functools.cache
def _levels(normalisation: Normalisation, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # so that a later training step can save it for backward
        return torch.from_numpy(normalisation.levels()).to(device)


def remember(inner: nn.Module, processor: Any) -> None:
    """Keep the normalisations of a processor (or of an image processor) with an inner model. Raises PixelError for a
    processor without image settings."""
    images = getattr(processor, "image_processor", processor)
    if not hasattr(images, "image_mean"):
        raise PixelError(f"{type(processor).__name__} has no image processor: give the checkpoint's own processor")
    parts = {"pixel_values": images, "pixel_values_videos": getattr(processor, "video_processor", None)}
    found = {name: _read(part) for name, part in parts.items() if part is not None}
    vars(inner)[SETTING] = {name: read for name, read in found.items() if read is not None}


def _read(part: Any) -> Normalisation | None:
    """The normalisation of an image or video processor; None if it skips a step."""
    if not (part.do_rescale and part.do_normalize):
        return None
    mean, std = (tuple(map(float, np.broadcast_to(value, 3))) for value in (part.image_mean, part.image_std))
    return Normalisation(float(part.rescale_factor), mean, std)


def take(inner: nn.Module, given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Normalisation]]:
    """(arguments with uint8 pixels under the stock names, name -> normalisation still needed).

    Raises PixelError for pixels that are not uint8 or given twice, and for a model without a processor.
    """
    wanted = {name: stands for name, stands in NAMES.items() if given.get(name) is not None}
    known = vars(inner).get(SETTING, {})
    for name, stands in wanted.items():
        if given[name].dtype != torch.uint8:
            raise PixelError(f"{name} must be uint8, got {given[name].dtype}: normalised pixels go under {stands}")
        if given.get(stands) is not None:
            raise PixelError(f"{name} and {stands} were both given: leave one out")
        if stands not in known:
            raise PixelError(
                f"{name} is given, but its normalisation is not known: call llava_fast.accelerate(model, processor) "
                "with a processor that rescales and normalises"
            )
    rest = {name: value for name, value in given.items() if name not in NAMES}
    return rest | {stands: given[name] for name, stands in wanted.items()}, {s: known[s] for s in wanted.values()}


def normalise(given: Mapping[str, Any], needed: Mapping[str, Normalisation]) -> dict[str, Any]:
    """The arguments for a stock model, with normalised pixels."""
    return dict(given) | {name: normalisation.normalised(given[name]) for name, normalisation in needed.items()}
