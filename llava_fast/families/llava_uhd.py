"""LLaVA-UHD, branch v1 (guozonghao96/llava-uhd-144-13b) and first release: an original LLaVA of slices of any size.

Its config.json is a LLaVA's whose mm_projector_type is adapt_spatial_resampler_v1 (144 rows per slice) or
uhd_v1_query64. Slices of a line are separated by ",", lines by a newline, and a view of the whole follows. Later
releases (v2, v3), whose connectors have other names, are not supported.

The first release has 64 rows per slice from a resampler that reads the whole slice, another rule for slices, and no
separators; the paper's, as in branch v1, are there with `uhd_separators: true`. No checkpoint of it is known, and its
config.json would not say what it is (its mm_projector_type is that of LLaVA-1.5), so write mm_projector_type uhd_first
in it. Its code does not run as it was published; faults that are not repeated here: it takes five of eight slices
whatever the image, swaps the sizes of slices and the whole view, resizes slices to the whole's shape, pads them to 576
rows with patches of zeros that the model attends to, and does not normalise pixels.

Differences from the original code: it rounds the borders of a query's part to bfloat16; and here at most 9 slices are
cut in training too, as in its inference code (its training code: 7).

Sources: Guo et al. 2024; thunlp/LLaVA-UHD dd7f6cc, 48472b4 and 1d6559f: slice_process.py, llava_arch.py,
uhd_v1_resampler.py, multimodal_projector/builder.py; 7a3a1b6: train/llava-uhd/{slice_logic,adapt_clip,adapt_llava,
vision_projector,resampler}.py.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

from llava_fast.errors import CheckpointError
from llava_fast.families.base import Family, TokenIds
from llava_fast.families.fields import OriginalConfig
from llava_fast.families.known_towers import Tower
from llava_fast.families.llava_names import LLAVA_NAMES
from llava_fast.families.llava_original import LlavaOriginal, known_tower_name, own_tower
from llava_fast.families.names import NameMap
from llava_fast.families.parts import require, token_id, tower_fields, tower_preprocessing
from llava_fast.families.preprocessing import tower_kind, written
from llava_fast.inputs.tiling.anyres import VisualGeometry
from llava_fast.inputs.tiling.slices import FirstSliceTiling, SliceTiling
from llava_fast.models.config import LlavaConfig
from llava_fast.models.connectors.base import ConnectorConfig
from llava_fast.models.connectors.perceiver import SlicePerceiverConfig
from llava_fast.models.connectors.spatial_resampler import SpatialResamplerConfig
from llava_fast.models.towers.base import TowerConfig
from llava_fast.models.towers.clip_slices import ClipSlicesConfig
from llava_fast.models.towers.vit import ClipConfig

_FIRST = "uhd_first"
_GRIDS = {"adapt_spatial_resampler_v1": 12, "uhd_v1_query64": 8, _FIRST: 8}
"""mm_projector_type -> queries along one side."""
_HEAD = 128  # width of a head of the connector


class UhdFields(OriginalConfig):
    """config.json."""

    uhd_separators: bool = False


class LlavaUhd(LlavaOriginal):
    """LLaVA-UHD of branch v1 or the first release."""

    model_types = ("llava_uhd",)
    system = "LLaVA-UHD, branch v1 and first release"
    reference = "transformers' CLIP and Llama with the original's steps"
    own_type = "llava_uhd"
    config_fields: ClassVar[type[OriginalConfig]] = UhdFields
    names = NameMap(
        {"original": (("projector.", "model.mm_projector."), *LLAVA_NAMES.written["original"])},
        read=tuple(rule for rule in LLAVA_NAMES.read if rule[0] == "vision_tower."),
        skipped=LLAVA_NAMES.skipped,
    )
    other = Family.other

    def tower(self, vision: TowerConfig, file: Path) -> TowerConfig:
        if not isinstance(vision, ClipConfig):
            raise CheckpointError(f"{file}: mm_vision_tower is {vision.kind}; a LLaVA-UHD's is a CLIP")
        if vision.keep_class_row:
            raise CheckpointError(f"{file}: mm_vision_select_feature is 'cls_patch'; a LLaVA-UHD's is 'patch'")
        return ClipSlicesConfig.of(vision)

    def connector(self, source: dict[str, Any], vision: TowerConfig, out_features: int, file: Path) -> ConnectorConfig:
        if source.get("mm_resampler_type"):
            raise CheckpointError(f"{file}: mm_resampler_type is {source['mm_resampler_type']!r}; a LLaVA-UHD has none")
        kind, side = source["mm_projector_type"], round(vision.patches_per_image**0.5)
        if kind == _FIRST:
            heads = vision.feature_size // _HEAD
            if not heads or out_features % (4 * heads):
                raise CheckpointError(
                    f"{file}: the connector has {heads} heads, one for each {_HEAD} of the tower's "
                    f"{vision.feature_size} features; hidden_size, {out_features}, must be a multiple of 4 times that"
                )
            return SlicePerceiverConfig(
                vision.feature_size, out_features, heads, _GRIDS[kind], side, own_positions=True
            )
        require(source.get("model_mode", "uhd_v1"), ("uhd_v1",), "model_mode", file)
        if out_features % _HEAD:
            raise CheckpointError(f"{file}: hidden_size is {out_features}; the connector needs a multiple of {_HEAD}")
        return SpatialResamplerConfig(vision.feature_size, out_features, out_features // _HEAD, _GRIDS[kind], side)

    def tiles(
        self, source: dict[str, Any], vision: TowerConfig, tower: Tower, merge: str, file: Path
    ) -> VisualGeometry:
        require(merge, ("flat",), "mm_patch_merge_type", file)
        assert isinstance(vision, ClipSlicesConfig)
        first = source["mm_projector_type"] == _FIRST
        queries = _GRIDS[source["mm_projector_type"]] ** 2
        tiling = FirstSliceTiling(vision.trained_size, queries) if first else SliceTiling(vision.trained_size, queries)
        if first and not source.get("uhd_separators"):
            tiling = dataclasses.replace(tiling, between=(), after=())
        patch = vision.patch_size
        return VisualGeometry(patch, patch, compat="llava", tiling=tiling, filter="bilinear" if first else "bicubic")

    def geometry(self, config: LlavaConfig, tokenizer: Any) -> VisualGeometry:
        """Llama's tokenizer calls a newline <0x0A>, one of bytes Ċ."""
        assert isinstance(config.geometry.tiling, SliceTiling)
        if not config.geometry.tiling.between:
            return config.geometry
        newline = "<0x0A>" if "<0x0A>" in tokenizer.get_vocab() else "Ċ"
        between, after = ((token_id(tokenizer, token, config),) for token in (",", newline))
        tiling = dataclasses.replace(config.geometry.tiling, between=between, after=after)
        return dataclasses.replace(config.geometry, tiling=tiling)

    def write(self, config: LlavaConfig, tokens: TokenIds) -> dict[str, Any]:
        raise CheckpointError("a LLaVA-UHD is saved with the config.json that it was read with, and this one has none")

    def unchanged(self, config: LlavaConfig) -> dict[str, Any]:
        return config.source | {"mm_vision_tower": _tower_name(config)[0], "unfreeze_mm_vision_tower": True}

    def processor_files(self, config: LlavaConfig) -> dict[str, dict[str, Any]]:
        if (folder := _tower_name(config)[1]) is None:
            return {}
        plain = _plain(config)
        processor = written(
            tower_preprocessing(plain, plain.own_aspect, None, "bicubic"), plain.image_size, tower_kind(plain)
        )
        return {
            f"{folder}/config.json": tower_fields(own_tower(plain)),
            f"{folder}/preprocessor_config.json": config.tower_processor or processor,
        }


def _plain(config: LlavaConfig) -> ClipConfig:
    assert isinstance(config.vision, ClipSlicesConfig)
    return config.vision.plain


def _tower_name(config: LlavaConfig) -> tuple[str, str | None]:
    """(mm_vision_tower, folder inside the checkpoint that describes the tower, None for a known one)."""
    name, known = config.source["mm_vision_tower"], known_tower_name(_plain(config))
    if known is not None and Path(name).name == Path(known).name:
        return name, None
    if Path(name).is_absolute() or ".." in Path(name).parts:
        name = "clip_vision_tower"
    return name, name
