"""Text for `llava-fast doctor`: what `accelerate` would replace, what would take the stock path, and why.

Models are built on the meta device from a config: no weights are read and nothing is computed.
"""

from __future__ import annotations

from pathlib import Path

import torch

from llava_fast.accelerated import encode, patch
from llava_fast.accelerated.stock import StockModel
from llava_fast.errors import CheckpointError, ImageError
from llava_fast.families import find_family
from llava_fast.families.base import Family
from llava_fast.models.encode import reads_table
from llava_fast.storage.files import read_json_if_there

CALLS = (
    "A call takes the stock path, and says so once in the log llava_fast.integrations, that asks for hidden states,",
    "attentions, a tuple or several feature layers, or gives precomputed embeddings; so does a module that is hooked,",
    "wrapped or split over devices. A graph that torch.compile traces is the stock one.",
)


def families() -> list[str]:
    """What would be replaced in each supported family of transformers, one line per method."""
    import transformers

    lines = ["accelerate(model) replaces, in transformers' models"]
    for name in patch.SUPPORTED:
        kind = getattr(transformers, name)
        config = kind.config_class()
        config.text_config.num_hidden_layers = 1  # layers are identical, and building large ones is slow
        with torch.device("meta"):
            model = patch.accelerate(kind(config))
        lines += [f"  {name}", *(f"    {what}" for what in patch.replaced(model))]
    return [*lines, *(f"  {line}" for line in CALLS)]


def of_path(path: str | Path) -> list[str]:
    """What would be replaced in one Hugging Face checkpoint, of which only the config is read. Raises CheckpointError
    for an unreadable config, UnsupportedModelError for an unsupported model."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    family = find_family(read_json_if_there(Path(path) / "config.json"))
    if family is not None and family.layout == "original" and type(family).other is Family.other:
        raise CheckpointError(
            f"{path}: transformers has no {family.system}, so there is nothing that accelerate replaces"
        )
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)  # it would ask otherwise
        if hasattr(config, "mm_vision_tower"):
            raise ValueError("it is an original LLaVA checkpoint: `llava-fast convert` writes what transformers reads")
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: transformers cannot build its model ({error})") from error
    return [f"accelerate on {path}", *of_model(patch.accelerate(model))]


def of_model(model: StockModel) -> list[str]:
    """What is currently replaced in a model, and which parts take the stock path in every call. Raises
    UnsupportedModelError."""
    whole = patch.find(model)
    inner = whole.model
    lines = [f"  {type(whole).__name__}", *(f"    replaced: {what}" for what in patch.replaced(model))]
    unlike = patch.self_check.reasons(inner, patch.accelerate, thorough=True)
    stock = [f"{what}: {why}" for what, why in unlike.items()]
    stock += [f"the image path: {why}" for why in [_why_images(inner)] if why]
    labels = torch.empty(1, 2, dtype=torch.long, device="meta")
    stock += [f"the loss: {why}" for why in [patch.unfit_for_loss(whole, {"labels": labels})] if why]
    lines += [f"    stock, in each call: {what}" for what in stock]
    if not stock:
        lines.append("    stock, in each call: nothing")
    if encode.projector_linears(inner) is None:
        lines.append("    the projector runs its own forward: its weights are not read by a kernel")
    if not reads_table(inner.get_input_embeddings()):
        lines.append("    the embedding runs its own forward: its table is not read by a kernel")
    return lines


def _why_images(inner: StockModel) -> str | None:
    """Why images would take the stock path in an ordinary call."""
    config, device = inner.config, next(inner.parameters()).device
    side = config.vision_config.image_size
    anyres = config.model_type != "llava"
    given = {
        "input_ids": torch.empty(1, 2, dtype=torch.long, device=device),
        "pixel_values": torch.empty(1, *[2] * anyres, 3, side, side, device=device),
        "image_sizes": torch.empty(1, 2, dtype=torch.long, device=device) if anyres else None,
        "return_dict": True,
    }
    why = encode.unfit(inner, given)
    if why is None:
        selection = encode.select(inner, given)
        try:
            encode.geometry(config, selection.skipped, hasattr(inner.vision_tower.embeddings, "class_embedding"))
        except ImageError as error:
            why = str(error)
    return why
