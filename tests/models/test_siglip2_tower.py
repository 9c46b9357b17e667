"""SigLIP 2 NaFlex against transformers' Siglip2VisionModel: images of many sizes, packed here and padded there."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import Siglip2VisionConfig, Siglip2VisionModel

from llava_fast.models.fused import merge_linears
from llava_fast.models.towers import TOWERS
from llava_fast.models.towers.siglip2 import positions
from llava_fast.ops import use_backend
from tests.support.parity import assert_close

PATCH, MOST = 4, 24
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
OWN = {"patch_size": PATCH, "num_patches": 16, "vision_use_head": False}
GRIDS = ((4, 4), (2, 7), (2, 7), (1, 5), (12, 2), (3, 8), (6, 4))


@pytest.fixture
def hf():
    torch.manual_seed(0)
    model = Siglip2VisionModel(Siglip2VisionConfig(**SMALL, **OWN))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3).add_(float(parameter.dim() == 1))
    return model.eval()


def tower_of(hf, layers=(-1,)):
    tower = TOWERS["siglip2_vision_model"].from_hf(hf.config, feature_layers=layers).build()
    tower.load_state_dict(hf.state_dict())  # strict: transformers' names are this tower's
    return tower


def patches(grids=GRIDS):
    """uint8 patches of all images end to end, and what transformers takes: normalised, padded, in (y, x, channel)."""
    each = [rows * columns for rows, columns in grids]
    made = torch.randint(
        0, 256, (sum(each), 3, PATCH, PATCH), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    normalised = (made / 255 - 0.5) / 0.5
    values = torch.zeros(len(grids), MOST, 3 * PATCH**2)
    mask = torch.zeros(len(grids), MOST, dtype=torch.int32)
    for place, of_image in enumerate(normalised.permute(0, 2, 3, 1).flatten(1).split(each)):
        values[place, : len(of_image)], mask[place, : len(of_image)] = of_image, 1
    inputs = {"pixel_values": values, "pixel_attention_mask": mask, "spatial_shapes": torch.tensor(grids)}
    return made, normalised, inputs


def expected_rows(hf, inputs, layer):
    out = hf(**inputs, output_hidden_states=True).hidden_states[layer]
    return out[inputs["pixel_attention_mask"].bool()]


@pytest.mark.parametrize("layer", [-1, -2, 0])
def test_features_and_gradients_are_transformers(hf, layer):
    tower = tower_of(hf, (layer,))
    tiles, normalised, inputs = patches()
    expected = expected_rows(hf, inputs, layer)
    for given in (tiles, normalised):
        assert_close("SigLIP 2", tower(given, grids=GRIDS)[0], expected)
    weight = torch.randn(expected.shape)
    (expected * weight).sum().backward()
    (tower(tiles, grids=GRIDS)[0] * weight).sum().backward()
    reference = {name: parameter.grad for name, parameter in hf.named_parameters()}
    largest = max(grad.abs().max() for grad in reference.values() if grad is not None)
    for name, parameter in tower.named_parameters():
        if reference[name] is None or parameter.grad is None:
            assert reference[name] is parameter.grad, name
        elif reference[name].abs().max() < 1e-5 * largest:
            assert name.endswith("k_proj.bias")
            assert parameter.grad.abs().max() < 1e-5 * largest, name
        else:
            assert_close("SigLIP 2 gradients", parameter.grad, reference[name])
    unused = {id(parameter) for module in tower.unused() for parameter in module.parameters()}
    assert unused == {id(parameter) for parameter in tower.parameters() if parameter.grad is None}


@torch.no_grad()
def test_an_image_alone_has_the_rows_that_it_has_among_others(hf):
    tower = tower_of(hf)
    tiles, _, _ = patches()
    each = [rows * columns for rows, columns in GRIDS]
    whole = tower(tiles, grids=GRIDS)[0].split(each)
    for grid, of_image, rows in zip(GRIDS, tiles.split(each), whole, strict=True):
        assert_close("SigLIP 2, alone", tower(of_image, grids=(grid,))[0], rows)


@torch.no_grad()
def test_several_layers_recomputed_or_with_merged_linears_give_the_same(hf):
    tower = tower_of(hf, (1, -1))
    tiles, _, _ = patches()
    expected = tower(tiles, grids=GRIDS)
    each = [tower_of(hf, (layer,))(tiles, grids=GRIDS) for layer in (1, -1)]
    assert torch.equal(expected, torch.cat(each, -1))
    assert_close("SigLIP 2, merged", merge_linears(copy.deepcopy(tower))(tiles, grids=GRIDS), expected)
    with torch.enable_grad():
        tower.recompute = "layers"
        assert torch.equal(tower(tiles, grids=GRIDS), expected)


@torch.no_grad()
def test_a_hooked_patch_embedding_or_layer_gives_the_same(hf):
    tower = tower_of(hf)
    tiles, _, _ = patches()
    expected = tower(tiles, grids=GRIDS)
    for module in (tower.embeddings.patch_embedding, tower.encoder.layers[1]):
        seen = []
        handle = module.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        assert_close("SigLIP 2, hooked", tower(tiles, grids=GRIDS), expected)
        handle.remove()
        assert seen


@pytest.mark.slow
@torch.no_grad()
def test_kernels_give_what_steps_give(hf):
    tower = tower_of(hf)
    tiles, _, _ = patches()
    expected = tower(tiles, grids=GRIDS)
    with use_backend("triton"):
        assert_close("SigLIP 2 with kernels", tower(tiles, grids=GRIDS), expected)


@pytest.mark.parametrize("grid", [(4, 4), (2, 9), (16, 1), (1, 1), (5, 3), (40, 2)])
def test_positions_are_torchs_interpolation(grid):
    """Along one axis after the other: torch 2.13's own second pass over one column is wrong on the CPU, and with it
    transformers' positions of such images before 5.24."""
    table = torch.randn(16, 5, dtype=torch.float64, requires_grad=True)
    found, weight = positions(table, (grid,)), torch.randn(grid[0] * grid[1], 5, dtype=torch.float64)
    square = table.unflatten(0, (4, 4)).permute(2, 0, 1)[None]
    expected = square
    for size in ((grid[0], 4), grid):
        expected = F.interpolate(expected, size, mode="bilinear", antialias=True, align_corners=False)
    expected = expected[0].flatten(1).T
    torch.testing.assert_close(found, expected)
    of_each = [torch.autograd.grad((rows * weight).sum(), table)[0] for rows in (found, expected)]
    torch.testing.assert_close(*of_each)


