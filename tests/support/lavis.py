"""Tiny parts of transformers with the names and details that LAVIS' own code gives them: EVA's tower (no bias of the
keys), and a Q-Former with or without text."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2VisionConfig, InstructBlipQFormerConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel, Blip2VisionModel
from transformers.models.instructblip.modeling_instructblip import InstructBlipQFormerModel

TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
QFORMER = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3}
_TOWER_NAMES = (
    ("embeddings.class_embedding", "cls_token"),
    ("embeddings.position_embedding", "pos_embed"),
    ("embeddings.patch_embedding", "patch_embed.proj"),
    ("encoder.layers", "blocks"),
    ("self_attn.projection", "attn.proj"),
    ("self_attn", "attn"),
    ("layer_norm", "norm"),
)
_QFORMER_NAMES = (
    ("attention.attention", "attention.self"),
    ("embeddings.layernorm", "embeddings.LayerNorm"),
)


def tower(norm_eps: float | None = 1e-5) -> Blip2VisionModel:
    """norm_eps: of the LayerNorm after the last layer; None: without it."""
    model = Blip2VisionModel(Blip2VisionConfig(**TOWER)).eval()
    randomise(model)
    with torch.no_grad():
        for layer in model.encoder.layers:
            layer.self_attn.qkv.bias[32:64] = 0
    if norm_eps is None:
        model.post_layernorm = nn.Identity()
    else:
        model.post_layernorm.eps = norm_eps
    return model


def qformer(words: int = 0) -> nn.Module:
    """words: the size of its vocabulary; 0: it reads no text."""
    given = QFORMER | {"encoder_hidden_size": TOWER["hidden_size"]}
    if words:
        made = InstructBlipQFormerModel(InstructBlipQFormerConfig(**given, vocab_size=words))
    else:
        made = Blip2QFormerModel(Blip2QFormerConfig(**given))
    randomise(made)
    return made.eval()


@torch.no_grad()
def randomise(module: nn.Module, scale: float = 0.2) -> None:
    for name, parameter in module.named_parameters():
        if "norm" in name.lower() and name.endswith("weight"):
            parameter.add_(torch.randn_like(parameter) * 0.1)
        else:
            parameter.normal_(0, scale if parameter.dim() > 1 else 0.1)


def tower_tensors(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tower's weights (or gradients) by LAVIS' names, without those of the last LayerNorm."""
    found = {}
    for name, value in named.items():
        lavis = _renamed(name, _TOWER_NAMES)
        if name.endswith("qkv.bias"):
            query, _, values = value.chunk(3)
            found |= {lavis.replace("qkv.bias", "q_bias"): query, lavis.replace("qkv.bias", "v_bias"): values}
        elif not name.startswith("post_layernorm."):
            found[lavis] = value
    return found


def qformer_tensors(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """The Q-Former's weights (or gradients) by LAVIS' names, as of its `bert`."""
    start = "layernorm."  # of a Q-Former without text
    whole = {f"embeddings.{name}" if name.startswith(start) else name: value for name, value in named.items()}
    return {_renamed(name, _QFORMER_NAMES): value for name, value in whole.items()}


def _renamed(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for mine, lavis in pairs:
        name = name.replace(mine, lavis)
    return name


def grads(module: nn.Module) -> dict[str, Tensor]:
    return {name: each.grad for name, each in module.named_parameters() if each.grad is not None}


def pixels(vision, picture) -> Tensor:
    """A picture as the tower of a loaded model reads it, resized already: [3, H, W]."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (vision.image_mean, vision.image_std))
    return (torch.tensor(picture).permute(2, 0, 1) / 255 - mean) / std
