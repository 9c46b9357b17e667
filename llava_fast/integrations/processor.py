"""FastProcessor: transformers' LLaVA processors, with tiles made by csrc on all cores instead of by Pillow and numpy.

Text, templates and token counts are transformers' code. Only `_preprocess` of the image processor is replaced, and only
for settings with bit-identical results; other settings run transformers' code. The classes are at module level, so that
a processor can be pickled to a DataLoader worker.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    BatchFeature,
    LlavaNextProcessor,
    LlavaNextVideoProcessor,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PreTrainedConfig,
)
from transformers.image_processing_backends import PilBackend
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.processing_utils import ProcessorMixin
from transformers.video_processing_utils import BaseVideoProcessor

from llava_fast.accelerated import versions
from llava_fast.accelerated.uint8_pixels import NAMES
from llava_fast.errors import CheckpointError
from llava_fast.inputs.pictures.tiles import make_tiles
from llava_fast.inputs.tiling.anyres import VisualGeometry, image_views
from llava_fast.integrations.tiles import (
    Unserved,
    anyres_tiles,
    check_served,
    normalised,
    one_tile,
    padded_when_shared,
    tell_stock,
)
from llava_fast.integrations.video_processor import (
    FastFrames,
    FastLlavaNextVideoVideoProcessor,
    FastLlavaOnevisionVideoProcessor,
)

OUTPUTS = ("float32", "uint8")
SETTINGS = (
    "patch_size",
    "vision_feature_select_strategy",
    "num_additional_image_tokens",
    "chat_template",
    "image_token",
    "video_token",
    "num_image_tokens",
    "vision_aspect_ratio",
)
"""Attributes of a LLaVA processor besides its image and video processors and its tokenizer."""


if TYPE_CHECKING:
    from typing import Any as _Mixin  # signatures of transformers' classes differ between versions
else:
    _Mixin = object


class FastTiles(_Mixin):
    """Mixin for a PIL image processor of transformers: the same outputs, computed faster. FastProcessor sets `output`
    and `threads`."""

    output = "float32"
    threads = 0
    stock_class: type
    _packed: Callable[..., BatchFeature]

    def geometry(self, settings: dict[str, Any]) -> VisualGeometry:
        """How these settings cut an image into tiles. Raises Unserved."""
        raise NotImplementedError

    def stock(self) -> PilBackend:
        """transformers' image processor with the same settings."""
        ours = ("image_processor_type", "output", "threads")
        return self.stock_class(**{name: value for name, value in self.to_dict().items() if name not in ours})

    def process_image(self, image: Any, *args: Any, **kwargs: Any) -> np.ndarray:
        """[3, H, W]. An RGB PIL image is copied once (in transformers three times)."""
        if isinstance(image, Image.Image) and image.mode == "RGB":
            return np.moveaxis(np.asarray(image), -1, 0)
        return super().process_image(image, *args, **kwargs)

    def _preprocess(self, images: list[np.ndarray], *counts: Any, **settings: Any) -> BatchFeature:
        try:
            is_bytes = all(image.dtype == np.uint8 and len(image) == 3 for image in images)
            check_served(settings, is_bytes, self.output)
            geometry = self.geometry(settings)
        except Unserved as why:
            if self.output == "uint8":
                raise ValueError(f"FastProcessor(output='uint8'): {why}; use output='float32' for that") from None
            tell_stock(self, str(why))
            return super()._preprocess(images, *counts, **settings)
        alone = [count == 1 for count in counts[0] for _ in range(count)] if counts else [True] * len(images)
        made = [self._tiles(image, geometry, single) for image, single in zip(images, alone, strict=True)]
        if self.output == "float32":
            made = [normalised(tiles, settings) for tiles in made]
        return self._packed(made, [image.shape[-2:] for image in images], settings, *counts)

    def _batch(self, made: list[np.ndarray], settings: dict[str, Any]) -> list[np.ndarray] | np.ndarray:
        """The images' tiles, zero-padded to the largest number of tiles, as in transformers. If tensors are requested,
        in one array, to avoid another copy."""
        if not settings["do_pad"]:
            return made
        if settings["return_tensors"] is None:
            return self._pad_for_batching(made)
        if len(made) == 1:
            return made[0][None]
        out = np.zeros((len(made), max(map(len, made)), *made[0].shape[1:]), made[0].dtype)
        for place, tiles in zip(out, made, strict=True):
            place[: len(tiles)] = tiles
        return out

    def _tiles(self, image: np.ndarray, geometry: VisualGeometry, alone: bool) -> np.ndarray:
        views = image_views(geometry, *image.shape[-2:], alone)
        whole = np.ascontiguousarray(image.transpose(1, 2, 0))
        return make_tiles(whole, views, geometry.tile_size, threads=self.threads)


