"""Batches without an image in a model that is sharded by FSDP2 (`fully_shard`).

Gathering a shard and reducing a gradient are collectives, so a process whose batch has no image must run tower and
projector anyway. Stock transformers does not: the processes deadlock if the tower's layers are sharded; otherwise
gradients of different lengths meet in one reduction.
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed

from llava_fast.accelerated import encode, outputs
from llava_fast.accelerated.stock import StockModel


def is_sharded(model: StockModel) -> bool:
    """Whether a part of the model is sharded by FSDP2."""
    if not distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(part, FSDPModule) for part in model.modules())


def waited_for(model: StockModel, given: dict) -> bool:
    """Whether other processes may have images in this call of an inner LLaVA model: its parts are sharded, and the call
    is not a decoding step of generate."""
    if given.get("input_ids") is None or not (distributed.is_available() and distributed.is_initialized()):
        return False
    if distributed.get_world_size() == 1:
        return False
    cache = given.get("past_key_values") if given.get("cache") is None else given["cache"]  # since transformers 5.24
    if cache is not None and cache.get_seq_length():
        return False
    return is_sharded(model) and encode.unfit(model, given) is None


def embeds_of_text(model: StockModel, given: dict) -> Tensor:
    """[B, S, width], the embeddings of input_ids. Tower and projector run on a blank tile, in the same order
    as for images, and get zero gradients."""
    tower, selection = model.vision_tower, encode.select(model, given)
    weight, edge = tower.embeddings.patch_embedding.weight, model.config.vision_config.image_size
    blank = torch.zeros(1, 3, edge, edge, dtype=weight.dtype, device=weight.device)
    last = outputs.show_encoder(model)  # run as many layers as for images
    made = encode.tower_features(tower, {"pixel_values": blank}, selection.layers, {}, last)
    rows = made.selected[0, selection.skipped :]
    embeds = model.get_input_embeddings()(given["input_ids"])
    nothing = model.multi_modal_projector(rows).sum()
    newline = getattr(model, "image_newline", None)
    if newline is not None:
        nothing = nothing + newline.sum()
    return embeds + (0 * nothing).to(embeds)
