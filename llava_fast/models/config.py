"""The config of a checkpoint; built by `llava_fast.checkpoints`, read by models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from llava_fast.inputs.tiling.anyres import VisualGeometry
from llava_fast.models.connectors.base import ConnectorConfig
from llava_fast.models.decoders.base import DecoderConfig
from llava_fast.models.decoders.none import NoDecoderConfig
from llava_fast.models.router import RouterConfig
from llava_fast.models.towers.base import TowerConfig


@dataclass(frozen=True, kw_only=True)
class VisualConfig:
    """How images and videos become rows of a decoder: the tower, the connector, the geometry, whether a learned row
    ends lines of tiles, and what leaves out optional rows. Raises ValueError for parts that do not fit."""

    vision: TowerConfig
    projector: ConnectorConfig
    geometry: VisualGeometry
    has_newline: bool = False
    router: RouterConfig | None = None

    def __post_init__(self) -> None:
        part: str
        given: float
        if self.projector.rowwise:
            part, given = "tower", self.vision.rows_per_tile
        else:
            if self.vision.native_sizes and not self.projector.any_shape:
                raise ValueError("a connector that reads whole tiles does not support a tower of native sizes")
            part, given = "connector", self.projected_per_tile
            if self.geometry.video_pool != "none" and self.geometry.video_pool_stage == "before":
                raise ValueError(
                    "video_pool_stage is 'before', and this connector reads whole tiles: set it to 'after'"
                )
        whole = self.projector.reads_images or (self.vision.native_sizes and not self.projector.rowwise)
        # outputs rows per image, not per tile
        if not whole and self.geometry.tower_rows_per_tile != given:
            raise ValueError(
                f"the {part} gives {given} rows per tile, but the geometry has {self.geometry.tower_rows_per_tile}: "
                "set its tile_size and patch_size, and class_rows or dropped_rows to 1 for a CLIP tower"
            )

    @property
    def width(self) -> int:
        """Of the rows that the connector returns, which is the decoder's."""
        return self.projector.out_features  # type: ignore[attr-defined]  # a field of every connector's config

    @property
    def projected_per_tile(self) -> float:
        """Rows that the connector returns for a tile if all of its patches are used; for a connector that reads whole
        images of native sizes, the share of one patch in an image of usual size.
        """
        vision = self.vision
        if vision.native_sizes and not self.projector.rowwise:
            return self.projector.rows_of(vision.patches_per_image) / vision.patches_per_image
        left_out = vision.leading_rows if vision.drops_class_row or self.projector.rowwise else 0
        return self.projector.rows_of(vision.rows_per_tile - left_out)


@dataclass(frozen=True, kw_only=True)
class LlavaConfig(VisualConfig):
    """A whole checkpoint. `source` is its config.json as read, and `tower_processor` the preprocessor_config.json of an
    original checkpoint's tower, kept so that saving returns every field."""

    decoder: DecoderConfig
    layout: Literal["hf", "original"]
    model_type: str
    image_token_id: int
    video_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    source: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    tower_processor: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def embedding(self) -> str:
        """The name of the token embedding's tensor in the whole model."""
        return f"decoder.{self.decoder.embedding_name}.weight"


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig(LlavaConfig):
    """A checkpoint without a decoder, which compares images and texts (models.retrieval)."""

    decoder: NoDecoderConfig

    @property
    def embedding(self) -> str:
        """The token embedding is the connector's."""
        return "projector.embeddings.word_embeddings.weight"


class ConfiguredModel(nn.Module):
    """A model with the parts of a checkpoint other than tensors.

    side_files  the texts of the loaded checkpoint's small files, which `save` writes back.
    """

    config: LlavaConfig
    side_files: dict[str, str]

    @property
    def tokenizer(self) -> Any:
        return None

    @property
    def connector_tokenizer(self) -> Any:
        return None
