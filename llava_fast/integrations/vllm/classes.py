"""vLLM's LLaVA classes with this package's visual half. Imported only where vLLM serves one of them.

A class derives from vLLM's own, which keeps the language model, the prompt's placeholders and the fields of a request.
A checkpoint that this package cannot read is served by vLLM's own class, with the reason logged once.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import AutoWeightsLoader, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import BaseProcessingInfo

from llava_fast.errors import CheckpointError
from llava_fast.inputs.tiling.anyres import count_image_rows, image_rows
from llava_fast.inputs.tiling.video import video_rows
from llava_fast.integrations.vllm import SWITCH, tell
from llava_fast.integrations.vllm.checkpoint import Loader, Unserved, Visual, read_visual
from llava_fast.integrations.vllm.tiles import TileProcessor
from llava_fast.models.visual import VisualModel

logger = logging.getLogger("vllm.llava_fast")  # under vLLM's own, which shows what it is told
MODALITIES = {
    "llava": {"image"},
    "llava_next": {"image"},
    "llava_next_video": {"video"},  # vLLM's own takes no images either
    "llava_onevision": {"image", "video"},
}
NEEDED = {
    "configure_mm_token_handling": {"vocab_size", "mm_token_ids"},
    "_mark_tower_model": {"vllm_config", "modalities"},
    "_mark_language_model": {"vllm_config"},
    "embed_multimodal": set(),
    "load_weights": {"weights"},
    "_processor_factory": set(),
    "forward": {"input_ids", "positions", "inputs_embeds"},
}
"""What is called or replaced of vLLM's classes, and the parameters that are given by name."""


def check_api(stock: type) -> None:
    """Raises TypeError for a class of vLLM that is not the one this file was written for."""
    for name, parameters in NEEDED.items():
        found = getattr(stock, name, None)
        if found is None:
            raise TypeError(f"{stock.__name__} has no {name}")
        if gone := parameters and parameters - set(inspect.signature(found).parameters):
            raise TypeError(f"{stock.__name__}.{name} takes no {', '.join(sorted(gone))}")
    for name in ("get_hf_processor", "get_hf_config", "get_tokenizer"):
        if not hasattr(BaseProcessingInfo, name):
            raise TypeError(f"BaseProcessingInfo has no {name}")


def read(model_config: Any) -> Visual:
    """Raises Unserved."""
    if model_config.multimodal_config.mm_processor_kwargs:
        raise Unserved("mm_processor_kwargs are given, and llava_fast cuts images as the checkpoint says")
    return read_visual(model_config.model, model_config.revision, model_config.hf_config)


def serves(model_config: Any) -> bool:
    """Whether our classes serve this model; if not, the reason is logged."""
    try:
        read(model_config)
    except Unserved as why:
        tell(f"{model_config.model} is served by vLLM's own class: {why}")
        return False
    return True


class FastInfo:
    """Over a BaseProcessingInfo of vLLM: token counts and tiles by the geometry from which rows are placed."""

    ctx: Any
    get_tokenizer: Any

    @functools.cached_property
    def visual(self) -> Visual:
        return read(self.ctx.model_config)

    @functools.cached_property
    def tiles(self) -> TileProcessor:
        hf, words = self.get_hf_config(), self.get_tokenizer().convert_ids_to_tokens
        (image,), video = words([hf.image_token_index]), getattr(hf, "video_token_index", None)
        return TileProcessor(self.visual.config.geometry, image, None if video is None else words([video])[0])

    def get_hf_config(self) -> Any:
        return self.ctx.get_hf_config()

    def get_hf_processor(self, **kwargs: object) -> TileProcessor:
        return self.tiles

    def get_supported_mm_processor_kwargs(self) -> dict[str, set[str]]:
        return {}

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        return count_image_rows(self.visual.config.geometry, image_height, image_width)

    def get_image_size_with_most_features(self) -> Any:
        """Of vLLM's own guess and the sizes that fill a grid of tiles; vLLM reserves room for such a picture."""
        geometry, own = self.visual.config.geometry, super()
        guess = own.get_image_size_with_most_features()  # type: ignore[attr-defined]  # vLLM's class is the next
        sizes = [(guess.height, guess.width), *(geometry.canvases if geometry.aspect == "anyres" else ())]
        height, width = max(sizes, key=lambda size: count_image_rows(geometry, *size))
        return type(guess)(width=width, height=height)

    def get_num_video_tokens(self, *, image_width: int, image_height: int, num_frames: int) -> int:
        return len(video_rows(self.visual.config.geometry, num_frames))


@functools.cache
def _fast_info(stock: type) -> type:
    return type(f"Fast{stock.__name__}", (FastInfo, stock), {})


