"""Names of a LLaVA's tensors: the two Hugging Face spellings and the original one; every LLaVA is read from all three.

    ours        decoder.layers.0  vision_tower.encoder  projector.layers.0
    "hf"        language_model.model.layers.0, language_model.lm_head
                vision_tower.vision_model.encoder, multi_modal_projector.linear_1
    "hf5"       model.language_model.layers.0, lm_head
                model.vision_tower.encoder, model.multi_modal_projector.linear_1
    "original"  model.layers.0, lm_head
                model.vision_tower.vision_tower.vision_model.encoder, model.mm_projector.0

transformers 5 writes "hf" without `vision_model.`, which 4.x cannot read; both are accepted here.

Sources: transformers 5.23 conversion_mapping.py (entries llava, llava_next, CLIPVisionModel) and
convert_llava_next_weights_to_hf.py; haotian-liu/LLaVA c121f04 llava_arch.py, multimodal_projector/builder.py.
"""

from __future__ import annotations

import re

from llava_fast.errors import CheckpointError
from llava_fast.families.names import NameMap, Spelling, within
from llava_fast.models.config import LlavaConfig
from llava_fast.models.connectors.mlp import ProjectorConfig
from llava_fast.models.towers.vit import SiglipConfig, VitConfig

_TOWER = VitConfig.hf4_prefix
_ORIGINAL_PROJECTOR = re.compile(r"(?:model\.)?mm_projector\.(?:(\d+)\.)?(weight|bias)")
_UNUSED = "|".join(map(re.escape, SiglipConfig.hf_unused))


class LlavaNames(NameMap):
    """The names of a LLaVA. The original numbers the layers of a projector as in its nn.Sequential, but a single Linear
    has no number."""

    def from_stored(self, stored: str) -> str | None:
        if match := _ORIGINAL_PROJECTOR.fullmatch(stored):
            return f"projector.layers.{match[1] or 0}.{match[2]}"
        return super().from_stored(stored)

    def to_stored(self, ours: str, spelling: Spelling, config: LlavaConfig) -> str:
        return to_stored(ours, spelling, getattr(config.projector, "kind", type(config.projector).__name__))


HF_DECODER = (("decoder.lm_head.", "language_model.lm_head."), ("decoder.", "language_model.model."))
HF5_DECODER = (("decoder.lm_head.", "lm_head."), ("decoder.", "model.language_model."))
"""The language model's rules for all models that transformers builds like LLaVA."""

LLAVA_NAMES = LlavaNames(
    written={
        "hf": (
            *HF_DECODER,
            ("vision_tower.", f"vision_tower.{_TOWER}"),
            *within(ProjectorConfig.hf_names, "projector.", "multi_modal_projector."),
            ("image_newline", "image_newline"),
        ),
        "hf5": (
            *HF5_DECODER,
            ("vision_tower.", "model.vision_tower."),
            *within(ProjectorConfig.hf_names, "projector.", "model.multi_modal_projector."),
            ("image_newline", "model.image_newline"),
        ),
        "original": (
            ("decoder.lm_head.", "lm_head."),
            *((f"decoder.{module}.", f"model.{module}.") for module in ("embed_tokens", "layers", "norm")),
            ("vision_tower.", f"model.vision_tower.vision_tower.{_TOWER}"),
            ("image_newline", "model.image_newline"),
        ),
    },
    read=(
        ("vision_tower.", "vision_tower."),
        ("vision_tower.", f"model.vision_tower.{_TOWER}"),
        ("vision_tower.", "model.vision_tower.vision_tower."),
    ),
    skipped=re.compile(rf"{NameMap.skipped.pattern}|(^|\.)vision_tower\.({re.escape(_TOWER)})?({_UNUSED})"),
)
from_stored, is_skipped, name_tensors = LLAVA_NAMES.from_stored, LLAVA_NAMES.is_skipped, LLAVA_NAMES.name_tensors


def to_stored(name: str, layout: Spelling, projector_kind: str = "mlp") -> str:
    """The name under which `layout` stores our tensor `name`.

    `projector_kind` is ProjectorConfig.kind: the original numbers an mlp's layers but not a lone linear.
    Raises CheckpointError for a projector that Hugging Face's layout does not support (all but two Linears).
    """
    if match := re.fullmatch(r"projector\.layers\.(\d+)\.(\w+)", name):
        index, leaf = match.groups()
        if layout == "original":
            return f"model.mm_projector.{leaf if projector_kind == 'linear' else f'{index}.{leaf}'}"
        if projector_kind != "mlp" or f"layers.{index}" not in ProjectorConfig.hf_names:
            raise CheckpointError(
                f"the Hugging Face layout supports only a projector of two Linears, and {name!r} belongs to "
                f"another kind ({projector_kind!r}); save with layout='original'"
            )
    return LLAVA_NAMES.by_rules(name, layout)


def from_tower_repository(name: str) -> str | None:
    """Our name of a tensor in a tower's own CLIP or SigLIP repository; None for its text encoder and other parts."""
    for prefix in (_TOWER, ""):
        bare = name.removeprefix(prefix)
        if re.match(r"(embeddings|pre_layrnorm|encoder|post_layernorm)\.", bare) and not is_skipped(bare):
            return "vision_tower." + bare
    return None
