"""CLIP over slices of any size against transformers' interpolation; the resampler of parts against RoIAlign by hand."""

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava_fast.models import encode
from llava_fast.models.connectors.perceiver import positions
from llava_fast.models.connectors.spatial_resampler import SpatialResamplerConfig, best_places
from llava_fast.models.towers.clip_slices import ClipSlicesConfig
from llava_fast.models.towers.vit import ClipConfig
from tests.support.parity import assert_close

PATCH, SIDE = 8, 4
GRIDS = ((4, 4), (2, 7), (2, 7), (5, 3))
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}


def towers():
    """transformers' CLIP, and this tower with its weights."""
    torch.manual_seed(0)
    hf = CLIPVisionModel(CLIPVisionConfig(**TOWER, image_size=PATCH * SIDE, patch_size=PATCH)).eval()
    for parameter in hf.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tower = ClipSlicesConfig.of(ClipConfig.from_hf(hf.config, feature_layers=(-2,))).build()
    tower.load_state_dict({name.removeprefix("vision_model."): value for name, value in hf.state_dict().items()})
    return hf, tower


def slices_of(tower, grids=GRIDS):
    """uint8 patches of slices end to end, and each slice normalised, as transformers takes it."""
    generator = torch.Generator().manual_seed(1)
    mean, std = (torch.tensor(values)[:, None, None] for values in tower.config.normalisation)
    made, whole = [], []
    for rows, columns in grids:
        image = torch.randint(0, 256, (3, rows * PATCH, columns * PATCH), dtype=torch.uint8, generator=generator)
        patches = image.unflatten(1, (rows, PATCH)).unflatten(3, (columns, PATCH))
        made.append(patches.permute(1, 3, 0, 2, 4).flatten(0, 1))
        whole.append(((image / 255 - mean) / std)[None])
    return torch.cat(made), whole


def test_features_and_gradients_are_transformers_interpolated():
    hf, tower = towers()
    patches, slices = slices_of(tower)
    found = tower(patches, grids=GRIDS)[0].split([rows * columns for rows, columns in GRIDS])
    total = 0
    for one, pixels in zip(found, slices, strict=True):
        out = hf(pixels, output_hidden_states=True, interpolate_pos_encoding=True)
        expected = out.hidden_states[-2][0, 1:]
        assert_close("slices, features", one, expected)
        total = total + (expected * torch.linspace(-1, 1, expected.numel()).view_as(expected)).sum()
    total.backward()
    sum((one * torch.linspace(-1, 1, one.numel()).view_as(one)).sum() for one in found).backward()
    reference = {name.removeprefix("vision_model."): parameter.grad for name, parameter in hf.named_parameters()}
    for name, parameter in tower.named_parameters():
        if reference[name] is None or parameter.grad is None:
            assert reference[name] is parameter.grad, name
        elif not name.endswith("k_proj.bias"):  # a shift of all keys changes no attention
            assert_close("slices, gradients", parameter.grad, reference[name])


def test_a_wrapped_patch_embedding_and_wrong_grids():
    _, tower = towers()
    patches, _ = slices_of(tower)
    with torch.no_grad():
        expected = tower(patches, grids=GRIDS)
        tower.embeddings.patch_embedding.register_forward_hook(lambda *_: None)
        assert_close("slices, hooked", tower(patches, grids=GRIDS), expected)
        assert tower(patches[:0]).shape == (1, 0, 32)
    with pytest.raises(ValueError, match="59 patches, but the slices' grids have 16"):
        tower(patches, grids=GRIDS[:1])
    with pytest.raises(ValueError, match="cannot be padded to a bucket"):
        tower(patches, count=torch.ones(1), grids=GRIDS)


def roi_align(rows_HWC: torch.Tensor, box, places) -> torch.Tensor:
    """He et al.'s RoIAlign of one region (y, x, height, width), aligned=False, samples as many as rows, by hand."""
    height, width = rows_HWC.shape[:2]
    size = [max(side, 1.0) / count for side, count in zip(box[2:], places, strict=True)]
    samples = [math.ceil(side) for side in size]

    def at(y: float, x: float) -> torch.Tensor:
        if y > height or x > width:
            return torch.zeros_like(rows_HWC[0, 0])
        low = [int(y), int(x)]
        for axis, limit in enumerate((height, width)):
            if low[axis] >= limit - 1:
                low[axis] = limit - 1
                y, x = (limit - 1, x) if axis == 0 else (y, limit - 1)
        high = [min(low[0] + 1, height - 1), min(low[1] + 1, width - 1)]
        fy, fx = y - low[0], x - low[1]
        top = (1 - fx) * rows_HWC[low[0], low[1]] + fx * rows_HWC[low[0], high[1]]
        bottom = (1 - fx) * rows_HWC[high[0], low[1]] + fx * rows_HWC[high[0], high[1]]
        return (1 - fy) * top + fy * bottom

    made = []
    for row in range(places[0]):
        for column in range(places[1]):
            found = [
                at(
                    box[0] + (row + (i + 0.5) / samples[0]) * size[0],
                    box[1] + (column + (j + 0.5) / samples[1]) * size[1],
                )
                for i in range(samples[0])
                for j in range(samples[1])
            ]
            made.append(sum(found) / len(found))
    return torch.stack(made)


