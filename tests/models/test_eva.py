"""EVA's tower against results of the original code (tests/fixtures/eva_clip_g_tower.safetensors; LAVIS 506965b)."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from llava_fast.models.towers.eva import EvaConfig
from tests.support.parity import assert_close

FIXTURE = Path(__file__).parents[1] / "fixtures" / "eva_clip_g_tower.safetensors"
RENAMED = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "blocks": "encoder.layers",
    "attn.proj": "self_attn.projection",
    "attn.qkv": "self_attn.qkv",
    "norm": "layer_norm",
}


def config(**changed) -> EvaConfig:
    given = {"hidden_size": 16, "intermediate_size": 32, "num_layers": 3, "num_heads": 2, "image_size": 28}
    fixed = {"patch_size": 14, "activation": "gelu", "layer_norm_eps": 1e-6, "feature_layers": (-1,)}
    return EvaConfig(**(given | fixed | {"keep_class_row": True} | changed))


def original_weights(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The original's tensors by our names; its keys have no bias, ours a zero."""
    found = {}
    pattern = "|".join(map(re.escape, RENAMED))
    for key, value in stored.items():
        name = re.sub(pattern, lambda match: RENAMED[match[0]], key.removeprefix("weights."))
        if key.endswith("q_bias"):
            biases = value, torch.zeros_like(value), stored[key.replace("q_bias", "v_bias")]
            found[name.replace("attn.q_bias", "self_attn.qkv.bias")] = torch.cat(biases)
        elif key.startswith("weights.") and not key.endswith("v_bias"):
            found[name] = value
    return found


def test_the_rows_of_the_original_code():
    stored = load_file(FIXTURE)
    tower = config().build()
    tower.post_layernorm = nn.Identity()  # the original's is outside its tower
    tower.load_state_dict(original_weights(stored))
    with torch.no_grad():
        rows = tower(stored["input.pixels"])
    assert_close("rows of the original code", rows, stored["output.rows"], 1e-5)


def test_the_last_layers_rows_are_its_only_feature():
    with pytest.raises(ValueError, match=r"feature_layers are \(-2,\): of this tower only \(-1,\) is supported"):
        config(feature_layers=(-2,))
