"""uint8 pixels in a transformers model: the names they come under, and the normalisation that the processor would have
done, read from it once and kept with the model.

A stock model has none of these names, so no model mistakes unnormalised pixels for normalised ones. Normalisation is
folded into the patch embedding where that is an ordinary one (see ops.patch_embed); elsewhere pixels are looked up in a
table of the processor's own values.
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
"""uint8 name -> the name of the normalised pixels it stands for."""
SETTING = "_llava_fast_normalisations"


class Normalisation(NamedTuple):
    """What a processor does to pixels: x * factor, then (x - mean) / std for each channel."""

    factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def folded(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(mean, std) of pixels in 0..1, whatever the factor is."""
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
        """uint8 [..., 3, H, W] to float32 [..., 3, H, W], the values that transformers' processor gives."""
        levels = _levels(self, pixels.device)
        return torch.stack([levels[channel][pixels.select(-3, channel).int()] for channel in range(3)], dim=-3)


@functools.cache
def _levels(normalisation: Normalisation, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # so that a later training step may keep it
        return torch.from_numpy(normalisation.levels()).to(device)


def remember(inner: nn.Module, processor: Any) -> None:
    """Keep the normalisations of a processor (or of an image processor alone) with an inner model. Raises PixelError
    for one without image settings."""
    images = getattr(processor, "image_processor", processor)
    if not hasattr(images, "image_mean"):
        raise PixelError(f"{type(processor).__name__} has no image processor: give the checkpoint's own processor")
    parts = {"pixel_values": images, "pixel_values_videos": getattr(processor, "video_processor", None)}
    found = {name: _read(part) for name, part in parts.items() if part is not None}
    vars(inner)[SETTING] = {name: read for name, read in found.items() if read is not None}


def _read(part: Any) -> Normalisation | None:
    """None if a processor omits a step, so that its pixels are not a model's input."""
    if not (part.do_rescale and part.do_normalize):
        return None
    mean, std = (tuple(map(float, np.broadcast_to(value, 3))) for value in (part.image_mean, part.image_std))
    return Normalisation(float(part.rescale_factor), mean, std)


def take(inner: nn.Module, given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Normalisation]]:
    """(arguments with uint8 pixels under the stock names, the normalisation that each of those still needs).

    Raises PixelError for pixels that are not uint8 or come twice, or for a model that was not given its processor.
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
                f"{name} came, but how to normalise it is not known: call llava_fast.accelerate(model, processor) "
                "with a processor that rescales and normalises"
            )
    rest = {name: value for name, value in given.items() if name not in NAMES}
    return rest | {stands: given[name] for name, stands in wanted.items()}, {s: known[s] for s in wanted.values()}


def normalise(given: Mapping[str, Any], needed: Mapping[str, Normalisation]) -> dict[str, Any]:
    """The arguments for a stock model."""
    return dict(given) | {name: normalisation.normalised(given[name]) for name, normalisation in needed.items()}
