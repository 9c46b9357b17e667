"""EVA's tower against results of the original code (tests/fixtures/eva_clip_g_tower.safetensors; LAVIS 506965b)."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from llava_fast.families.xcomposer import XComposer
from llava_fast.models.towers.eva import EvaConfig
from llava_fast.models.towers.eva_lavis import EvaLavisConfig
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


def config(kind: type[EvaConfig] = EvaConfig, **changed) -> EvaConfig:
    given = {"hidden_size": 16, "intermediate_size": 32, "num_layers": 3, "num_heads": 2, "image_size": 28}
    fixed = {"patch_size": 14, "activation": "gelu", "layer_norm_eps": 1e-6, "feature_layers": (-1,)}
    return kind(**(given | fixed | {"keep_class_row": True} | changed))


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


def test_in_lavis_form_rows_and_gradients_are_the_same():
    """Its tensors are the original's; only the keys' bias has no gradient there."""
    stored = load_file(FIXTURE)
    towers = [config().build(), config(EvaLavisConfig, final_norm_eps=None).build()]
    towers[0].post_layernorm = nn.Identity()
    towers[0].load_state_dict(original_weights(stored))
    named = {key.replace("weights.", "visual_encoder."): value for key, value in stored.items() if "weights." in key}
    own = {XComposer.names.from_stored(key).removeprefix("vision_tower."): value for key, value in named.items()}
    towers[1].load_state_dict(own)
    expected, found = ({}, {})
    for tower, grads in zip(towers, (expected, found), strict=True):
        rows = tower(stored["input.pixels"])
        assert_close("rows of the original code", rows, stored["output.rows"], 1e-5)
        rows.square().sum().backward()
        grads |= {name: each.grad for name, each in tower.named_parameters()}
    for name in [name for name in expected if name.endswith("qkv.bias")]:
        query, _, value = expected.pop(name).chunk(3)
        expected |= {name.replace("qkv.bias", "q_bias"): query, name.replace("qkv.bias", "v_bias"): value}
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        assert_close("gradients in LAVIS' form", grad, expected[name], 1e-5)
    wrapped = towers[1].encoder["layers"][0].self_attn
    wrapped.qkv.register_forward_hook(lambda module, given, made: made * 1)
    assert_close("rows of a hooked tower", towers[1](stored["input.pixels"]), stored["output.rows"], 1e-5)


def test_the_last_layers_rows_are_its_only_feature():
    with pytest.raises(ValueError, match=r"feature_layers are \(-2,\): of this tower only \(-1,\) is supported"):
        config(feature_layers=(-2,))
