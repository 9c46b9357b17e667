"""EVA's ViT-g as LAVIS builds it: biases of queries and values only, and the LayerNorm after the last layer, if there
is one, outside of the tower and with an epsilon of its own.

InternLM-XComposer and LLaMA-VID store their tower in this form. Training keeps the keys without a bias, where one joint
bias (towers.eva, as in transformers) would learn one.

Sources: salesforce/LAVIS 506965b eva_vit.py, blip2.py; dvlab-research/LLaMA-VID b3d3ae2 eva_vit.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llava_fast.models import fused
from llava_fast.models.towers.eva import EvaAttention, EvaConfig, EvaLayer, EvaTower


@dataclass(frozen=True, kw_only=True)
class EvaLavisConfig(EvaConfig):
    """`final_norm_eps`: that of the LayerNorm after the last layer (LAVIS' ln_vision); None: there is none."""

    kind = "eva_lavis"

    final_norm_eps: float | None = 1e-5

    def build(self) -> EvaLavisTower:
        return EvaLavisTower(self)


class EvaLavisTower(EvaTower):
    """uint8 tiles (or normalised float ones) to the last layer's rows."""

    config: EvaLavisConfig

    def __init__(self, config: EvaLavisConfig) -> None:
        super().__init__(config)
        for layer in cast(nn.ModuleList, self.encoder["layers"]):
            cast(EvaLayer, layer).self_attn = EvaLavisAttention(config)
        eps, width = config.final_norm_eps, config.hidden_size
        self.post_layernorm: nn.Module = nn.Identity() if eps is None else nn.LayerNorm(width, eps=eps)


class EvaLavisAttention(EvaAttention):
    """Without a bias of the keys."""

    def __init__(self, config: EvaConfig) -> None:
        super().__init__(config)
        self.config = config
        if config.qkv_bias:
            width = config.hidden_size
            self.qkv = nn.Linear(width, 3 * width, bias=False)
            self.q_bias = nn.Parameter(torch.zeros(width))
            self.v_bias = nn.Parameter(torch.zeros(width))

    def project(self, x_TNC: Tensor) -> Tensor:
        if not self.config.qkv_bias:
            return self.qkv(x_TNC)
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        if fused.is_plain(self.qkv, nn.Linear):
            return F.linear(x_TNC, self.qkv.weight, bias)
        return self.qkv(x_TNC) + bias
