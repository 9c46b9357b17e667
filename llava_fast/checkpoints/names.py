"""Tensor names: ours, the two Hugging Face spellings and the original LLaVA one, mapped as plain strings.

Reading accepts any spelling without being told which (their prefixes never collide); writing names one:

    ours        decoder.layers.0  vision_tower.encoder  projector.layers.0
    "hf"        language_model.model.layers.0, language_model.lm_head
                vision_tower.vision_model.encoder, multi_modal_projector.linear_1
    "hf5"       model.language_model.layers.0, lm_head
                model.vision_tower.encoder, model.multi_modal_projector.linear_1
    "original"  model.layers.0, lm_head
                model.vision_tower.vision_tower.vision_model.encoder, model.mm_projector.0

"hf" is what llava-hf publishes and every transformers reads; "hf5" is what transformers 5 holds in memory.
transformers 5 writes "hf" without `vision_model.`, which 4.x cannot read; both are accepted here.

Sources: transformers 5.23 conversion_mapping.py (entries llava, llava_next, CLIPVisionModel) and
convert_llava_next_weights_to_hf.py; haotian-liu/LLaVA c121f04 llava_arch.py, multimodal_projector/builder.py.
"""

from __future__ import annotations

import re
from typing import Literal

from llava_fast.errors import CheckpointError

NameLayout = Literal["hf", "hf5", "original"]

# Order matters only where one prefix starts another: the longer comes first.
_READ_PREFIXES = (
    ("model.vision_tower.vision_tower.vision_model.", "vision_tower."),
    ("model.vision_tower.vision_tower.", "vision_tower."),
    ("model.vision_tower.vision_model.", "vision_tower."),
    ("model.vision_tower.", "vision_tower."),
    ("vision_tower.vision_model.", "vision_tower."),
    ("vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("multi_modal_projector.", "multi_modal_projector."),
    ("model.mm_projector.", "mm_projector."),
    ("mm_projector.", "mm_projector."),
    ("model.language_model.", "decoder."),
    ("language_model.lm_head.", "decoder.lm_head."),
    ("language_model.model.", "decoder."),
    ("lm_head.", "decoder.lm_head."),
    ("model.embed_tokens.", "decoder.embed_tokens."),
    ("model.layers.", "decoder.layers."),
    ("model.norm.", "decoder.norm."),
)

_WRITE_PREFIXES: dict[NameLayout, tuple[tuple[str, str], ...]] = {
    "hf": (
        ("decoder.lm_head.", "language_model.lm_head."),
        ("decoder.", "language_model.model."),
        ("vision_tower.", "vision_tower.vision_model."),
        ("image_newline", "image_newline"),
    ),
    "hf5": (
        ("decoder.lm_head.", "lm_head."),
        ("decoder.", "model.language_model."),
        ("vision_tower.", "model.vision_tower."),
        ("image_newline", "model.image_newline"),
    ),
    "original": (
        ("decoder.lm_head.", "lm_head."),
        ("decoder.", "model."),
        ("vision_tower.", "model.vision_tower.vision_tower.vision_model."),
        ("image_newline", "model.image_newline"),
    ),
}

# Stored by some writers, needed by none: buffers that are recomputed, and SigLIP's pooling head, whose output
# no LLaVA reads. They are skipped knowingly, and are not written back.
_SKIPPED = re.compile(r"\.position_ids$|\.rotary_emb\.inv_freq$|(^|\.)vision_tower\.(vision_model\.)?head\.")

_HF_PROJECTOR = {"linear_1": "0", "linear_2": "2"}


def is_skipped(name: str) -> bool:
    """Whether a stored tensor is left out on purpose: position_ids, inv_freq, SigLIP's pooling head."""
    return _SKIPPED.search(name) is not None


def from_stored(name: str) -> str | None:
    """Our name of a tensor stored under `name`, in whichever spelling; None for a name no LLaVA has."""
    if name in ("image_newline", "model.image_newline"):
        return "image_newline"
    for stored, ours in _READ_PREFIXES:
        if name.startswith(stored):
            name = ours + name.removeprefix(stored)
            break
    else:
        return None
    if match := re.fullmatch(r"multi_modal_projector\.(linear_[12])\.(weight|bias)", name):
        return f"projector.layers.{_HF_PROJECTOR[match[1]]}.{match[2]}"
    if match := re.fullmatch(r"mm_projector\.(?:(\d+)\.)?(weight|bias)", name):
        return f"projector.layers.{match[1] or 0}.{match[2]}"
    return None if "projector." in name else name


def to_stored(name: str, layout: NameLayout, projector_kind: str = "mlp") -> str:
    """The name under which `layout` stores our tensor `name`.

    `projector_kind` is ProjectorConfig.kind: the original numbers an mlp's layers but not a lone linear.
    Raises CheckpointError for a projector that Hugging Face's layout cannot hold (all but two Linears).
    """
    if match := re.fullmatch(r"projector\.layers\.(\d+)\.(weight|bias)", name):
        index, leaf = match.groups()
        if layout == "original":
            return f"model.mm_projector.{leaf if projector_kind == 'linear' else f'{index}.{leaf}'}"
        slots = {ours: hf for hf, ours in _HF_PROJECTOR.items()}
        if projector_kind != "mlp" or index not in slots:
            raise CheckpointError(
                f"the Hugging Face layout holds a projector of two Linears only, and {name!r} belongs to "
                f"another kind ({projector_kind!r}); save with layout='original'"
            )
        return f"{'model.' if layout == 'hf5' else ''}multi_modal_projector.{slots[index]}.{leaf}"
    for ours, stored in _WRITE_PREFIXES[layout]:
        if name.startswith(ours):
            return stored + name.removeprefix(ours)
    raise CheckpointError(f"{name!r} is no tensor of a LLaVA model, so layout {layout!r} has no name for it")


def from_tower_repository(name: str) -> str | None:
    """Our name of a tensor in a CLIP or SigLIP repository of its own; None for its text half and the rest."""
    for prefix in ("vision_model.", ""):
        bare = name.removeprefix(prefix)
        if re.match(r"(embeddings|pre_layrnorm|encoder|post_layernorm)\.", bare) and not is_skipped(bare):
            return "vision_tower." + bare
    return None
