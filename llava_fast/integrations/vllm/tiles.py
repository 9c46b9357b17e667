"""What vLLM calls in the place of a transformers processor: pictures and videos to uint8 tiles. Knows no vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature

from llava_fast.errors import RequestError
from llava_fast.inputs.pictures.reading import open_image
from llava_fast.inputs.pictures.tiles import make_tiles
from llava_fast.inputs.pictures.view import View
from llava_fast.inputs.tiling.anyres import VisualGeometry, image_views
from llava_fast.inputs.tiling.video import frame_views
from llava_fast.integrations.vllm import SWITCH

_OF_TEXT = {"return_tensors", "truncation", "padding", "add_special_tokens"}


class TileProcessor:
    """Called as a transformers processor; text is ignored, since vLLM tokenises prompts itself.

    geometry     how images are cut; each is cut on its own, whatever else its prompt holds, because vLLM caches it by
                 its content.
    image_token, video_token  the placeholders in a prompt's text.
    """

    def __init__(self, geometry: VisualGeometry, image_token: str, video_token: str | None) -> None:
        self.geometry, self.image_token, self.video_token = geometry, image_token, video_token

    def __call__(self, text: Any = None, images: Any = None, videos: Any = None, **options: Any) -> BatchFeature:
        """pixel_values: uint8 tiles, [images, 3, T, T] if an image is one tile, else a list of [tiles, 3, T, T] and
        image_sizes int64 [images, 2] as (height, width). pixel_values_videos: a list of uint8 [frames, 3, T, T].

        images  one or a list of PIL images or uint8 arrays [H, W], [H, W, C] or [3, H, W].
        videos  one or a list of them: frames, or (frames, metadata).
        Raises RequestError for an option of a processor, and ImageError.
        """
        if unknown := sorted(options.keys() - _OF_TEXT):
            raise RequestError(
                f"llava_fast's tiles are the checkpoint's, and mm_processor_kwargs asks for {', '.join(unknown)}: "
                f"leave it out, or start vLLM with {SWITCH}=0"
            )
        made: dict[str, Any] = {}
        if images is not None:
            shown = [pixels(image) for image in (images if isinstance(images, Sequence) else [images])]
            tiles = [torch.from_numpy(self._cut(image)) for image in shown]
            if self.geometry.aspect == "anyres":
                made["pixel_values"] = tiles
                made["image_sizes"] = torch.tensor([image.shape[:2] for image in shown])
            else:
                made["pixel_values"] = torch.cat(tiles)
        if videos is not None:
            made["pixel_values_videos"] = [self._frames(video) for video in _each_video(videos)]
        return BatchFeature(made)

    def _cut(self, image: np.ndarray) -> np.ndarray:
        return self._make(image, image_views(self.geometry, *image.shape[:2]))

    def _frames(self, video: Any) -> Tensor:
        made = []
        for frame in video:
            image = pixels(frame)
            made.append(self._make(image, frame_views(self.geometry, *image.shape[:2])))
        return torch.from_numpy(np.concatenate(made))

    def _make(self, image: np.ndarray, views: Sequence[View]) -> np.ndarray:
        """By as many threads as torch may use here: vLLM's processes share the cores, and some of them never sleep."""
        return make_tiles(image, views, self.geometry.tile_size, threads=torch.get_num_threads())


def pixels(image: Any) -> np.ndarray:
    """uint8 [H, W, 3] of a PIL image or an array of any of vLLM's layouts. Raises ImageError."""
    if isinstance(image, Tensor):
        image = image.cpu().numpy()
    if isinstance(image, np.ndarray) and image.ndim == 3:
        if image.shape[-1] not in (1, 3, 4):
            image = np.ascontiguousarray(np.moveaxis(image, 0, -1))
        if image.shape[-1] == 1:
            image = image[..., 0]
    return open_image(image, exif=False, alpha="white")


def _each_video(videos: Any) -> list[Any]:
    """Videos without their metadata."""
    if not isinstance(videos, list) or (videos and _is_frame(videos[0])):
        videos = [videos]
    return [video[0] if isinstance(video, tuple) else video for video in videos]


def _is_frame(item: Any) -> bool:
    return not isinstance(item, (list, tuple)) and len(np.shape(item)) < 4
