"""Idefics3's tower and connector against transformers', at sides where float32 moves positions and where not."""

import pytest
import torch
from transformers.models.idefics3.configuration_idefics3 import Idefics3Config, Idefics3VisionConfig
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector, Idefics3VisionTransformer

from llava_fast.models.connectors.shuffle_linear import ShuffleLinearConfig
from llava_fast.models.towers import TOWERS
from llava_fast.models.towers.idefics3 import places

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 2}


@pytest.mark.parametrize("side", [6, 25])
def test_features_and_gradients(side):
    torch.manual_seed(0)
    config = Idefics3VisionConfig(image_size=2 * side, **SMALL)
    stock = Idefics3VisionTransformer(config)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.normal_(0, 0.3)
    tower = TOWERS["idefics3_vision"].from_hf(config, feature_layers=(-1,)).build()
    tower.load_state_dict(stock.state_dict())
    tiles = torch.randn(2, 3, 2 * side, 2 * side)
    found, expected = tower(tiles), stock(tiles).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(expected)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    reference = dict(stock.named_parameters())
    for name, parameter in tower.named_parameters():
        scale = reference[name].grad.abs().max().clamp(min=1e-2)
        torch.testing.assert_close(parameter.grad / scale, reference[name].grad / scale, rtol=1e-4, atol=1e-4)


def test_published_sides_have_the_plain_grid():
    cpu = torch.device("cpu")
    for side in (26, 27, 32):
        assert torch.equal(places(side, cpu), torch.arange(side * side))
    assert not torch.equal(places(25, cpu), torch.arange(625))


def test_connector_is_transformers():
    stock = Idefics3Connector(
        Idefics3Config(vision_config=Idefics3VisionConfig(**SMALL), scale_factor=3, text_config={"hidden_size": 32})
    )
    connector = ShuffleLinearConfig(16, 32, 3).build()
    connector.linear.weight.data = stock.modality_projection.proj.weight.data
    rows = torch.randn(2, 36, 16)
    torch.testing.assert_close(connector(rows), stock(rows))
