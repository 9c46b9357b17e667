"""The interface of families: how checkpoints of one kind are read and written. A family is one file, and a line in
`families/__init__.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import nn

from llava_fast.errors import CheckpointError
from llava_fast.families.known_towers import Tower
from llava_fast.families.names import NameMap, Spelling
from llava_fast.families.parts import auto_config
from llava_fast.inputs.chat.formats import default_template_name
from llava_fast.inputs.tiling.anyres import VisualGeometry
from llava_fast.models.config import LlavaConfig


@dataclass(frozen=True)
class TokenIds:
    """The ids of the visual tokens in the tokenizer that a model is saved with (None: no videos), and the number of
    rows of its embedding.
    """

    image: int
    video: int | None
    vocab_size: int


class Family(ABC):
    """Checkpoints of one kind.

    model_types       of config.json; each is a line of the registry.
    system            the published models in this family, and `reference` what their results are compared with, for
                      docs/families.md.
    layout            their layout; `other` names the family for the same model in the other layout.
    names             the tensors' names, and those of adapters in `adapter_spelling`.
    visual_tokens     the placeholders of an image and, if supported, a video in the text of a prompt.
    images_before_bos  whether images at the start of a prompt precede the BOS token.
    frames_per_video  frames that its processor takes of a video; None: any number.
    connector_tokenizer  the folder of the tokenizer of a connector that reads text, and `connector_tokenizer_home` the
                      repository that has it if the checkpoint does not.
    question_tokens   the most tokens that the connector reads, the last ones of a longer text; None: a text that is
                      longer than its position table is refused.
    video_fps         frames a second that are used of a video file; None: a number of frames.
    repeats_images    whether a question without an image stands for one with the last question's (see
                      inputs.repeated).
    tokenizer_class   transformers' class for a tokenizer whose own class is code in the checkpoint, which is never run.
    beside_projector  further files of a directory with a trained projector alone.
    adapters_see_tower  whether the model that an adapter is trained on includes the tower.
    """

    model_types: ClassVar[tuple[str, ...]]
    system: ClassVar[str]
    reference: ClassVar[str] = "transformers"
    layout: ClassVar[Literal["hf", "original"]] = "hf"
    names: ClassVar[NameMap]
    adapter_spelling: ClassVar[Spelling] = "hf5"
    visual_tokens: ClassVar[tuple[str, ...]] = ("<image>",)
    images_before_bos: ClassVar[bool] = False
    frames_per_video: ClassVar[int | None] = None
    connector_tokenizer: ClassVar[str | None] = None
    connector_tokenizer_home: ClassVar[str | None] = None
    question_tokens: ClassVar[int | None] = None
    repeats_images: ClassVar[bool] = False
    video_fps: ClassVar[float | None] = None
    tokenizer_class: ClassVar[str | None] = None
    beside_projector: ClassVar[tuple[str, ...]] = ()
    adapters_see_tower: ClassVar[bool] = True

    @abstractmethod
    def read(self, source: dict[str, Any], path: Path) -> LlavaConfig:
        """The config of a directory, and of `source`, its config.json. Raises CheckpointError for unsupported settings,
        naming file, field and what is supported.
        """

    @abstractmethod
    def write(self, config: LlavaConfig, tokens: TokenIds) -> dict[str, Any]:
        """config.json, from the config alone. Raises CheckpointError for a config that this family cannot represent."""

    @abstractmethod
    def processor_files(self, config: LlavaConfig) -> dict[str, dict[str, Any]]:
        """The processor's JSON files by their path in the checkpoint, for a checkpoint without such files."""

    def other(self, config: LlavaConfig) -> str:
        """A model type of the family for this model in the other layout. Raises CheckpointError if there is none."""
        raise CheckpointError(
            f"{self.model_types[0]} has no other layout than {self.layout!r}: save with layout={self.layout!r}"
        )

    def read_with_tower(
        self, source: dict[str, Any], path: Path, vision_tower: str | Path | None = None, base: Path | None = None
    ) -> tuple[LlavaConfig, Tower | None]:
        """`read`, and the tower if it has its own repository.

        vision_tower  its location if given by the user.
        base          the directory of the model that an adapter or a projector belongs to.
        """
        if vision_tower is not None:
            raise CheckpointError(f"{path} includes its tower and does not use vision_tower; leave it out")
        return self.read(source, path), None

    def geometry(self, config: LlavaConfig, tokenizer: Any) -> VisualGeometry:
        """The config's geometry, with the ids of tokens around or between tiles. Raises CheckpointError for a tokenizer
        without them.
        """
        return config.geometry

    def unchanged(self, config: LlavaConfig) -> dict[str, Any]:
        """config.json of a model that is saved as the family as which it was read: all fields that it had."""
        return dict(config.source)

    def template(self, name: str, config: LlavaConfig) -> str:
        """The built-in chat template of a checkpoint without one; `name` is what the user called the checkpoint."""
        return default_template_name(name, config.decoder.family)

    def built_in_lora(self, config: LlavaConfig) -> tuple[float, int] | None:
        """(alpha, rank) of low-rank weights that the checkpoint holds beside its Linears'; None: it has none."""
        return None

    def own_template(self, name: str, config: LlavaConfig, path: Path) -> str:
        """`template`, for a family that reads it from other files of the checkpoint's directory `path`."""
        return self.template(name, config)

    def adapted_model(self, config: LlavaConfig, file: Path) -> nn.Module:
        """The module, without values, that adapters were trained on; config.json is `file`."""
        from transformers import AutoModelForImageTextToText

        return AutoModelForImageTextToText.from_config(auto_config(config.source, file))
