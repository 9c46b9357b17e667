"""Original LLaVA directories: configs, towers inside and outside, projectors, geometry."""

import json

import pytest
import torch

import llava_fast
from llava_fast.checkpoints.load import load_checkpoint
from llava_fast.errors import CheckpointError
from llava_fast.families.known_towers import KNOWN_TOWERS
from llava_fast.models.connectors.mlp import ProjectorConfig
from tests.support.tiny_checkpoints import (
    assert_same_tensors,
    build,
    edit_json,
    edit_tensors,
    read_original_config,
    save_hf,
    tokenizer,
    write_original,
    write_tower,
)


def config_of(path, **changes):
    write_original(path, weights=False, **changes)
    return read_original_config(path)[0]


def test_a_checkpoint_with_its_tower_inside(tmp_path):
    tensors = write_original(tmp_path)
    checkpoint = load_checkpoint(tmp_path)
    assert_same_tensors(build(checkpoint), tensors)
    config = checkpoint.config
    assert (config.layout, config.image_token_id, config.geometry.compat) == ("original", -200, "llava")
    assert (config.geometry.aspect, config.geometry.merge, config.has_newline) == ("pad", "flat", False)
    assert config.geometry.pad_color == (122, 116, 104)
    assert (config.vision.feature_layers, config.vision.keep_class_row) == ((-2,), False)


def test_a_tower_from_its_own_repository(tmp_path):
    tower = write_tower(tmp_path / "elsewhere", weights=True)
    tensors = write_original(tmp_path / "llava", tower=False)
    checkpoint = load_checkpoint(tmp_path / "llava", vision_tower=tmp_path / "elsewhere")
    assert_same_tensors(build(checkpoint), tensors | tower)


def test_a_trained_tower_inside_wins_over_the_one_outside(tmp_path):
    write_tower(tmp_path / "elsewhere", weights=True)
    tensors = write_original(tmp_path / "llava")
    checkpoint = load_checkpoint(tmp_path / "llava", vision_tower=tmp_path / "elsewhere")
    assert_same_tensors(build(checkpoint), tensors)


def test_siglip_loses_its_last_layer_and_its_head(tmp_path):
    """LLaVA-NeXT's tower deletes the last layer and reads the last hidden state of the rest."""
    tower = write_tower(tmp_path / "siglip", "siglip", weights=True)
    write_tower(tmp_path / "llava" / "tower", "siglip")
    tensors = write_original(tmp_path / "llava", tower=False, mm_vision_select_layer=-2)
    checkpoint = load_checkpoint(tmp_path / "llava", vision_tower=tmp_path / "siglip")
    vision = checkpoint.config.vision
    assert (vision.kind, vision.num_layers, vision.feature_layers, vision.layers_needed) == ("siglip", 2, (-1,), 2)
    assert (vision.keep_class_row, vision.image_mean) == (False, (0.5, 0.5, 0.5))
    kept = {n: t for n, t in tower.items() if ".layers.2." not in n and ".head." not in n}
    assert 0 < len(kept) < len(tower)
    assert_same_tensors(build(checkpoint), tensors | kept)


def test_known_towers_need_no_file(tmp_path):
    for name, image_size, layers in (
        ("openai/clip-vit-large-patch14-336", 336, 24),
        ("openai/clip-vit-large-patch14", 224, 24),
        ("/somebody/models/clip-vit-large-patch14-336", 336, 24),
        ("google/siglip-so400m-patch14-384", 384, 26),
    ):
        config = config_of(tmp_path, mm_vision_tower=name)
        assert (config.vision.image_size, config.vision.num_layers) == (image_size, layers)


def test_known_towers_are_what_transformers_calls_them():
    """The published config.json files list only these fields; everything else is transformers' default."""
    from transformers import CLIPVisionConfig, SiglipVisionConfig

    clip = CLIPVisionConfig()
    table = KNOWN_TOWERS["openai/clip-vit-large-patch14-336"]
    assert (clip.hidden_act, clip.layer_norm_eps, clip.num_channels) == (table.activation, table.layer_norm_eps, 3)
    siglip = SiglipVisionConfig()
    table = KNOWN_TOWERS["google/siglip-so400m-patch14-384"]
    assert (siglip.hidden_act, siglip.layer_norm_eps) == (table.activation, table.layer_norm_eps)


def test_known_tower_weights_come_from_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def download(name, **_):
        asked.append(name)
        return str(tmp_path / "snapshot")

    (tmp_path / "snapshot").mkdir()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    write_original(
        tmp_path / "llava", tower=False, mm_vision_tower="openai/clip-vit-large-patch14-336", mm_hidden_size=1
    )
    with pytest.raises(CheckpointError, match="snapshot has no weights"):
        load_checkpoint(tmp_path / "llava")
    assert asked == ["openai/clip-vit-large-patch14-336"]


