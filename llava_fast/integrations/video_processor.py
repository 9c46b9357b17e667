"""Video frames for FastProcessor: transformers' LLaVA video processors, with frames made by csrc.

Sampling and validating videos is transformers' code. Each frame is bit-identical to the result of the PIL image
processor with the same settings; transformers' video processors resize with torchvision, which differs by up to 2
levels. torchvision is not needed here; transformers' own video processors do not work without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature
from transformers.models.llava_next_video.video_processing_llava_next_video import LlavaNextVideoVideoProcessor
from transformers.models.llava_onevision.video_processing_llava_onevision import LlavaOnevisionVideoProcessor
from transformers.utils import is_torchvision_available
from transformers.video_processing_utils import BaseVideoProcessor

from llava_fast.inputs.pictures.tiles import make_tiles
from llava_fast.inputs.tiling.anyres import VisualGeometry, image_views
from llava_fast.integrations.tiles import Unserved, check_served, normalised, one_tile, tell_stock

if TYPE_CHECKING:
    from typing import Any as _Mixin  # signatures of transformers' classes differ between versions
else:
    _Mixin = object


class FastFrames(_Mixin):
    """Mixin for a video processor of transformers: the same outputs, computed faster. FastProcessor sets `output` and
    `threads`."""

    output = "float32"
    threads = 0
    stock_class: type

    def stock(self) -> BaseVideoProcessor:
        """transformers' video processor with the same settings."""
        ours = ("video_processor_type", "output", "threads")
        return self.stock_class(**{name: value for name, value in self.to_dict().items() if name not in ours})

    def convert_to_rgb(self, video: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return video if video.shape[-3] == 3 else super().convert_to_rgb(video, *args, **kwargs)

    def _preprocess(self, videos: list[Tensor], **settings: Any) -> BatchFeature:
        try:
            is_bytes = all(video.dtype == torch.uint8 and video.shape[-3] == 3 for video in videos)
            check_served(settings, is_bytes, self.output)
            geometry = one_tile(settings)
        except Unserved as why:
            if self.output == "uint8":
                raise ValueError(f"FastProcessor(output='uint8'): {why}; use output='float32' for that") from None
            if not is_torchvision_available():
                raise ImportError(
                    f"{why}: this needs transformers' own video processor, which needs torchvision: "
                    "install it, or give uint8 RGB frames and settings that make square tiles"
                ) from None
            tell_stock(self, str(why))
            return super()._preprocess(videos, **settings)
        made = [self._frames(video, geometry) for video in videos]
        if self.output == "float32":
            made = [normalised(frames, settings) for frames in made]
        data = {"pixel_values_videos": [torch.from_numpy(frames) for frames in made]}
        return BatchFeature(data=data, tensor_type=settings.get("return_tensors"))

    def _frames(self, video: Tensor, geometry: VisualGeometry) -> np.ndarray:
        """uint8 [frames, 3, H, W] to uint8 [frames, 3, T, T]."""
        whole = np.ascontiguousarray(video.cpu().numpy().transpose(0, 2, 3, 1))
        views, tile = image_views(geometry, *whole.shape[1:3]), geometry.tile_size
        return np.concatenate([make_tiles(frame, views, tile, threads=self.threads) for frame in whole])


class FastLlavaNextVideoVideoProcessor(FastFrames, LlavaNextVideoVideoProcessor):  # type: ignore[misc]  # its keywords are untyped
    """LLaVA-NeXT-Video: resize the shorter side to the tile's, then centre-crop."""

    stock_class = LlavaNextVideoVideoProcessor


class FastLlavaOnevisionVideoProcessor(FastFrames, LlavaOnevisionVideoProcessor):  # type: ignore[misc]  # its keywords are untyped
    """LLaVA-OneVision: resize to a square without keeping the aspect ratio."""

    stock_class = LlavaOnevisionVideoProcessor