def test_no_image_leaves_gradients_of_zeros(hf):
    tower = tower_of(hf)
    out = tower(torch.zeros(0, 3, PATCH, PATCH, dtype=torch.uint8))
    assert out.shape == (1, 0, 32)
    out.sum().backward()
    assert not tower.embeddings.position_embedding.weight.grad.any()
    assert not tower.encoder.layers[0].self_attn.q_proj.weight.grad.any()


def test_its_config_is_written_as_it_was_read(hf):
    kind = TOWERS["siglip2_vision_model"]
    config = kind.from_hf(hf.config, feature_layers=(-1,))
    again = kind.from_hf(Siglip2VisionConfig(**config.to_hf()), feature_layers=(-1,))
    assert again == config
    assert TOWERS.name_of(kind) == "siglip2_vision_model"
    assert (config.rows_per_tile, config.attention_flops(10)) == (1, 4 * 10 * 16 * 32 * 3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"patch_size": [4, 8]}, r"patch_size is \[4, 8\]; only squares"),
        ({"num_patches": 24}, "num_patches is 24; positions need a square grid"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
    ],
)
def test_what_it_cannot_be_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        TOWERS["siglip2_vision_model"].from_hf(Siglip2VisionConfig(**(SMALL | OWN | change)))


def test_grids_of_another_number_of_patches_are_refused(hf):
    tiles, _, _ = patches()
    with pytest.raises(ValueError, match="121 patches, but the images' grids have 16"):
        tower_of(hf)(tiles, grids=((4, 4),))