class FastModel:
    """Over a LLaVA class of vLLM."""

    stock: type
    supports_tower_connector_lora = False
    visual: VisualModel
    language_model: Any

    def __new__(cls, *, vllm_config: Any, prefix: str = "") -> Any:
        if serves(vllm_config.model_config):
            return super().__new__(cls)
        if "stock" not in vars(cls):
            raise ValueError(f"{cls.__name__} is made of llava_fast's class: start vLLM with {SWITCH}=0")
        return cls.stock(vllm_config=vllm_config, prefix=prefix)

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        torch.nn.Module.__init__(self)  # type: ignore[arg-type]  # vLLM's class is one
        model: Any = self
        hf = vllm_config.model_config.hf_config
        model.config, model.multimodal_config = hf, vllm_config.model_config.multimodal_config
        self.names = read(vllm_config.model_config).names
        tokens = [hf.image_token_index, getattr(hf, "video_token_index", None)]
        model.configure_mm_token_handling(
            vocab_size=hf.text_config.vocab_size, mm_token_ids=[token for token in tokens if token is not None]
        )
        with model._mark_tower_model(vllm_config, MODALITIES[hf.model_type]):
            model.visual = _empty(read(vllm_config.model_config))
        with model._mark_language_model(vllm_config):
            model.language_model = init_vllm_registered_model(
                vllm_config=vllm_config, hf_config=hf.text_config, prefix=maybe_prefix(prefix, "language_model")
            )
        model.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors
        self._filled = False
        logger.info("tiles, vision tower and projector of %s are llava_fast's", vllm_config.model_config.model)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """The rows of each image and video, in the order in which vLLM gives their fields."""
        made: dict[str, Any] = {}
        for name, given in kwargs.items():
            if name == "image_embeds" and given is not None:
                made["image"] = given
            elif name == "pixel_values" and given is not None:
                made["image"] = self._images(given, kwargs.get("image_sizes"))
            elif name == "pixel_values_videos" and given is not None:
                rows = [video_rows(self.visual.config.geometry, len(video)) for video in given]
                made["video"] = self.visual.visual_embeds(_end_to_end(given), [], rows)
        return [rows for group in made.values() for rows in group]

    def _images(self, pixels: Any, sizes: Any) -> list[Tensor]:
        geometry = self.visual.config.geometry
        if sizes is None:  # one tile each, [images, 3, T, T]
            side = geometry.tile_size
            return self.visual.visual_embeds(_stacked(pixels), [image_rows(geometry, side, side)] * len(pixels))
        each = [image_rows(geometry, int(height), int(width)) for height, width in sizes]
        return self.visual.visual_embeds(_end_to_end(pixels), each)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        # vLLM leaves the visual half out where no image may come.
        visual = self.visual if isinstance(self.visual, VisualModel) else None
        loader = Loader(visual, self.names)
        loaded = AutoWeightsLoader(self).load_weights(loader.rest(weights))
        missing = [] if self._filled else loader.missing()  # a later call may bring some tensors only
        if missing:
            raise CheckpointError(f"the checkpoint lacks {len(missing)} tensors of tower and projector: {missing[:4]}")
        self._filled = True
        unused = set() if visual is None else set(dict(visual.named_parameters())) - loader.loaded
        return loaded | {f"visual.{name}" for name in loader.loaded | unused}

    def get_mm_mapping(self) -> MultiModelKeys:
        return MultiModelKeys.from_string_field(
            language_model="language_model", connector="visual.projector", tower_model="visual.vision_tower"
        )


def _empty(visual: Visual) -> VisualModel:
    """In vLLM's dtype and on its device, which are torch's defaults where it builds a model."""
    device = torch.get_default_device()
    with torch.device("meta"):
        model = VisualModel(visual.config)
    return model.requires_grad_(False).eval().to_empty(device=device)


def _stacked(tiles: Any) -> Tensor:
    return tiles if isinstance(tiles, Tensor) else torch.stack(list(tiles))


def _end_to_end(tiles: Any) -> Tensor:
    return tiles.flatten(0, 1) if isinstance(tiles, Tensor) else torch.cat(list(tiles))


def fast_class(stock: type) -> type:
    """Our class over one of vLLM's, with a processor. Raises TypeError for a class of another API."""
    check_api(stock)
    factory = stock._processor_factory  # type: ignore[attr-defined]

    def info(ctx: Any) -> Any:
        found = factory.info(ctx)
        kind: Any = type(found)
        return _fast_info(kind)(ctx) if serves(ctx.model_config) else found

    made = type(stock.__name__, (FastModel, stock), {"stock": stock, "__module__": f"{__package__}.models"})
    register = MULTIMODAL_REGISTRY.register_processor(factory.processor, info=info, dummy_inputs=factory.dummy_inputs)
    return register(made)
