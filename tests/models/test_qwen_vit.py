"""Qwen-VL's tower and resampler, and Monkey's windows, against the published code's results (tests/fixtures)."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional as F

from llava_fast.models.connectors.perceiver import PerceiverConfig
from llava_fast.models.recompute import Recompute
from llava_fast.models.towers.qwen_vit import QwenVitConfig, to_visual
from tests.support.parity import assert_close

FILE = Path(__file__).parents[1] / "fixtures" / "qwen_vl_monkey_visual.safetensors"


def stored():
    """(config, weights, tensors) of the fixture."""
    with safe_open(FILE, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        given = json.loads(file.metadata()["config"])
    weights = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
    return given, weights, tensors


def built(windows: int, **options):
    """(tower, resampler, tensors), the tower for so many windows of the fixture's image."""
    given, weights, tensors = stored()
    tower = QwenVitConfig(
        hidden_size=given["width"],
        num_layers=given["layers"],
        image_size=given["image_size"] * (2 if windows > 1 else 1),
        patch_size=given["patch_size"],
        feature_layers=(-1,),
        intermediate_size=int(given["width"] * given["mlp_ratio"]),
        num_heads=given["heads"],
        activation="gelu",
        layer_norm_eps=1e-6,
        positions=len(weights["positional_embedding"]),
        windows=windows,
        **options,
    )
    pool = PerceiverConfig(
        in_features=given["width"],
        out_features=given["output_dim"],
        num_heads=given["output_dim"] // 128,
        grid=2,
        side=tower.side,
        own_positions=True,
        views=tower.views,
    )
    resampler = {k.removeprefix("attn_pool."): v for k, v in weights.items() if k.startswith(("attn_pool", "ln_post"))}
    of_tower = {k: v for k, v in weights.items() if not k.startswith(("attn_pool", "ln_post", "proj"))}
    made, pooled = tower.build(), pool.build()
    made.load_state_dict({k: v for k, v in of_tower.items() if windows > 1 or "_lora" not in k})
    pooled.load_state_dict(resampler | {"proj": weights["proj"]})
    return made, pooled, tensors


@torch.no_grad()
def test_the_published_results_of_an_image():
    tower, pool, tensors = built(1)
    assert_close("Qwen-VL visual", pool(tower(tensors["input.pixels"])), tensors["output.global"], 1e-5)


@torch.no_grad()
def test_the_published_results_of_each_window():
    """Images made of four equal windows: their rows are those of the published code's four sets, in order."""
    tower, pool, tensors = built(4)
    views = tensors["input.pixels"]
    rows = pool(tower(torch.cat([torch.cat([views, views], -1)] * 2, -2)))
    for window, found in enumerate(rows.unflatten(1, (5, -1))[:, :4].unbind(1)):
        assert_close("Monkey windows", found, tensors[f"output.window{window}"], 1e-5)


@torch.no_grad()
def test_the_whole_image_is_shrunk_as_published_from_bytes():
    """Bit by bit the published tensor, so that its rows are those of the plain tower."""
    tower, _, _ = built(4)
    plain, _, _ = built(1)
    tiles = torch.randint(0, 256, (2, 3, 112, 112), dtype=torch.uint8)
    mean, std = (torch.tensor(values)[:, None, None] for values in tower.config.normalisation)
    images = (tiles / 255 - mean) / std
    whole = F.interpolate(images, size=(56, 56), mode="bicubic")
    found = tower(tiles).unflatten(1, (5, -1))
    assert_close("Monkey whole image", found[:, 4], plain(whole), 1e-6)
    assert_close("Monkey bytes", found, tower(images).unflatten(1, (5, -1)), 1e-5)
    corner = tower(images)[:, : tower.config.side**2]
    moved = images.clone()
    moved[:, :, :56, :56] = 0
    assert (tower(moved)[:, : tower.config.side**2] - corner).abs().max() > 1e-2


@pytest.mark.parametrize("how", ["none", "layers", "selective"])
def test_gradients_of_every_window(how: Recompute):
    """Those of one batched product are those of each set by itself, however much is recomputed; padding tiles have
    none."""
    tower, _, tensors = built(4)
    views = tensors["input.pixels"]
    images = torch.randn(2, 3, 112, 112, generator=torch.manual_seed(0)) + views.mean()
    weight = torch.randn(1, tower.config.rows_per_tile, 32)

    def grads() -> dict[str, torch.Tensor]:
        tower.zero_grad()
        (tower(images) * weight).sum().backward()
        return {name: parameter.grad.clone() for name, parameter in tower.named_parameters()}

    tower.recompute = how
    batched = grads()
    tower.recompute = "none"
    hooks = [module.register_forward_hook(lambda *_: None) for name, module in tower.named_modules() if "lora." in name]
    single = grads()
    assert len(hooks) == 2 * 3 * 4 * 3
    for name, expected in single.items():
        assert expected.abs().max() > 0, name
        assert_close("Monkey gradients", batched[name], expected, 1e-5)


@torch.no_grad()
def test_padding_tiles_get_no_window():
    tower, _, _ = built(4)
    layer, x = tower.transformer.resblocks[0], torch.randn(12, 16, 32)
    assert_close("padding", layer(x)[:10], layer(x[:10]), 1e-6)
    with torch.enable_grad():
        assert_close("padding", layer(x).detach()[:10], layer(x[:10]), 1e-6)


def test_what_it_says_of_itself():
    tower, pool, _ = built(4)
    config = tower.config
    assert (config.side, config.views, config.rows_per_tile) == (4, 5, 80)
    assert pool.config.rows_of(80) == 20
    assert tower(torch.zeros(0, 3, 112, 112, dtype=torch.uint8)).shape == (0, 80, 32)
    assert pool(torch.zeros(0, 80, 32)).shape == (0, 20, 128)
    assert config.attention_flops(1) == 4.0 * 5 * 16**2 * 32 * 2
    with pytest.raises(ValueError, match="5 times 4 x 4 rows per tile, and the tower gives 16"):
        pool.config.rows_of(16)
    with pytest.raises(ValueError, match="cannot be cut into 3 square windows"):
        built(3)
    with pytest.raises(ValueError, match=r"only \(-1,\) is supported"):
        QwenVitConfig(
            hidden_size=8, num_layers=1, image_size=28, patch_size=14, feature_layers=(-2,), intermediate_size=8,
            num_heads=1, activation="gelu", layer_norm_eps=1e-6,
        )  # fmt: skip


@pytest.mark.parametrize(("width", "inner"), [(49, 27), (1664, 8192), (32, 61)])
def test_a_written_ratio_gives_the_mlps_width_again(width, inner):
    config = dataclasses.replace(built(1)[0].config, hidden_size=width, intermediate_size=inner, num_heads=1)
    assert int(width * to_visual(config)["mlp_ratio"]) == inner