def resampled(weights: dict, rows_NC: torch.Tensor, shape, grid: int, heads: int) -> torch.Tensor:
    """The original's steps, a query after the other."""
    height, width = shape
    norm = lambda x, name: F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)  # noqa: E731
    value = norm(rows_NC @ weights["kv_proj.weight"].T, "ln_kv")
    table = weights["pos_embed"]
    square = table.reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
    at = F.interpolate(square, size=shape, mode="bicubic", align_corners=False)[0].permute(1, 2, 0)
    key, value = (value.view(height, width, -1) + at), value.view(height, width, -1)
    query, out = norm(weights["query"], "ln_q") + table, []
    for number in range(grid * grid):
        part = (number // grid * height / grid, number % grid * width / grid, height / grid, width / grid)
        keys, values = (roi_align(each, part, best_places(shape)) for each in (key, value))
        attended, _ = F.multi_head_attention_forward(
            query[number][None],
            keys,
            values,
            query.shape[1],
            heads,
            weights["attn.in_proj_weight"],
            weights["attn.in_proj_bias"],
            None,
            None,
            False,
            0.0,
            weights["attn.out_proj.weight"],
            weights["attn.out_proj.bias"],
        )
        out.append(attended[0])
    return norm(torch.stack(out), "ln_post") @ weights["proj"]


def resampler(grid: int = 3):
    torch.manual_seed(0)
    module = SpatialResamplerConfig(in_features=16, out_features=32, num_heads=2, grid=grid, side=4).build()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name != "pos_embed":
                parameter.normal_(0, 0.3).add_(float("ln" in name and "weight" in name))
    return module


@pytest.mark.parametrize("shape", [(4, 4), (7, 3), (2, 9), (1, 12), (8, 5)])
def test_the_resampler_is_the_originals_step_by_step(shape):
    module = resampler()
    rows = torch.randn(2, shape[0] * shape[1], 16, requires_grad=True)
    found = module(rows, shape=shape)
    weights = {name: value for name, value in module.named_parameters()}  # noqa: C416 with their gradients
    expected = torch.stack([resampled(weights, one, shape, 3, 2) for one in rows])
    assert_close("resampler of parts", found, expected, 1e-5)
    weight = torch.randn_like(found)
    grads = [
        torch.autograd.grad((out * weight).sum(), [rows, *weights.values()], retain_graph=True)
        for out in (found, expected)
    ]
    largest = max(grad.abs().max() for grad in grads[1])
    for name, one, other in zip(["rows", *weights], *grads, strict=True):
        assert (one - other).abs().max() <= 1e-4 * max(other.abs().max(), 1e-2 * largest), name


@pytest.mark.parametrize(
    ("shape", "places"),
    [((24, 24), (3, 3)), ((10, 40), (2, 4)), ((40, 10), (4, 2)), ((24, 32), (3, 4)), ((20, 30), (2, 3))],
)
def test_places_have_the_nearest_aspect(shape, places):
    assert best_places(shape) == places


def test_positions_start_as_the_fixed_ones():
    module = SpatialResamplerConfig(in_features=16, out_features=32, num_heads=2, grid=3, side=4).build()
    assert torch.equal(module.pos_embed, positions(3, 32, (3, 3), torch.device("cpu")))
    assert module.config.rows_of(40) == 9


def test_slices_of_one_shape_share_a_call():
    module, calls = resampler(), []
    features = torch.randn(59, 16)
    module.register_forward_hook(lambda *given: calls.append(given[1][0].shape))
    found = encode.project_images(module, GRIDS, features, torch.arange(36), [])
    assert calls == [(1, 16, 16), (2, 14, 16), (1, 15, 16)]
    parts = features.split([rows * columns for rows, columns in GRIDS])
    expected = torch.cat([module(part[None], shape=grid)[0] for part, grid in zip(parts, GRIDS, strict=True)])
    assert_close("slices, projected", found, expected, 1e-6)
    assert encode.project_images(module, (), features[:0], torch.arange(0), []).shape == (0, 32)
    with pytest.raises(ValueError, match="cannot be pooled before"):
        encode.project_images(module, GRIDS, features, torch.arange(36), [features])
