"""FastProcessor: transformers' own LLaVA processors, with tiles made by csrc on all cores instead of Pillow and numpy.

Text, templates and token counts are transformers' code; only `_preprocess` of the image processor is replaced, and only
for settings it serves to the bit (others run transformers' own). Classes are at module level, so that a processor can
be pickled to a data loader's worker.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import AutoTokenizer, BatchFeature, LlavaNextProcessor, LlavaProcessor, PreTrainedConfig
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import PILImageResampling
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.processing_utils import ProcessorMixin

from llava_fast.errors import CheckpointError
from llava_fast.inputs import images as pixels
from llava_fast.inputs.anyres import VisualGeometry, image_views

OUTPUTS = ("float32", "uint8")
SETTINGS = (
    "patch_size",
    "vision_feature_select_strategy",
    "num_additional_image_tokens",
    "chat_template",
    "image_token",
)
"""What a LLaVA processor has besides its image processor and its tokenizer."""


class FastTiles:
    """Over a PIL image processor of transformers: the same fields, made faster. FastProcessor sets `output` and
    `threads`."""

    output = "float32"
    threads = 0
    stock_class: type

    def stock(self) -> PilBackend:
        """transformers' own image processor with the same settings."""
        ours = ("image_processor_type", "output", "threads")
        return self.stock_class(**{name: value for name, value in self.to_dict().items() if name not in ours})

    def _preprocess(self, images: list[np.ndarray], **settings: Any) -> BatchFeature:
        geometry = self.geometry(settings)
        if geometry is None or not all(image.dtype == np.uint8 and len(image) == 3 for image in images):
            if self.output == "uint8":
                raise ValueError(
                    "FastProcessor(output='uint8') needs uint8 RGB images, bicubic resizing to square tiles, and the "
                    "checkpoint's own crop, rescaling and normalisation switched on; use output='float32' for others"
                )
            return super()._preprocess(images, **settings)
        made = [self._tiles(image, geometry) for image in images]
        if self.output == "float32":
            levels = self._levels(settings)
            made = [normalised(tiles, levels) for tiles in made]
        return self._packed(made, [image.shape[-2:] for image in images], settings)

    def _tiles(self, image: np.ndarray, geometry: VisualGeometry) -> np.ndarray:
        height, width = image.shape[-2:]
        whole = np.ascontiguousarray(image.transpose(1, 2, 0))
        return pixels.make_tiles(whole, image_views(geometry, height, width), geometry.tile_size, threads=self.threads)

    def _levels(self, settings: dict[str, Any]) -> np.ndarray:
        """[3, 256]: what transformers' own arithmetic makes of each pixel value in each channel."""
        every = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))
        rescaled = self.rescale(every, settings["rescale_factor"])
        return self.normalize(rescaled, settings["image_mean"], settings["image_std"])[:, 0]