class FastOneTile(FastTiles):
    """One tile per image, by the steps that the settings enable."""

    def geometry(self, settings: dict[str, Any]) -> VisualGeometry:
        if settings["do_pad"] and settings["pad_size"]:
            raise Unserved(f"pad_size is {settings['pad_size']}")
        return one_tile(settings)

    def _packed(self, made: list[np.ndarray], sizes: list, settings: dict[str, Any]) -> BatchFeature:
        pixel_values = [tiles[0] for tiles in made]
        return BatchFeature(data={"pixel_values": pixel_values}, tensor_type=settings["return_tensors"])


class FastCLIPImageProcessor(FastOneTile, CLIPImageProcessorPil):  # type: ignore[misc]  # its keywords are untyped
    """LLaVA-1.5: resize the shorter side to the tile's, then centre-crop."""

    stock_class = CLIPImageProcessorPil


class FastSiglipImageProcessor(FastOneTile, SiglipImageProcessorPil):  # type: ignore[misc]  # its keywords are untyped
    """SigLIP: resize to the tile without keeping the aspect ratio."""

    stock_class = SiglipImageProcessorPil


class FastLlavaImageProcessor(FastOneTile, LlavaImageProcessorPil):  # type: ignore[misc]  # its keywords are untyped
    """As CLIP; with do_pad, the whole image padded to a square with the mean colour."""

    stock_class = LlavaImageProcessorPil

    def geometry(self, settings: dict[str, Any]) -> VisualGeometry:
        return one_tile(settings, square=bool(settings["do_pad"]))


ONE_TILE: dict[str, type[FastOneTile]] = {
    "LlavaImageProcessor": FastLlavaImageProcessor,
    "CLIPImageProcessor": FastCLIPImageProcessor,
    "SiglipImageProcessor": FastSiglipImageProcessor,
}
"""Image processor type named in the file of a `llava` -> our class. Without a name transformers uses the first."""


class FastLlavaNextImageProcessor(FastTiles, LlavaNextImageProcessorPil):  # type: ignore[misc]  # its keywords are untyped
    """AnyRes: the base view, and the tiles of the best grid."""

    stock_class = LlavaNextImageProcessorPil

    def geometry(self, settings: dict[str, Any]) -> VisualGeometry:
        return anyres_tiles(settings)

    def _packed(self, made: list[np.ndarray], sizes: list, settings: dict[str, Any]) -> BatchFeature:
        data = {"pixel_values": self._batch(made, settings), "image_sizes": sizes}
        return BatchFeature(data=data, tensor_type=settings["return_tensors"])


class FastLlavaOnevisionImageProcessor(FastTiles, LlavaOnevisionImageProcessorPil):  # type: ignore[misc]  # its keywords are untyped
    """AnyRes with a base view that does not keep the aspect ratio; several images of one prompt are each padded to a
    square."""

    stock_class = LlavaOnevisionImageProcessorPil

    def geometry(self, settings: dict[str, Any]) -> VisualGeometry:
        return padded_when_shared(anyres_tiles(settings), settings, self.image_mean)

    def _packed(self, made: list[np.ndarray], sizes: list, settings: dict[str, Any], counts: list[int]) -> BatchFeature:
        data = {"pixel_values": self._batch(made, settings), "image_sizes": sizes, "batch_num_images": counts}
        return BatchFeature(data=data, tensor_type=settings["return_tensors"])


