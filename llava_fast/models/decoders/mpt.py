"""MPT (MosaicML 2023), hosted: transformers' modules with our attention, because its own does not use
AttentionInterface.

Shapes as in hosted.py. Source: transformers 5.24 modeling_mpt.py.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from llava_fast.models.decoders.hosted import HostedConfig, Rows, attention, rows_of_pass
from llava_fast.storage.bounds import Layers, Size
from llava_fast.storage.files import Fields


class MptFields(Fields):
    """The fields read from its section of config.json."""

    vocab_size: Annotated[int, Field(ge=1, le=2**24)]
    d_model: Size
    n_layers: Layers
    n_heads: Size
    max_seq_len: Annotated[int, Field(ge=1, le=2**24)]


@dataclass(frozen=True, kw_only=True)
class MptConfig(HostedConfig):
    """MPT with ALiBi, the only kind that transformers runs. Fields of `attn_config` that transformers ignores must have
    their defaults.
    """

    family = "mpt"
    embedding_name = "wte"
    layers_name = "blocks"
    hf_fields = MptFields
    layers_field = "n_layers"
    positions_field = "max_seq_len"

    @classmethod
    def check(cls, hf: Any) -> None:
        usual = {"attn_type": "multihead_attention", "qk_ln": False, "prefix_lm": False, "alibi": True}
        for field, value in (usual | {"alibi_bias_max": 8}).items():
            if (given := getattr(hf.attn_config, field)) != value:
                raise ValueError(f"attn_config.{field} is {given!r}; supported are {value!r}")

    def base_model(self, hf: Any) -> Any:
        from transformers import MptModel

        model: Any = MptModel(hf)
        model.forward = functools.partial(_run, model)
        for block in model.blocks:
            block.attn.forward = functools.partial(_attend, block.attn)
        return model


def _run(model: Any, inputs_embeds: Tensor, **_: Any) -> SimpleNamespace:
    rows, x_1RC = rows_of_pass.get(), inputs_embeds
    one_back = model.build_mpt_alibi_tensor(model.num_heads, 2, device=x_1RC.device)[:, 0, 0]
    for block in model.blocks:
        x_1RC = block(x_1RC, position_bias=-one_back, attention_mask=rows)[0]
    return SimpleNamespace(last_hidden_state=model.norm_f(x_1RC))


def _attend(module: Any, x_1RC: Tensor, position_bias: Tensor, attention_mask: Rows, **_: Any) -> tuple:
    """Replaces MptAttention's forward; `position_bias` holds the heads' slopes."""
    qkv = module.Wqkv(x_1RC)
    if module.clip_qkv:
        qkv = qkv.clamp(-module.clip_qkv, module.clip_qkv)
    parts = (part.unflatten(-1, (module.n_heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
    query, key, value = parts
    out = attention(module, query, key, value, attention_mask, module.softmax_scale, position_bias)[0]
    return module.out_proj(out.flatten(2)), None
