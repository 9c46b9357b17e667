"""The perceiver resampler against the original code's own results, stored in tests/fixtures."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from llava_fast.models.connectors import CONNECTORS
from llava_fast.models.connectors.perceiver import PerceiverConfig, positions
from tests.support.parity import assert_close

FIXTURES = Path(__file__).parents[1] / "fixtures"


def stored(name: str):
    """(PerceiverConfig, weights, tensors) of a fixture."""
    with safe_open(FIXTURES / f"{name}_resampler.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        given = json.loads(file.metadata()["config"])
    weights = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
    config = PerceiverConfig(
        in_features=given["kv_dim"],
        out_features=given["embed_dim"],
        num_heads=given["num_heads"],
        grid=given["grid_size"],
        side=4,
        project="proj" in weights,
        half_positions=name == "slime",
    )
    return config, weights, tensors


def built(name: str):
    config, weights, tensors = stored(name)
    perceiver = config.build()
    assert perceiver.load_state_dict({key: value for key, value in weights.items() if key != "pos_embed"})
    return perceiver, weights, tensors


@pytest.mark.parametrize("name", ["llava_uhd", "slime"])
def test_its_positions_are_those_that_are_stored(name):
    config, weights, _ = stored(name)
    shape = (config.grid, config.grid)
    made = positions(config.grid, config.out_features, shape, torch.device("cpu"), config.half_positions)
    assert_close("perceiver positions", made, weights["pos_embed"], 1e-6)


def test_llava_uhds_results_whatever_the_shape_of_a_tile():
    perceiver, _, tensors = built("llava_uhd")
    shapes = [key.removeprefix("input.rows_") for key in tensors if key.startswith("input.")]
    assert len(shapes) == 3
    for shape in shapes:
        rows, columns = map(int, shape.split("x"))
        with torch.no_grad():
            found = perceiver(tensors[f"input.rows_{shape}"], (rows, columns))
        assert_close("perceiver", found, tensors[f"output.queries_{shape}"], 1e-5)


def test_slimes_results():
    perceiver, _, tensors = built("slime")
    with torch.no_grad():
        assert_close("perceiver", perceiver(tensors["input.rows"]), tensors["output.queries"], 1e-5)


def test_gradients():
    """Those of float64, of every weight and of the rows, against finite differences."""
    config = PerceiverConfig(in_features=3, out_features=8, num_heads=2, grid=2, side=3)
    torch.manual_seed(0)
    perceiver = config.build().double()
    names, weights = zip(*perceiver.named_parameters(), strict=True)
    x = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)

    def run(x, *given):
        return torch.func.functional_call(perceiver, dict(zip(names, given, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *weights))


def test_what_it_says_of_itself():
    config = PerceiverConfig(in_features=16, out_features=32, num_heads=2, grid=2, side=6)
    assert CONNECTORS.name_of(type(config)) == "perceiver"
    assert not config.rowwise
    assert config.rows_of(36) == 4
    assert config.build()(torch.zeros(3, 36, 16)).shape == (3, 4, 32)
    assert config.build()(torch.zeros(0, 36, 16)).shape == (0, 4, 32)
    with pytest.raises(ValueError, match="6 x 6 rows per tile, and the tower gives 37"):
        config.rows_of(37)
    with pytest.raises(ValueError, match="multiple of 5 heads"):
        PerceiverConfig(in_features=16, out_features=32, num_heads=5, grid=2, side=6)
    # products of a tile by hand: keys and values of 36 rows, queries and results of 4
    products = 36 * (16 * 32 + 2 * 32 * 32) + 4 * 3 * 32 * 32
    assert config.matrix_size * 4 == products
