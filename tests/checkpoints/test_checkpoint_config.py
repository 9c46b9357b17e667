"""Hugging Face configs become LlavaConfigs: every family, sparse files, and what is refused."""

import json

import pytest

from llava_fast.errors import CheckpointError
from llava_fast.models.blocks.rope import RopeConfig
from tests.support.tiny_checkpoints import KINDS, PINPOINTS, edit_json, hf_config, read_hf_config


def write(path, kind, **changes):
    hf_config(kind, **changes).save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_and_ids_of_each_family(tmp_path, kind):
    config = read_hf_config(write(tmp_path, kind))
    assert (config.layout, config.model_type, config.image_token_id) == ("hf", kind, 95)
    assert config.video_token_id == (94 if kind in ("llava_next_video", "llava_onevision") else None)
    assert config.has_newline == (kind != "llava")
    vision, decoder = config.vision, config.decoder
    assert (vision.hidden_size, vision.num_layers, vision.image_size, vision.patch_size) == (32, 3, 28, 14)
    assert (decoder.hidden_size, decoder.num_kv_heads, decoder.head_dim, decoder.vocab_size) == (16, 2, 4, 96)
    assert (config.projector.in_features, config.projector.out_features, config.projector.depth) == (32, 16, 2)
    assert config.source == json.loads((tmp_path / "config.json").read_text())


def test_llava_15_crops_or_pads(tmp_path):
    path = write(tmp_path, "llava")
    assert read_hf_config(path).geometry.aspect == "crop"
    processor = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}, "do_center_crop": True}
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    assert read_hf_config(path).geometry.aspect == "crop"
    edit_json(path / "preprocessor_config.json", do_pad=True, image_mean=[0.5, 0.25, 0.75], image_std=[0.5, 0.5, 0.5])
    config = read_hf_config(path)
    assert config.geometry.aspect == "pad"
    assert config.geometry.pad_color == (127, 63, 191)
    assert config.vision.image_mean == (0.5, 0.25, 0.75)
    siglip = {"size": {"height": 28, "width": 28}}
    (path / "preprocessor_config.json").write_text(json.dumps(siglip))
    assert read_hf_config(path).geometry.aspect == "squash"


def test_the_newer_single_processor_file_is_read(tmp_path):
    path = write(tmp_path, "llava")
    (path / "processor_config.json").write_text(json.dumps({"image_processor": {"do_pad": True}}))
    assert read_hf_config(path).geometry.aspect == "pad"


def test_an_image_processor_of_another_size_is_refused(tmp_path):
    path = write(tmp_path, "llava")
    (path / "preprocessor_config.json").write_text(json.dumps({"size": {"shortest_edge": 336}}))
    with pytest.raises(CheckpointError, match=r"336 pixels.*reads 28"):
        read_hf_config(path)


def test_next_is_anyres_with_newlines(tmp_path):
    geometry = read_hf_config(write(tmp_path, "llava_next")).geometry
    assert (geometry.aspect, geometry.merge, geometry.compat) == ("anyres", "spatial_unpad", "hf")
    assert geometry.pinpoints == tuple(map(tuple, PINPOINTS))
    assert (geometry.tile_size, geometry.class_rows, geometry.video_pool) == (28, 0, "none")


@pytest.mark.parametrize("mode", ["average", "max"])
def test_next_video_pools_before_the_projector(tmp_path, mode):
    path = write(tmp_path, "llava_next_video", spatial_pool_mode=mode, spatial_pool_stride=2)
    geometry = read_hf_config(path).geometry
    assert (geometry.video_pool, geometry.video_pool_stride) == (mode, 2)
    assert (geometry.video_pool_stage, geometry.video_newline) == ("before", "no_token")


def test_onevision(tmp_path):
    config = read_hf_config(write(tmp_path, "llava_onevision"))
    geometry = config.geometry
    assert (geometry.max_tiles, geometry.multi_image_anyres, geometry.aspect) == (9, False, "anyres")
    assert (geometry.video_pool, geometry.video_pool_stage, geometry.video_newline) == (
        "bilinear",
        "after",
        "one_token",
    )
    assert (config.vision.kind, config.vision.feature_layers, config.vision.keep_class_row) == ("siglip", (-1,), False)
    assert (config.vision.activation, config.vision.layer_norm_eps) == ("gelu_pytorch_tanh", 1e-6)
    assert config.decoder.tie_embeddings
    assert config.decoder.qkv_bias
    assert not config.decoder.o_bias


def test_feature_selection(tmp_path):
    config = read_hf_config(write(tmp_path, "llava", vision_feature_select_strategy="full"))
    assert config.vision.keep_class_row
    assert config.geometry.class_rows == 1
    config = read_hf_config(write(tmp_path, "llava", vision_feature_layer=[-2, 1]))
    assert config.vision.feature_layers == (-2, 1)
    assert config.projector.in_features == 64


@pytest.mark.parametrize(
    ("text", "rope"),
    [
        ({"rope_theta": 500.0}, RopeConfig("default", theta=500.0)),
        (
            {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
            RopeConfig("linear", theta=500.0, factor=2.0),
        ),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
            RopeConfig("dynamic", factor=4.0, original_max_positions=256),
        ),
        (
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 5e5,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
            RopeConfig("llama3", theta=5e5, factor=8.0, original_max_positions=64),
        ),
    ],
)
def test_rope_in_old_and_new_fields(tmp_path, text, rope):
    path = write(tmp_path, "llava")
    source = json.loads((path / "config.json").read_text())
    source["text_config"].pop("rope_parameters")
    source["text_config"] |= text
    (path / "config.json").write_text(json.dumps(source))
    assert read_hf_config(path).decoder.rope == rope


