"""Names map both ways, in every layout, for every tensor of every family."""

import pytest

from llava_fast.errors import CheckpointError
from llava_fast.families.llava_names import from_stored, from_tower_repository, is_skipped, to_stored
from tests.support.tiny_checkpoints import KINDS, hf_model

EXAMPLES = [  # ours, hf, hf5, original
    (
        "decoder.layers.3.self_attn.q_proj.weight",
        "language_model.model.layers.3.self_attn.q_proj.weight",
        "model.language_model.layers.3.self_attn.q_proj.weight",
        "model.layers.3.self_attn.q_proj.weight",
    ),
    (
        "decoder.embed_tokens.weight",
        "language_model.model.embed_tokens.weight",
        "model.language_model.embed_tokens.weight",
        "model.embed_tokens.weight",
    ),
    (
        "decoder.norm.weight",
        "language_model.model.norm.weight",
        "model.language_model.norm.weight",
        "model.norm.weight",
    ),
    ("decoder.lm_head.weight", "language_model.lm_head.weight", "lm_head.weight", "lm_head.weight"),
    ("image_newline", "image_newline", "model.image_newline", "model.image_newline"),
    (
        "projector.layers.2.bias",
        "multi_modal_projector.linear_2.bias",
        "model.multi_modal_projector.linear_2.bias",
        "model.mm_projector.2.bias",
    ),
    (
        "vision_tower.pre_layrnorm.weight",
        "vision_tower.vision_model.pre_layrnorm.weight",
        "model.vision_tower.pre_layrnorm.weight",
        "model.vision_tower.vision_tower.vision_model.pre_layrnorm.weight",
    ),
]


@pytest.mark.parametrize(("ours", "hf", "hf5", "original"), EXAMPLES)
def test_each_spelling_maps_both_ways(ours, hf, hf5, original):
    for layout, stored in (("hf", hf), ("hf5", hf5), ("original", original)):
        assert to_stored(ours, layout) == stored
        assert from_stored(stored) == ours


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_of_a_transformers_model_has_a_name_in_every_layout(kind):
    names = list(hf_model(kind).state_dict())
    assert all(from_stored(name) for name in names)
    for name in names:
        ours = from_stored(name)
        assert to_stored(ours, "hf5") == name
        for layout in ("hf", "hf5", "original"):
            assert from_stored(to_stored(ours, layout)) == ours


def test_what_transformers_5_writes_is_read_too():
    """It writes the old spelling but leaves `vision_model.` out, as its CLIPVisionModel holds no such module."""
    assert from_stored("vision_tower.encoder.layers.0.mlp.fc1.bias") == "vision_tower.encoder.layers.0.mlp.fc1.bias"


def test_projectors_of_other_shapes():
    assert from_stored("model.mm_projector.weight") == "projector.layers.0.weight"
    assert to_stored("projector.layers.0.weight", "original", "linear") == "model.mm_projector.weight"
    assert to_stored("projector.layers.4.weight", "original", "yi") == "model.mm_projector.4.weight"
    for name, kind in (
        ("projector.layers.4.weight", "mlp"),
        ("projector.layers.0.weight", "linear"),
        ("projector.layers.0.weight", "yi"),
    ):
        with pytest.raises(CheckpointError, match="two Linears"):
            to_stored(name, "hf", kind)


def test_unknown_names_are_none_and_cannot_be_written():
    for name in ("transformer.wte.weight", "model.mm_projector.0.proj.weight", "multi_modal_projector.linear_3.bias"):
        assert from_stored(name) is None
    with pytest.raises(CheckpointError, match="not a tensor of a LLaVA"):
        to_stored("head.weight", "hf")


def test_skipped_names_are_the_buffers_and_the_siglip_head():
    for name in (
        "vision_tower.vision_model.embeddings.position_ids",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.vision_tower.vision_tower.vision_model.head.probe",
        "vision_tower.head.mlp.fc1.weight",
    ):
        assert is_skipped(name)
    assert not is_skipped("language_model.lm_head.weight")


def test_a_tower_repository_gives_its_vision_half():
    assert from_tower_repository("vision_model.post_layernorm.bias") == "vision_tower.post_layernorm.bias"
    assert (
        from_tower_repository("encoder.layers.0.layer_norm1.bias") == "vision_tower.encoder.layers.0.layer_norm1.bias"
    )
    for name in ("text_model.encoder.layers.0.layer_norm1.bias", "logit_scale", "vision_model.head.probe"):
        assert from_tower_repository(name) is None
    assert from_tower_repository("vision_model.embeddings.position_ids") is None
