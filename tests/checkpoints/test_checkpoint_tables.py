"""The published checkpoints' exact form, matched strictly on the meta device in both layouts.

The checkpoints themselves are tens of gigabytes; what each holds is written in tables/*.json with its sources: every
tensor's name and shape (`{layer}` counts the decoder's layers) and config.json. `seen_literally` says which parts
were read in a public copy and which follow from the conversion scripts and the sizes of the language model.
"""

import json
import math
from pathlib import Path

import pytest
import torch

from llava_fast.checkpoints.load import LoadedCheckpoint, load_weights
from llava_fast.families.llava_names import from_tower_repository, name_tensors, to_stored
from llava_fast.inputs.tiling.anyres import count_image_rows
from llava_fast.models.vlm import LlavaModel
from llava_fast.storage.tensor_files import StoredTensor
from tests.support.tiny_checkpoints import read_hf_config, read_original_config

TABLES = Path(__file__).parent / "tables"
MODELS = sorted(path.stem for path in TABLES.glob("ll*.json"))
CLIP = json.loads((TABLES / "clip-vit-large-patch14-336.json").read_text())


def expand(families, layers):
    """{template: shape} with {layer} in some of the names -> {name: shape}."""
    named = {}
    for template, shape in families.items():
        for layer in range(layers) if "{layer}" in template else [0]:
            named[template.replace("{layer}", str(layer))] = tuple(shape)
    return named


def tower(prefix):
    return {prefix + name: shape for name, shape in expand(CLIP["tensors"], CLIP["layers"]).items()}


def stored(shapes):
    """What the files of a checkpoint would say of themselves: names, shapes, no values."""
    meta = {name: torch.empty(shape, dtype=torch.float16, device="meta") for name, shape in shapes.items()}
    return {name: StoredTensor(Path("f"), name, tuple(t.shape), t.dtype, lambda t=t: t) for name, t in meta.items()}


def count(shapes):
    return sum(math.prod(shape) for shape in shapes.values())


def read(table, layout, path):
    (path / "config.json").write_text(json.dumps(table[layout]["config"]))
    return read_hf_config(path) if layout == "hf" else read_original_config(path)[0]


@pytest.fixture(params=MODELS)
def table(request):
    return json.loads((TABLES / f"{request.param}.json").read_text())


def test_the_seven_models_are_here():
    assert MODELS == [
        "llama3-llava-next-8b",
        "llava-v1.5-13b",
        "llava-v1.5-7b",
        "llava-v1.6-34b",
        "llava-v1.6-mistral-7b",
        "llava-v1.6-vicuna-13b",
        "llava-v1.6-vicuna-7b",
    ]


@pytest.mark.parametrize("layout", ["hf", "original"])
def test_every_tensor_fits_the_model_that_config_json_describes(table, layout, tmp_path):
    part = table[layout]
    own = expand(part["tensors"], table["layers"])
    inside = own | (tower(part["tower"]) if part["tower"] else {})
    skipped = expand(part["skipped"], table["layers"])
    named = name_tensors(stored(inside | skipped))
    assert len(named) == len(inside), "only the buffers are skipped"
    if not part["tower"]:  # 1.5 leaves the tower in its own repository, which has a text half as well
        home = CLIP["own_repository"]
        outside = stored(tower(home["prefix"]) | {k: tuple(v) for k, v in home["skipped"].items()})
        kept = {from_tower_repository(key): tensor for key, tensor in outside.items() if from_tower_repository(key)}
        assert len(kept) == len(tower(""))
        named |= kept

    config = read(table, layout, tmp_path)
    with torch.device("meta"):
        model = LlavaModel(config)
    checkpoint = LoadedCheckpoint(
        path=tmp_path,
        tokenizer_path=tmp_path,
        config=config,
        tensors=named,
        dtype=torch.float16,
        device=torch.device("meta"),
        side_files={},
    )
    load_weights(model, checkpoint)  # strict: raises for a missing, an extra or a differently shaped tensor

    written = {to_stored(name, layout, config.projector.kind): tuple(p.shape) for name, p in model.named_parameters()}
    if part["tower"]:
        assert written == inside
    else:
        assert own.items() <= written.items()


@pytest.mark.parametrize("layout", ["hf", "original"])
def test_config_fields(table, layout, tmp_path):
    config, expect = read(table, layout, tmp_path), table["expect"]
    decoder = config.decoder
    assert (decoder.family, decoder.num_kv_heads, decoder.head_dim) == (
        expect["family"],
        expect["num_kv_heads"],
        expect["head_dim"],
    )
    assert (decoder.rope.kind, decoder.rope.theta) == ("default", expect["rope_theta"])
    assert (decoder.rms_norm_eps, decoder.max_positions) == (expect["rms_norm_eps"], expect["max_positions"])
    assert decoder.sliding_windows == expect["sliding_windows"]
    assert config.image_token_id == (expect["image_token_id"] if layout == "hf" else -200)
    assert config.geometry.aspect == expect["aspect"][layout]
    assert config.vision.feature_layers == (-2,)
    assert config.vision.layers_needed == 23
    assert config.has_newline == (config.geometry.merge == "spatial_unpad")
    assert count_image_rows(config.geometry, height=768, width=1024) == expect["rows_of_1024x768"]


def test_sizes_agree_with_independent_counts(table):
    """The shapes multiply out to the published numbers of parameters and bytes."""
    assert count(tower("")) == CLIP["parameters"]
    original, hf = table["original"], table["hf"]
    shapes = expand(original["tensors"], table["layers"])
    decoder = {name: shape for name, shape in shapes.items() if "mm_projector" not in name and "newline" not in name}
    assert count(decoder) == table["language_model_parameters"]
    if "total_bytes" in original:
        each = original["bytes_each"]
        buffers = expand(original["skipped"], table["layers"])
        assert count(shapes) * each["weights"] + count(buffers) * each["skipped"] == original["total_bytes"]
    if "parameters" in hf:
        assert count(expand(hf["tensors"], table["layers"]) | tower(hf["tower"])) == hf["parameters"]


def test_conversions_pad_the_vocabulary_and_nothing_else(table):
    """Both layouts hold the same tensors but for the rows that hold the image token."""
    original = name_tensors(stored(expand(table["original"]["tensors"], table["layers"])))
    hf = name_tensors(stored(expand(table["hf"]["tensors"], table["layers"])))
    assert original.keys() == hf.keys()
    grown = {name for name in hf if hf[name].shape != original[name].shape}
    assert grown == {"decoder.embed_tokens.weight", "decoder.lm_head.weight"}
    for name in grown:
        assert hf[name].shape[0] == -(-(original[name].shape[0] + 1) // 64) * 64
        assert hf[name].shape[0] > table["expect"]["image_token_id"]
