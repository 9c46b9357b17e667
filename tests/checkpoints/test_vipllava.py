"""ViP-LLaVA: the two names of its list of layers, and unsupported settings."""

import pytest

from llava_fast.errors import CheckpointError
from llava_fast.families import read_config
from tests.support import tiny
from tests.support.tiny_checkpoints import edit_json

LAYERS = ("vision_feature_layer", "vision_feature_layers")


@pytest.fixture
def folder(tmp_path):
    tiny.hf_config(tiny.CASES["vipllava"]).save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", **dict.fromkeys(LAYERS))
    return tmp_path


@pytest.mark.parametrize("name", LAYERS)
def test_its_layers_have_two_names(folder, name):
    edit_json(folder / "config.json", **{name: [-1, 2]})
    config, _ = read_config(folder)
    assert config.vision.feature_layers == (-1, 2)
    assert config.projector.in_features == 64
    assert config.projector.matrix_size == 64 * 64 + 64 * 64


def test_without_a_list_it_is_that_of_transformers(folder):
    with pytest.raises(CheckpointError, match="a tower of 3 layers has no feature layer -5"):
        read_config(folder)
    edit_json(folder / "config.json", vision_config=tiny.hf_config(tiny.CASES["vipllava"]).vision_config.to_dict())
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"num_hidden_layers": 3', '"num_hidden_layers": 12'))
    assert read_config(folder)[0].vision.feature_layers == (-2, -5, -8, -11, 6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {LAYERS[0]: [-1], LAYERS[1]: [-2]},
            "vision_feature_layers and vision_feature_layer are two names of one list",
        ),
        ({LAYERS[1]: ["-1"]}, "vision_feature_layers"),
        ({LAYERS[1]: [-1], "projector_hidden_act": "tanh"}, "projector_hidden_act is 'tanh'"),
        ({LAYERS[1]: [-1], "projector_layernorm_eps": 0.0}, "projector_layernorm_eps"),
    ],
)
def test_what_it_cannot_be_is_refused(folder, change, said):
    edit_json(folder / "config.json", **change)
    with pytest.raises(CheckpointError, match=said):
        read_config(folder)