class FastOutput(_Mixin):
    """Mixin for a processor of transformers: returns uint8 tiles under names that no stock model uses."""

    stock_class: type
    image_processor: Any
    video_processor: Any
    tokenizer: Any

    def stock(self) -> ProcessorMixin:
        """transformers' processor with the same settings."""
        known = {name: getattr(self, name) for name in SETTINGS if hasattr(self, name)}
        known |= {"image_processor": self.image_processor.stock(), "tokenizer": self.tokenizer}
        return self.stock_class(**known)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any):
        """Save files that transformers can load without llava_fast; FastProcessor.from_pretrained reads them too."""
        return self.stock().save_pretrained(save_directory, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> BatchFeature:
        if kwargs.get("return_tensors") == "pt" and "text_kwargs" not in kwargs:
            made = self._with_tensors(*args, **{name: kwargs[name] for name in kwargs if name != "return_tensors"})
        else:
            made = super().__call__(*args, **kwargs)
        if self.image_processor.output == "uint8":
            for uint8, stands in NAMES.items():
                if stands in made:
                    made[uint8] = made.pop(stands)
        return made

    def _with_tensors(self, *args: Any, **kwargs: Any) -> BatchFeature:
        """The call with return_tensors="pt". Id lists go through numpy: about 10x faster than torch.tensor(list)."""
        for part in ("images_kwargs", "videos_kwargs")[: 1 + hasattr(self, "video_processor")]:
            kwargs[part] = {"return_tensors": "pt", **kwargs.get(part, {})}
        made = super().__call__(*args, **kwargs)
        for name, value in made.items():
            if isinstance(value, list):
                with contextlib.suppress(ValueError, TypeError, OverflowError):  # ragged, or not numbers
                    numbers = np.array(value)
                    if numbers.dtype.kind == "i" or not numbers.size:  # an empty list gives int64 too
                        made[name] = torch.from_numpy(numbers.astype(np.int64, copy=False))
        return made.convert_to_tensors("pt")  # everything else; transformers raises its own errors


class FastVideoOutput(FastOutput):
    """FastOutput for a processor that also takes videos."""

    def stock(self) -> ProcessorMixin:
        """transformers' processor with the same settings. Without torchvision its video part can be saved but not
        called."""
        known = {name: getattr(self, name) for name in SETTINGS if hasattr(self, name)}
        known |= {"image_processor": self.image_processor.stock(), "tokenizer": self.tokenizer}
        kind = type(self.stock_class.__name__, (AnyVideoProcessor, self.stock_class), {})
        return kind(video_processor=self.video_processor.stock(), **known)


class AnyVideoProcessor(_Mixin):
    """Mixin that accepts a video processor without torchvision, for which transformers' type check has no class."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type:
        if argument_name == "video_processor" and isinstance(argument, BaseVideoProcessor):
            return BaseVideoProcessor
        return super().check_argument_for_proper_class(argument_name, argument)


class FastLlavaProcessor(FastOutput, LlavaProcessor):
    """LlavaProcessor with fast tiles."""

    stock_class = LlavaProcessor


class FastLlavaNextProcessor(FastOutput, LlavaNextProcessor):
    """LlavaNextProcessor with fast tiles."""

    stock_class = LlavaNextProcessor


class FastLlavaNextVideoProcessor(FastVideoOutput, AnyVideoProcessor, LlavaNextVideoProcessor):
    """LlavaNextVideoProcessor with fast tiles and frames."""

    stock_class = LlavaNextVideoProcessor


class FastLlavaOnevisionProcessor(FastVideoOutput, AnyVideoProcessor, LlavaOnevisionProcessor):
    """LlavaOnevisionProcessor with fast tiles and frames."""

    stock_class = LlavaOnevisionProcessor


KINDS: dict[str, tuple[Any, Any]] = {
    "llava": (FastLlavaProcessor, None),
    "llava_next": (FastLlavaNextProcessor, None),
    "llava_next_video": (FastLlavaNextVideoProcessor, FastLlavaNextVideoVideoProcessor),
    "llava_onevision": (FastLlavaOnevisionProcessor, FastLlavaOnevisionVideoProcessor),
}
"""Model type -> its processor class and its video processor class."""


class FastProcessor:
    """`FastProcessor.from_pretrained(path)`: a drop-in for `AutoProcessor.from_pretrained(path)`."""

    @staticmethod
    def from_pretrained(path: str, output: str = "float32", threads: int = 0, **kwargs: Any) -> FastOutput:
        """A transformers processor (Llava-, LlavaNext-, LlavaNextVideo- or LlavaOnevisionProcessor) whose image and
        video parts are fast.

        output   "float32": `pixel_values` and `pixel_values_videos`, bit-identical to those of transformers' PIL image
                 processors, for videos frame by frame. "uint8": `pixel_values_uint8` and `pixel_values_videos_uint8`,
                 the tiles before normalisation, a quarter of the bytes, for a model accelerated with this processor.
                 generate of a stock or restored model raises for these names, but its forward silently ignores them,
                 as it ignores any unknown keyword, and answers as if there were no image.
        threads  per call; 0: all cores. Use 1 in DataLoader workers.
        Works without torchvision. Raises CheckpointError for an unsupported model type, ValueError for another output.
        """
        versions.warn_if_untried()
        if output not in OUTPUTS:
            raise ValueError(f"output must be one of {', '.join(OUTPUTS)}, got {output!r}")
        model_type = PreTrainedConfig.get_config_dict(path, **kwargs)[0].get("model_type")
        if model_type not in KINDS:
            raise CheckpointError(
                f"FastProcessor supports the model types {', '.join(KINDS)}; {path} is {model_type!r}: use "
                "transformers' AutoProcessor for it"
            )
        kind, frames = KINDS[model_type]
        settings, _ = kind.get_processor_dict(path, **kwargs)
        parts: dict[str, FastTiles | FastFrames] = {"image_processor": _image_processor(path, model_type, kwargs)}
        if frames is not None:
            parts["video_processor"] = frames.from_pretrained(path, **kwargs)
        for part in parts.values():
            part.output, part.threads = output, threads
        known = {name: settings[name] for name in SETTINGS if name in settings}
        return kind(tokenizer=AutoTokenizer.from_pretrained(path, **kwargs), **parts, **known)


def _image_processor(path: str, model_type: str, kwargs: dict[str, Any]) -> FastTiles:
    """The fast image processor with the checkpoint's settings. Raises CheckpointError for an unsupported one."""
    if model_type == "llava_onevision":
        return FastLlavaOnevisionImageProcessor.from_pretrained(path, **kwargs)
    if model_type in ("llava_next", "llava_next_video"):
        return FastLlavaNextImageProcessor.from_pretrained(path, **kwargs)
    settings, _ = CLIPImageProcessorPil.get_image_processor_dict(path, **kwargs)
    old = (settings.get("feature_extractor_type") or "LlavaImageProcessor").replace(
        "FeatureExtractor", "ImageProcessor"
    )
    named = (settings.get("image_processor_type") or old).removesuffix("Fast").removesuffix("Pil")
    if named not in ONE_TILE:
        raise CheckpointError(
            f"FastProcessor supports the image processors {', '.join(ONE_TILE)} of a llava; {path} names {named!r}: "
            "use transformers' AutoProcessor for it"
        )
    return ONE_TILE[named].from_pretrained(path, **kwargs)
