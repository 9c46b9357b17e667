"""SliME (yifanzhang114/SliME-vicuna-7B, -vicuna-13B, -Llama3-8B): an original LLaVA with mm_projector_type "gated".

Rows of an image: 576 of its squashed overview, from two experts; the embedding of the separator token; and of the rows
of 2 to 7 tiles, 144 each, those that a router keeps by their similarity to the prompt's text. The number of kept rows
depends on image and text, so rows are counted up to a maximum, and an image's rows are reused only with the same text.

The text is that of the whole prompt, as in the original's inference. Its trainer includes the answers (the line that
masks them is commented out), which no question has at inference: here they are left out, unless a recipe says
data.router_text: all. Several images of a prompt are routed with its whole text (the original supports one). Other
differences: the router computes in float32, and top_p 1 keeps all rows (its rounding may lose some).

pos_embed of both resamplers is read from the checkpoint, which has it in 16 bits. mm_resampler_type "qformer" (a
trained router) and images that are not "anyres" are not supported.

Sources: Zhang et al. 2024; yfzhang114/SliME 5c89ec9 mm_utils.py, llava_arch.py, conversation.py, train.py,
multimodal_projector/builder.py, multimodal_resampler/{builder,sampler}.py, scripts/.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from llava_fast.errors import CheckpointError
from llava_fast.families.base import Family, TokenIds
from llava_fast.families.fields import OriginalConfig, TokenId
from llava_fast.families.known_towers import Tower
from llava_fast.families.llava_names import LLAVA_NAMES
from llava_fast.families.llava_original import LlavaOriginal
from llava_fast.families.names import NameMap
from llava_fast.families.parts import require
from llava_fast.inputs.tiling.anyres import VisualGeometry
from llava_fast.inputs.tiling.canvas import CanvasTiling
from llava_fast.models.config import LlavaConfig
from llava_fast.models.connectors.base import ConnectorConfig
from llava_fast.models.connectors.overview_mixture import OverviewMixtureConfig
from llava_fast.models.router import RouterConfig
from llava_fast.models.towers.base import TowerConfig
from llava_fast.models.towers.vit import ClipConfig
from llava_fast.storage.bounds import Positive, Size
from llava_fast.storage.files import Fields

_HEAD = 128  # width of a head of the resamplers
_SEPARATOR = 1919  # "," in Vicuna's tokenizer
_LLAMA_3 = 128000  # its vocabulary is at least this large


class OwnFields(Fields):
    """What config.json has beside a LLaVA's fields."""

    mm_resampler_topp: Annotated[float, Field(gt=0, le=1)] = 0.9
    mm_resampler_temp: Positive = 0.5
    mm_resampler_dim: Size = 64
    mm_learnable_gated: Annotated[int, Field(ge=-1, le=1)] = -1
    use_global_only: bool = False
    use_local_only: bool = False
    seperator: TokenId = _SEPARATOR


class SlimeFields(OriginalConfig, OwnFields):
    """config.json."""


class Slime(LlavaOriginal):
    """SliME."""

    model_types = ("slime",)
    system = "SliME"
    reference = "transformers' CLIP and Llama with the original's steps"
    own_type = "slime"
    beside_projector = ("sampler.bin",)
    config_fields: ClassVar[type[OriginalConfig]] = SlimeFields
    names = NameMap(
        {
            "original": (
                ("projector.mlp.layers.", "model.mm_projector.projection."),
                ("projector.expert.", "model.mm_projector.attn."),
                ("projector.compressor.", "model.sampler.post_qformer."),
                ("projector.gate", "model.mm_projector.w_gate"),
                ("projector.noise", "model.mm_projector.w_noise"),
                ("projector.mean", "model.mm_projector.mean"),
                ("projector.std", "model.mm_projector.std"),
                *LLAVA_NAMES.written["original"],
            )
        },
        read=tuple(rule for rule in LLAVA_NAMES.read if rule[0] == "vision_tower."),
        skipped=LLAVA_NAMES.skipped,
    )
    other = Family.other

    def tower(self, vision: TowerConfig, file: Path) -> TowerConfig:
        if not isinstance(vision, ClipConfig):
            raise CheckpointError(f"{file}: mm_vision_tower is {vision.kind}; a SliME's is a CLIP")
        if vision.keep_class_row:
            raise CheckpointError(f"{file}: mm_vision_select_feature is 'cls_patch'; a SliME's is 'patch'")
        return vision

    def connector(self, source: dict[str, Any], vision: TowerConfig, out_features: int, file: Path) -> ConnectorConfig:
        require(source.get("mm_resampler_type"), ("cosine",), "mm_resampler_type", file)
        given = OwnFields.model_validate(source)
        grid = math.isqrt(given.mm_resampler_dim)
        if grid**2 != given.mm_resampler_dim:
            raise CheckpointError(f"{file}: mm_resampler_dim is {given.mm_resampler_dim}, which is not a square")
        if vision.feature_size % _HEAD:
            raise CheckpointError(f"{file}: the tower's width is {vision.feature_size}, not a multiple of {_HEAD}")
        if given.use_global_only and given.use_local_only:
            raise CheckpointError(f"{file}: use_global_only and use_local_only are both true: images have no rows")
        side = math.isqrt(vision.patches_per_tile)
        return OverviewMixtureConfig(
            vision.feature_size,
            out_features,
            vision.feature_size // _HEAD,
            grid,
            side,
            overview=not given.use_local_only,
            tiled=not given.use_global_only,
            expert=None if given.mm_learnable_gated < 0 else 1 if given.mm_learnable_gated else 0,
        )

    def router(self, source: dict[str, Any], file: Path) -> RouterConfig | None:
        given = OwnFields.model_validate(source)
        if given.use_global_only or given.mm_resampler_topp == 1:
            return None
        return RouterConfig(given.mm_resampler_topp, given.mm_resampler_temp)

    def tiles(
        self, source: dict[str, Any], vision: TowerConfig, tower: Tower, merge: str, file: Path
    ) -> VisualGeometry:
        require(source.get("image_aspect_ratio"), ("anyres",), "image_aspect_ratio", file)
        require(merge, ("flat", "spatial"), "mm_patch_merge_type", file)
        tower.check_anyres()
        given = OwnFields.model_validate(source)
        tiling = CanvasTiling(
            math.isqrt(given.mm_resampler_dim),
            spatial=merge == "spatial",
            overview=not given.use_local_only,
            tiled=not given.use_global_only,
            routed=self.router(source, file) is not None,
            separator=(given.seperator,),
        )
        return VisualGeometry(vision.image_size, vision.patch_size, compat="llava", tiling=tiling)

    def geometry(self, config: LlavaConfig, tokenizer: Any) -> VisualGeometry:
        assert isinstance(config.geometry.tiling, CanvasTiling)
        for token in config.geometry.tiling.separator:
            if not 0 <= token < config.decoder.vocab_size:
                raise CheckpointError(
                    f"the separator token of a SliME (seperator in config.json) is {token}, and vocab_size is "
                    f"{config.decoder.vocab_size}: give a token of the vocabulary"
                )
        return config.geometry

    def template(self, name: str, config: LlavaConfig) -> str:
        return "slime_llama_3" if config.decoder.vocab_size >= _LLAMA_3 else "vicuna_v1"

    def write(self, config: LlavaConfig, tokens: TokenIds) -> dict[str, Any]:
        raise CheckpointError("a SliME is saved with the config.json that it was read with, and this one has none")