def test_a_tower_that_cannot_be_found(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    write_original(tmp_path, weights=False)
    edit_json(tmp_path / "config.json", mm_vision_tower="/somebody/eva")
    with pytest.raises(
        CheckpointError, match="vision tower '/somebody/eva', which is not available; give vision_tower="
    ):
        read_original_config(tmp_path)


@pytest.mark.parametrize(
    ("name", "projector"),
    [
        ("mlp2x_gelu", ProjectorConfig("mlp", 32, 16, depth=2)),
        ("mlp3x_gelu", ProjectorConfig("mlp", 32, 16, depth=3)),
        ("linear", ProjectorConfig("linear", 32, 16, depth=1)),
        ("mlp2x_gelu_Norm", ProjectorConfig("yi", 32, 16, depth=2)),
    ],
)
def test_projectors(tmp_path, name, projector):
    tensors = write_original(tmp_path, mm_projector_type=name)
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.config.projector == projector
    assert_same_tensors(build(checkpoint), tensors)
    stored = {tensor.key for name, tensor in checkpoint.tensors.items() if name.startswith("projector")}
    numbers = {"mlp2x_gelu": (0, 2), "mlp3x_gelu": (0, 2, 4), "mlp2x_gelu_Norm": (0, 1, 3, 4)}
    wanted = [f"{number}." for number in numbers[name]] if name in numbers else [""]
    assert stored == {f"model.mm_projector.{part}{leaf}" for part in wanted for leaf in ("weight", "bias")}


def test_the_identity_projector_and_the_default(tmp_path):
    assert config_of(tmp_path, mm_projector_type=None).projector.kind == "linear"
    config = config_of(tmp_path, mm_projector_type="identity", hidden_size=32)
    assert config.projector.kind == "identity"


@pytest.mark.parametrize(
    ("model_type", "family", "bias"),
    [("llava", "llama", False), ("llava_mistral", "mistral", False), ("llava_qwen", "qwen2", True)],
)
def test_decoder_families(tmp_path, model_type, family, bias):
    decoder = config_of(tmp_path, model_type=model_type).decoder
    assert (decoder.family, decoder.qkv_bias) == (family, bias)
    assert (decoder.hidden_size, decoder.num_kv_heads, decoder.rms_norm_eps) == (16, 2, 1e-5)


def test_llama31_rope_does_not_keep_the_tokenizer_from_loading(tmp_path):
    """transformers 5.24 makes a config of any config.json before it reads a tokenizer, and fails on this one."""
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}
    write_original(tmp_path, rope_theta=5e5, rope_scaling={"rope_type": "llama3", **scaling})
    tokenizer().save_pretrained(tmp_path)
    model = llava_fast.load(tmp_path)
    assert model.config.decoder.rope.kind == "llama3"
    assert model.tokenizer.convert_tokens_to_ids("w5") == 5
    assert type(model.tokenizer) is type(tokenizer())


def test_rope_and_sliding_window_of_the_decoder(tmp_path):
    config = config_of(tmp_path, rope_theta=1e6, rope_scaling={"type": "linear", "factor": 2.0})
    assert (config.decoder.rope.kind, config.decoder.rope.theta, config.decoder.rope.factor) == ("linear", 1e6, 2.0)
    config = config_of(tmp_path, model_type="llava_mistral", sliding_window=64)
    assert config.decoder.sliding_windows == (64, 64)
    (tmp_path / "null").mkdir()
    write_original(tmp_path / "null", weights=False, model_type="llava_mistral")
    source = json.loads((tmp_path / "null" / "config.json").read_text()) | {"sliding_window": None}
    (tmp_path / "null" / "config.json").write_text(json.dumps(source))
    assert read_original_config(tmp_path / "null")[0].decoder.sliding_windows is None


@pytest.mark.parametrize(
    ("fields", "geometry"),
    [
        ({"image_aspect_ratio": "square"}, {"aspect": "crop"}),
        ({"image_aspect_ratio": None}, {"aspect": "crop"}),
        (
            {
                "image_aspect_ratio": "anyres",
                "image_grid_pinpoints": [[28, 56], [56, 28]],
                "mm_patch_merge_type": "spatial_unpad",
            },
            {"aspect": "anyres", "pinpoints": ((28, 56), (56, 28)), "merge": "spatial_unpad", "max_tiles": None},
        ),
        (
            {
                "image_aspect_ratio": "anyres_max_9",
                "image_grid_pinpoints": "(1x1),...,(2x2)",
                "mm_patch_merge_type": "spatial_unpad",
            },
            {"aspect": "anyres", "pinpoints": ((28, 28), (28, 56), (56, 28), (56, 56)), "max_tiles": 9},
        ),
        (
            {"image_aspect_ratio": "anyres", "image_grid_pinpoints": "[(28, 56), (56, 28)]"},
            {"aspect": "anyres", "pinpoints": ((28, 56), (56, 28)), "merge": "flat"},
        ),
        ({"image_aspect_ratio": "highres", "image_grid_pinpoints": "56,84"}, {"aspect": "highres"}),
        ({"mm_vision_select_feature": "cls_patch"}, {"class_rows": 1}),
        ({"mm_patch_merge_type": "spatial_maxpool2x2_nobase"}, {"merge": "spatial_maxpool2x2_nobase"}),
    ],
)
def test_geometry(tmp_path, fields, geometry):
    config = config_of(tmp_path, **fields)
    assert {key: getattr(config.geometry, key) for key in geometry} == geometry
    assert config.has_newline == ("unpad" in config.geometry.merge)