def test_sliding_windows_as_transformers_derives_them(tmp_path):
    assert read_hf_config(write(tmp_path, "llava_next")).decoder.sliding_windows == (4096, 4096)
    assert read_hf_config(write(tmp_path, "llava_next", text={"sliding_window": None})).decoder.sliding_windows is None
    text = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    assert read_hf_config(write(tmp_path, "llava_onevision", text=text)).decoder.sliding_windows == (None, 8)
    assert read_hf_config(write(tmp_path, "llava_onevision")).decoder.sliding_windows is None


def test_a_sparse_config_like_the_published_ones(tmp_path):
    """Fields of llava-hf/llava-1.5-7b-hf's config.json, which leaves most to the defaults of 2023."""
    source = {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": 32000,
        "model_type": "llava",
        "pad_token_id": 32001,
        "projector_hidden_act": "gelu",
        "text_config": {
            "_name_or_path": "lmsys/vicuna-7b-v1.5",
            "architectures": ["LlamaForCausalLM"],
            "max_position_embeddings": 4096,
            "model_type": "llama",
            "rms_norm_eps": 1e-05,
            "torch_dtype": "float16",
            "vocab_size": 32064,
        },
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "vision_config": {
            "hidden_size": 1024,
            "image_size": 336,
            "intermediate_size": 4096,
            "model_type": "clip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "projection_dim": 768,
            "vocab_size": 32000,
        },
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vocab_size": 32064,
    }
    (tmp_path / "config.json").write_text(json.dumps(source))
    config = read_hf_config(tmp_path)
    assert (config.decoder.num_layers, config.decoder.num_kv_heads, config.decoder.intermediate_size) == (32, 32, 11008)
    assert (config.decoder.vocab_size, config.image_token_id, config.pad_token_id) == (32064, 32000, 32001)
    assert (config.decoder.rope, config.eos_token_ids) == (RopeConfig(), (2,))
    assert config.vision.activation == "quick_gelu"


def test_generation_config_decides_the_end_tokens(tmp_path):
    path = write(tmp_path, "llava")
    assert read_hf_config(path).eos_token_ids == (2,)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9], "pad_token_id": 3}))
    config = read_hf_config(path)
    assert (config.eos_token_ids, config.pad_token_id) == ((7, 9), 3)


@pytest.mark.parametrize(
    ("generation", "top", "ends"),
    [
        (None, 7, (7,)),
        (None, [7, 9], (7, 9)),
        ({"pad_token_id": 3}, 7, (7,)),
        ({"eos_token_id": 5}, 7, (5,)),
        ({"eos_token_id": None}, 7, ()),
        (None, None, (2,)),
    ],
)
def test_the_end_token_at_the_top_of_the_config_comes_before_the_decoders(tmp_path, generation, top, ends):
    path = write(tmp_path, "llava")
    edit_json(path / "config.json", eos_token_id=top)
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    assert read_hf_config(path).eos_token_ids == ends


def test_either_name_of_the_image_token(tmp_path):
    path = write(tmp_path, "llava")
    edit_json(path / "config.json", image_token_index=None, image_token_id=17)
    assert read_hf_config(path).image_token_id == 17


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("llava", {"model_type": "llama"}, "model_type is 'llama'; supported are llava, llava_next"),
        ("llava", {"projector_hidden_act": "tanh"}, "projector_hidden_act is 'tanh'"),
        ("llava", {"quantization_config": {"quant_method": "bitsandbytes"}}, r"quantised \(bitsandbytes\)"),
        ("llava_next_video", {"spatial_pool_mode": "conv"}, "spatial_pool_mode is 'conv'"),
        ("llava_onevision", {"vision_aspect_ratio": "anyres"}, "vision_aspect_ratio is 'anyres'"),
        ("llava_onevision", {"vision_feature_select_strategy": "default"}, "SigLIP has none"),
        ("llava_onevision", {"image_grid_pinpoints": [[30, 30]]}, "not a multiple of the tile size"),
    ],
)
def test_what_is_refused_is_named(tmp_path, kind, changes, message):
    path = write(tmp_path, kind)
    edit_json(path / "config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        read_hf_config(path)


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("text_config", {"hidden_act": "gelu"}, "text_config.hidden_act is 'gelu'"),
        ("text_config", {"model_type": "gemma"}, "text_config.model_type is 'gemma'; supported are llama"),
        (
            "text_config",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type is 'yarn'; supported are default, linear",
        ),
        ("text_config", {"model_type": "nonsense"}, "text_config.model_type is 'nonsense'; supported are llama"),
        ("vision_config", {"hidden_act": "relu"}, "vision_config.hidden_act is 'relu'"),
        ("vision_config", {"model_type": "vit"}, "vision_config.model_type is 'vit'"),
    ],
)
def test_unsupported_parts_are_named(tmp_path, section, changes, message):
    path = write(tmp_path, "llava")
    source = json.loads((path / "config.json").read_text())
    source[section] |= changes
    (path / "config.json").write_text(json.dumps(source))
    with pytest.raises(CheckpointError, match=message):
        read_hf_config(path)


def test_no_config_and_a_broken_one(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="holds a JSON list"):
        read_hf_config(tmp_path)