def normalised(tiles: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """uint8 [tiles, 3, T, T] through a table [3, 256] of each channel's values."""
    out = np.empty(tiles.shape, levels.dtype)
    for tile, made in zip(tiles, out, strict=True):
        for channel in range(3):
            np.take(levels[channel], tile[channel], out=made[channel], mode="clip")  # "clip" writes without a buffer
    return out


def square_tile(settings: dict[str, Any]) -> int | None:
    """The side of the tile that these settings resize and crop to; None if they do anything else."""
    size, crop = settings["size"], settings["crop_size"]
    steps = all(settings[name] for name in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"))
    if not steps or settings["resample"] != PILImageResampling.BICUBIC or not crop:
        return None
    side = size.shortest_edge or size.height
    return side if {side, size.width or side, crop.height, crop.width} == {side} and not size.longest_edge else None


class FastCLIPImageProcessor(FastTiles, CLIPImageProcessorPil):
    """LLaVA-1.5's: the shorter side to the tile, then the middle."""

    stock_class = CLIPImageProcessorPil

    def geometry(self, settings: dict[str, Any]) -> VisualGeometry | None:
        tile = square_tile(settings)
        if tile is None or not settings["size"].shortest_edge:
            return None
        return VisualGeometry(tile_size=tile, patch_size=1, aspect="crop")

    def _packed(self, made: list[np.ndarray], sizes: list, settings: dict[str, Any]) -> BatchFeature:
        pixel_values = [tiles[0] for tiles in made]
        return BatchFeature(data={"pixel_values": pixel_values}, tensor_type=settings["return_tensors"])


class FastLlavaImageProcessor(FastCLIPImageProcessor, LlavaImageProcessorPil):
    """The same; or, with do_pad, the whole image on a square of the mean colour."""

    stock_class = LlavaImageProcessorPil

    def geometry(self, settings: dict[str, Any]) -> VisualGeometry | None:
        cropped = super().geometry(settings)
        if cropped is None or not settings["do_pad"]:
            return cropped
        mean = tuple(int(value * 255) for value in settings["image_mean"])
        return VisualGeometry(tile_size=cropped.tile_size, patch_size=1, aspect="pad", pad_color=mean)


class FastLlavaNextImageProcessor(FastTiles, LlavaNextImageProcessorPil):
    """AnyRes: the base view and the tiles of the best grid."""

    stock_class = LlavaNextImageProcessorPil

    def geometry(self, settings: dict[str, Any]) -> VisualGeometry | None:
        tile = square_tile(settings)
        pinpoints = tuple(tuple(pair) for pair in settings["image_grid_pinpoints"])
        if tile is None or any(side % tile for pair in pinpoints for side in pair):
            return None
        return VisualGeometry(tile_size=tile, patch_size=1, aspect="anyres", pinpoints=pinpoints)

    def _packed(self, made: list[np.ndarray], sizes: list, settings: dict[str, Any]) -> BatchFeature:
        made = self._pad_for_batching(made) if settings["do_pad"] else made
        data = {"pixel_values": made, "image_sizes": sizes}
        return BatchFeature(data=data, tensor_type=settings["return_tensors"])


class FastOutput:
    """Over a processor of transformers: uint8 tiles go by a name that no stock model takes by mistake."""

    stock_class: type

    def stock(self) -> ProcessorMixin:
        """transformers' own processor with the same settings."""
        known = {name: getattr(self, name) for name in SETTINGS}
        return self.stock_class(image_processor=self.image_processor.stock(), tokenizer=self.tokenizer, **known)

    def save_pretrained(self, save_directory: str, **kwargs: Any):
        """Save what transformers loads without llava_fast; FastProcessor.from_pretrained reads it too."""
        return self.stock().save_pretrained(save_directory, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> BatchFeature:
        made = super().__call__(*args, **kwargs)
        if self.image_processor.output == "uint8" and "pixel_values" in made:
            made["pixel_values_uint8"] = made.pop("pixel_values")
        return made


class FastLlavaProcessor(FastOutput, LlavaProcessor):
    """LlavaProcessor with fast tiles."""

    stock_class = LlavaProcessor


class FastLlavaNextProcessor(FastOutput, LlavaNextProcessor):
    """LlavaNextProcessor with fast tiles."""

    stock_class = LlavaNextProcessor


class FastProcessor:
    """`FastProcessor.from_pretrained(path)`: a drop-in for `AutoProcessor.from_pretrained(path)`."""

    @staticmethod
    def from_pretrained(path: str, output: str = "float32", threads: int = 0, **kwargs: Any) -> FastOutput:
        """A transformers processor (LlavaProcessor or LlavaNextProcessor) whose image part is fast.

        output   "float32": `pixel_values`, equal to those of transformers' PIL processors in every bit. "uint8":
                 `pixel_values_uint8`, the tiles before normalisation, a quarter of the bytes; stock models refuse it.
        threads  of one call; 0 is all cores. A data loader's worker wants 1.
        Works without torchvision. Raises CheckpointError for a model type it does not serve, ValueError for another
        output.
        """
        if output not in OUTPUTS:
            raise ValueError(f"output must be one of {', '.join(OUTPUTS)}, got {output!r}")
        kinds = {"llava": FastLlavaProcessor, "llava_next": FastLlavaNextProcessor}
        model_type = PreTrainedConfig.get_config_dict(path, **kwargs)[0].get("model_type")
        if model_type not in kinds:
            raise CheckpointError(
                f"FastProcessor serves the model types {', '.join(kinds)}; {path} is {model_type!r}: use transformers' "
                f"AutoProcessor for it"
            )
        kind = kinds[model_type]
        settings, _ = kind.get_processor_dict(path, **kwargs)
        image_processor = _image_processor(path, model_type, kwargs)
        image_processor.output, image_processor.threads = output, threads
        known = {name: settings[name] for name in SETTINGS if name in settings}
        return kind(image_processor=image_processor, tokenizer=AutoTokenizer.from_pretrained(path, **kwargs), **known)


def _image_processor(path: str, model_type: str, kwargs: dict[str, Any]) -> FastTiles:
    """The checkpoint's settings, in the class that serves them."""
    if model_type == "llava_next":
        return FastLlavaNextImageProcessor.from_pretrained(path, **kwargs)
    settings, _ = CLIPImageProcessorPil.get_image_processor_dict(path, **kwargs)
    named = settings.get("image_processor_type", "")
    kind = FastLlavaImageProcessor if named.startswith("Llava") else FastCLIPImageProcessor
    return kind.from_pretrained(path, **kwargs)