@pytest.mark.parametrize(
    ("fields", "video"),
    [
        ({}, ("none", "before", "no_token")),
        (
            {"mm_resampler_type": "spatial_pool", "mm_spatial_pool_mode": "average", "mm_spatial_pool_stride": 2},
            ("average", "before", "no_token"),
        ),
        (
            {"mm_spatial_pool_mode": "bilinear", "mm_spatial_pool_stride": 2, "mm_patch_merge_type": "spatial_unpad"},
            ("bilinear", "after", "one_token"),
        ),
        (
            {
                "mm_spatial_pool_mode": "average",
                "mm_spatial_pool_stride": 2,
                "mm_patch_merge_type": "spatial_unpad",
                "mm_newline_position": "grid",
            },
            ("average", "after", "grid"),
        ),
        ({"mm_spatial_pool_mode": "max", "mm_spatial_pool_stride": 2}, ("max", "after", "no_token")),
    ],
)
def test_video(tmp_path, fields, video):
    geometry = config_of(tmp_path, **fields).geometry
    assert (geometry.video_pool, geometry.video_pool_stage, geometry.video_newline) == video


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "llava_mpt"}, "model_type is 'llava_mpt'; supported are llava, llava_llama"),
        ({"mm_projector_type": "mlp2x_res2x_gelu"}, "mm_projector_type is 'mlp2x_res2x_gelu'; supported are mlpNx"),
        ({"mm_vision_select_feature": "slicefour_patch"}, "mm_vision_select_feature is 'slicefour_patch'"),
        ({"image_aspect_ratio": "crop_split"}, "image_aspect_ratio is 'crop_split'"),
        ({"mm_patch_merge_type": "diagonal"}, "mm_patch_merge_type is 'diagonal'"),
        ({"image_aspect_ratio": "anyres"}, "needs image_grid_pinpoints"),
        ({"image_aspect_ratio": "anyres", "image_grid_pinpoints": "all"}, "neither a list of pairs"),
        ({"mm_resampler_type": "qformer"}, "mm_resampler_type 'qformer' is not supported"),
        ({"mm_resampler_type": "spatial_pool", "mm_spatial_pool_mode": "conv"}, "mm_spatial_pool_mode is 'conv'"),
        ({"mm_resampler_type": "spatial_pool", "mm_spatial_pool_mode": "max"}, "needs mm_spatial_pool_stride"),
        (
            {"mm_resampler_type": "spatial_pool", "mm_spatial_pool_mode": "max", "mm_spatial_pool_stride": 1024},
            "cannot be pooled by a stride of 1024",
        ),
        ({"mm_patch_merge_type": "spatial", "mm_newline_position": "grid"}, "needs an unpadding"),
        ({"hidden_size": "wide"}, "hidden_size: Input should be a valid integer, not 'wide'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "describes no llama decoder"),
        ({"s2": True}, "s2 .* not supported"),
        ({"mm_vision_tower": None}, "no mm_vision_tower"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised"),
    ],
)
def test_what_is_refused_is_named(tmp_path, fields, message):
    write_original(tmp_path)
    edit_json(tmp_path / "config.json", **fields)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path)


def test_a_tower_of_another_kind_is_refused(tmp_path):
    write_original(tmp_path, weights=False)
    (tmp_path / "tower" / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(CheckpointError, match="model_type of the vision tower is 'vit'"):
        read_original_config(tmp_path)


def test_a_hugging_face_llava_is_not_taken_for_an_original(tmp_path):
    """Both write model_type "llava"."""
    save_hf("llava", tmp_path / "hf")
    assert load_checkpoint(tmp_path / "hf").config.layout == "hf"
    write_original(tmp_path / "original", model_type="llava")
    assert load_checkpoint(tmp_path / "original").config.layout == "original"
    with pytest.raises(CheckpointError, match="vision_tower"):
        load_checkpoint(tmp_path / "hf", vision_tower=tmp_path)


def test_a_missing_tower_tensor_is_named(tmp_path):
    write_original(tmp_path)
    name = "model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias"
    edit_tensors(tmp_path / "model.safetensors", lambda t: t.pop(name))
    with pytest.raises(CheckpointError, match=r"lacks 1 tensor: vision_tower\.pre_layrnorm\.bias"):
        build(load_checkpoint(tmp_path))


def test_dtype_is_the_decoders(tmp_path):
    """The published towers are float32 beside float16 language models."""
    write_tower(tmp_path / "elsewhere", weights=True)
    write_original(tmp_path / "llava", tower=False)
    edit_tensors(tmp_path / "llava" / "model.safetensors", lambda t: t.update({k: v.half() for k, v in t.items()}))
    model = build(load_checkpoint(tmp_path / "llava", vision_tower=tmp_path / "elsewhere"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
