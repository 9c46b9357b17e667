"""The interface of vision towers: a config gives rows, sizes and costs, and builds the tower."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from llava_fast.inputs.pictures.preprocessing import fold_values, may_fold
from llava_fast.models.recompute import Recompute
from llava_fast.storage.bounds import Layers, Pixels, Positive, Size
from llava_fast.storage.files import Fields


class VisionFields(Fields):
    """What the vision configs of ViTs have in common in transformers."""

    model_type: str | None = None
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    image_size: Pixels
    patch_size: Pixels
    hidden_act: str
    layer_norm_eps: Positive


@dataclass(frozen=True, kw_only=True)
class TowerConfig(ABC):
    """A vision tower's config.

    feature_layers  counts hidden states as transformers does: 0 is the embedding's output, k the output of layer k,
                    negative counts from the last; several are concatenated feature-wise.
    keep_class_row  whether leading rows that are not patches (CLIP's class row) reach the connector.
    image_mean, image_std, do_normalize, do_rescale, rescale_factor  the image processor's fields of these names: how a
                    tile's bytes are normalised.
    """

    kind: ClassVar[str]
    """Its short name, as original LLaVA checkpoints' folders have it."""
    leading_rows: ClassVar[int] = 0
    """Rows of each tile before those of the patches: a class row, registers."""
    own_aspect: ClassVar[str] = "squash"
    """How the tower's own image processor makes a square: "crop" or "squash"."""
    own_normalisation: ClassVar[tuple[tuple[float, ...], tuple[float, ...]]] = ((0.5,) * 3, (0.5,) * 3)
    """(mean, std) of images if a checkpoint does not state them."""
    native_sizes: ClassVar[bool] = False
    """Whether it reads images whole, each at its own aspect ratio. A tile is then one patch (image_size is patch_size),
    and `forward` is also given `grids`, the (rows, columns) of each image in the order of the tiles."""
    by_modality: ClassVar[bool] = False
    """Whether images and video frames have separate weights. `forward` then also gets `videos`, the (first, end) of
    each video's tiles, and `every`, whether all weights must run."""
    hf4_prefix: ClassVar[str] = ""
    """Name of the module that contains the tower in transformers 4, a prefix of stored names."""
    hf_unused: ClassVar[tuple[str, ...]] = ()
    """Name prefixes of modules in transformers' tower that are not used here."""
    hf_fields: ClassVar[type[Fields] | None] = None
    """The schema of its section of config.json; None: that of a ViT with square images and patches."""

    hidden_size: int
    num_layers: int
    image_size: int
    patch_size: int
    feature_layers: tuple[int, ...] = (-2,)
    keep_class_row: bool = False
    image_mean: tuple[float, ...] = ()
    image_std: tuple[float, ...] = ()
    do_normalize: bool = True
    do_rescale: bool = True
    rescale_factor: float = 1 / 255

    def __post_init__(self) -> None:
        for field, own in zip(("image_mean", "image_std"), self.own_normalisation, strict=True):
            if not getattr(self, field):
                object.__setattr__(self, field, own)

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(mean, std) of pixels in 0..1, which describes the whole conversion of a tile's bytes."""
        return fold_values(self.do_rescale, self.rescale_factor, self.do_normalize, self.image_mean, self.image_std)

    @property
    def folds_normalisation(self) -> bool:
        """Whether the patch embedding takes bytes (normalisation folded) or normalised values."""
        return may_fold(self.normalisation[1])

    @property
    def has_class_row(self) -> bool:
        return self.leading_rows > 0

    @property
    def drops_class_row(self) -> bool:
        """Whether leading rows run with the others and are then dropped."""
        return self.has_class_row and not self.keep_class_row

    @property
    def patches_per_tile(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def plain(self) -> TowerConfig:
        """The tower as described by its own repository and transformers."""
        return self

    @property
    def patches_per_image(self) -> int:
        """Patches of an image, or slice, of usual size that the tower reads as a whole."""
        return self.patches_per_tile

    @property
    def rows_per_tile(self) -> int:
        """Rows that the tower returns for a tile, leading ones included."""
        return self.patches_per_tile + self.leading_rows

    @property
    def layers_needed(self) -> int:
        """Layers that must run for the selected hidden states."""
        return max(layer if layer >= 0 else self.num_layers + 1 + layer for layer in self.feature_layers)

    def shortened(self) -> TowerConfig:
        """The same tower without the layers that never run; its features are the same."""
        layers = tuple(layer if layer >= 0 else self.num_layers + 1 + layer for layer in self.feature_layers)
        return replace(self, num_layers=self.layers_needed, feature_layers=layers)

    @property
    def feature_size(self) -> int:
        return self.hidden_size * len(self.feature_layers)

    @abstractmethod
    def build(self) -> Tower:
        """The tower itself."""

    @property
    @abstractmethod
    def layer_matrix_size(self) -> int:
        """Entries of a layer's matrices; each costs a row a multiplication and an addition."""

    @property
    @abstractmethod
    def kept_per_row(self) -> int:
        """Values that one layer saves for a row's backward pass."""

    def product_flops(self, tiles: int) -> float:
        """Operations of matrix products with weights: patch embedding and the layers that run."""
        embedding = 3 * self.patch_size**2 * self.hidden_size
        layers = self.rows_per_tile * self.layers_needed * self.layer_matrix_size
        return 2.0 * tiles * (self.patches_per_tile * embedding + layers)

    def attention_flops(self, tiles: int) -> float:
        """Operations of attention's two products in the layers that run."""
        return 4.0 * tiles * self.rows_per_tile**2 * self.hidden_size * self.layers_needed

    @classmethod
    def tile_side(cls, hf: Any) -> int:
        """Side of its input tiles in pixels, from the fields of a transformers config."""
        return hf.image_size

    @classmethod
    @abstractmethod
    def from_hf(cls, hf: Any, **choices: Any) -> TowerConfig:
        """From the fields of a transformers config of this kind; `choices` are fields of TowerConfig that it lacks.
        Raises ValueError for unsupported settings.
        """

    @abstractmethod
    def to_hf(self) -> dict[str, Any]:
        """The fields of a transformers config, without model_type."""


class Tower(nn.Module, ABC):
    """A built tower."""

    config: TowerConfig
    recompute: Recompute

    @abstractmethod
    def forward(self, tiles: Tensor, count: Tensor | None = None) -> Tensor:
        """[T, 3, H, W] uint8 or normalised float -> [T, rows, features] in the weights' dtype, leading rows included.
        `count` int32 [1]: the number of real tiles; features of later tiles are undefined and must not be read."""

    @abstractmethod
    def unused(self) -> list[nn.Module]:
        """Modules that never run; their weights are kept so that saving is complete."""
