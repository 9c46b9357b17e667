"""Saving: round trips bit for bit in both layouts, transformers reads the result, and nothing is left half-written."""

import dataclasses
import json
import resource
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    CLIPVisionConfig,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionForConditionalGeneration,
    LlavaProcessor,
)

from llava_fast.checkpoints import adapters
from llava_fast.checkpoints import save as save_module
from llava_fast.checkpoints.load import load_checkpoint
from llava_fast.checkpoints.save import check_destination, save
from llava_fast.errors import CheckpointError
from llava_fast.families.llava_original import known_tower_name
from llava_fast.inputs.processor import Processor
from llava_fast.inputs.tiling.anyres import count_image_rows, image_views
from llava_fast.storage.files import written_whole
from tests.support.tiny_checkpoints import (
    KINDS,
    PINPOINTS,
    assert_same_tensors,
    build,
    edit_json,
    hf_config,
    hf_model,
    read_hf_config,
    save_hf,
    tokenizer,
    write_original,
    write_tower,
)

CLASSES = {
    "llava": LlavaForConditionalGeneration,
    "llava_next": LlavaNextForConditionalGeneration,
    "llava_next_video": LlavaNextVideoForConditionalGeneration,
    "llava_onevision": LlavaOnevisionForConditionalGeneration,
}


def with_tokenizer(model, *placeholders, size=94):
    model.processor = SimpleNamespace(tokenizer=tokenizer(*placeholders, size=size))
    return model


def tensors_of(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def reload(path):
    return build(load_checkpoint(path))


def transformers_reads(kind, path):
    """The model transformers makes of `path`, after checking that every key was found and none was left."""
    model, info = CLASSES[kind].from_pretrained(path, output_loading_info=True)
    for trouble in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info.get(trouble), (trouble, info[trouble])
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_hf_to_hf_is_exact_and_transformers_reads_it(tmp_path, kind):
    tensors = save_hf(kind, tmp_path / "a")
    model = reload(tmp_path / "a")
    save(model, tmp_path / "b", layout="hf")
    again = load_checkpoint(tmp_path / "b")
    assert_same_tensors(build(again), tensors)
    assert again.config == model.config
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in "ab")
    assert before == after
    theirs = transformers_reads(kind, tmp_path / "b")
    for name, tensor in hf_model(kind).state_dict().items():
        assert torch.equal(theirs.state_dict()[name], tensor)


@pytest.mark.parametrize("kind", KINDS)
def test_hf_to_original_to_hf_is_exact(tmp_path, kind):
    tensors = save_hf(kind, tmp_path / "a")
    model = with_tokenizer(reload(tmp_path / "a"), "<video>", "<image>")
    save(model, tmp_path / "b", layout="original")
    original = load_checkpoint(tmp_path / "b")
    assert (original.config.layout, original.config.geometry.compat) == ("original", "llava")
    assert_same_tensors(build(original), tensors)
    middle = build(original)
    middle.processor = SimpleNamespace(tokenizer=AutoTokenizer.from_pretrained(tmp_path / "b"))
    save(middle, tmp_path / "c", layout="hf")
    back = load_checkpoint(tmp_path / "c")
    assert back.config == model.config
    assert_same_tensors(build(back), tensors)
    transformers_reads(kind, tmp_path / "c")


def test_the_original_layout_has_the_original_names(tmp_path):
    save_hf("llava_next", tmp_path / "a")
    save(reload(tmp_path / "a"), tmp_path / "b", layout="original")
    names = set(load_file(tmp_path / "b" / "model.safetensors"))
    tower = "model.vision_tower.vision_tower.vision_model."
    assert {
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.mm_projector.0.weight",
        "model.mm_projector.2.bias",
        "model.image_newline",
        f"{tower}embeddings.class_embedding",
        f"{tower}encoder.layers.2.mlp.fc1.bias",
    } <= names
    assert all(name.startswith(("model.", "lm_head.")) for name in names)
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["model_type"] == "llava_mistral"
    assert config["architectures"] == ["LlavaMistralForCausalLM"]
    assert config["mm_vision_tower"] == "clip_vision_tower"  # this tower is in no known repository
    assert (config["mm_projector_type"], config["mm_patch_merge_type"]) == ("mlp2x_gelu", "spatial_unpad")
    assert config["image_grid_pinpoints"] == [[w, h] for h, w in PINPOINTS]


def test_pinpoints_swap_so_that_tiles_survive(tmp_path):
    save_hf("llava_next", tmp_path / "a")
    edit_json(tmp_path / "a" / "config.json", image_grid_pinpoints=[[28, 84], [56, 28], [28, 56]])
    model = reload(tmp_path / "a")
    save(model, tmp_path / "b", layout="original")
    other = load_checkpoint(tmp_path / "b").config.geometry
    assert other.canvases == model.config.geometry.canvases
    assert other.pinpoints != model.config.geometry.pinpoints
    for size in ((10, 10), (20, 50), (50, 20), (300, 100), (100, 301)):
        assert image_views(other, *size) == image_views(model.config.geometry, *size)


def test_known_towers_are_named_not_described(tmp_path):
    large = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    for image_size, name in (
        (336, "openai/clip-vit-large-patch14-336"),
        (224, "openai/clip-vit-large-patch14"),
        (448, None),
    ):
        hf_config(
            "llava", vision_config=CLIPVisionConfig(**large, image_size=image_size, patch_size=14)
        ).save_pretrained(tmp_path)
        assert known_tower_name(read_hf_config(tmp_path).vision) == name


def test_original_to_original_is_exact(tmp_path):
    tensors = write_original(tmp_path / "a", mm_projector_type="mlp3x_gelu")
    save(reload(tmp_path / "a"), tmp_path / "b", layout="original")
    again = load_checkpoint(tmp_path / "b")
    assert_same_tensors(build(again), tensors)
    assert again.config == load_checkpoint(tmp_path / "a").config
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in "ab")
    assert after.pop("unfreeze_mm_vision_tower") is True
    assert after.pop("torch_dtype") == "float32"
    assert before == after


def test_an_original_with_its_tower_elsewhere_becomes_self_contained(tmp_path):
    tower = write_tower(tmp_path / "elsewhere", weights=True)
    tensors = write_original(tmp_path / "a", tower=False)
    edit_json(tmp_path / "a" / "config.json", mm_vision_tower=str(tmp_path / "elsewhere"))
    save(reload(tmp_path / "a"), tmp_path / "b", layout="original")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["mm_vision_tower"] == "clip_vision_tower"
    assert_same_tensors(reload(tmp_path / "b"), tensors | tower)


def test_original_to_hf_adds_an_image_token(tmp_path):
    """94 words fill the original's vocabulary of 94: `<image>` needs a new row, and rows come in 64s."""
    tensors = write_original(tmp_path / "a", vocab_size=94, image_aspect_ratio="square")
    model = with_tokenizer(reload(tmp_path / "a"))
    save(model, tmp_path / "b", layout="hf")
    assert len(model.tokenizer) == 94, "the model's own tokenizer must not change"
    checkpoint = load_checkpoint(tmp_path / "b")
    assert (checkpoint.config.image_token_id, checkpoint.config.decoder.vocab_size) == (94, 158 // 64 * 64)
    saved = tensors_of(build(checkpoint))
    for name in ("decoder.embed_tokens.weight", "decoder.lm_head.weight"):
        assert torch.equal(saved[name][:94], tensors[name])
        torch.testing.assert_close(saved[name][94:], tensors[name].mean(0).expand(34, -1))
    hidden = torch.randn(50, 16, generator=torch.Generator().manual_seed(5))
    assert (hidden @ saved["decoder.lm_head.weight"].T).argmax(-1).max() < 94
    theirs = transformers_reads("llava", tmp_path / "b")
    assert theirs.config.image_token_id == 94
    assert AutoTokenizer.from_pretrained(tmp_path / "b").convert_tokens_to_ids("<image>") == 94


def test_spare_vocabulary_rows_are_used_first(tmp_path):
    """Qwen's 151,936 rows hold more than its tokenizer's words."""
    tensors = write_original(tmp_path / "a", image_aspect_ratio="square")
    save(with_tokenizer(reload(tmp_path / "a")), tmp_path / "b", layout="hf")
    checkpoint = load_checkpoint(tmp_path / "b")
    assert (checkpoint.config.image_token_id, checkpoint.config.decoder.vocab_size) == (94, 96)
    assert_same_tensors(build(checkpoint), tensors)


ANYRES = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": PINPOINTS}


@pytest.mark.parametrize(
    ("fields", "processor", "aspect"),
    [
        ({"image_aspect_ratio": "square"}, LlavaProcessor, "crop"),
        ({"image_aspect_ratio": "pad"}, LlavaProcessor, "pad"),
        (ANYRES, LlavaNextProcessor, "anyres"),
    ],
)
def test_the_processor_written_for_transformers_counts_as_we_do(tmp_path, fields, processor, aspect):
    write_original(tmp_path / "a", **fields)
    save(with_tokenizer(reload(tmp_path / "a")), tmp_path / "b", layout="hf")
    geometry = load_checkpoint(tmp_path / "b").config.geometry
    assert geometry.aspect == aspect
    theirs = processor(
        image_processor=AutoImageProcessor.from_pretrained(tmp_path / "b"),
        tokenizer=AutoTokenizer.from_pretrained(tmp_path / "b"),
        **{
            key: value
            for key, value in json.loads((tmp_path / "b" / "processor_config.json").read_text()).items()
            if key in ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens")
        },
    )
    for height, width in ((40, 100), (100, 40), (28, 28), (333, 500)):
        image = np.zeros((height, width, 3), np.uint8)
        ids = theirs(images=[image], text="w3 <image> w4", return_tensors="pt")["input_ids"]
        assert (ids == 94).sum() == count_image_rows(geometry, height, width)


def test_side_files_and_tokenizer_are_written_back(tmp_path):
    save_hf("llava_next", tmp_path / "a")
    files = {
        "preprocessor_config.json": {"image_processor_type": "LlavaNextImageProcessor", "own": 1},
        "processor_config.json": {"processor_class": "LlavaNextProcessor"},
        "generation_config.json": {"eos_token_id": [2, 5]},
    }
    for name, content in files.items():
        (tmp_path / "a" / name).write_text(json.dumps(content))
    (tmp_path / "a" / "chat_template.jinja").write_text("{{ messages }}\u00e9")
    model = with_tokenizer(reload(tmp_path / "a"), "<video>", "<image>")
    save(model, tmp_path / "hf", layout="hf")
    for name, content in files.items():
        assert json.loads((tmp_path / "hf" / name).read_text()) == content
    assert (tmp_path / "hf" / "chat_template.jinja").read_text() == "{{ messages }}\u00e9"
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").get_vocab() == model.tokenizer.get_vocab()
    save(model, tmp_path / "original", layout="original")
    assert (tmp_path / "original" / "chat_template.jinja").exists()
    assert not (tmp_path / "original" / "preprocessor_config.json").exists()
    assert load_checkpoint(tmp_path / "original").config.eos_token_ids == (2, 5)


def test_shards_and_dtype(tmp_path):
    tensors = save_hf("llava", tmp_path / "a")
    model = build(load_checkpoint(tmp_path / "a", dtype=torch.bfloat16))
    save(model, tmp_path / "b", layout="hf", max_shard_size="20KB")
    shards = sorted(path.name for path in (tmp_path / "b").glob("*.safetensors"))
    assert len(shards) > 1
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert_same_tensors(reload(tmp_path / "b"), {name: tensor.bfloat16() for name, tensor in tensors.items()})
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (config["dtype"], "torch_dtype" in config) == ("bfloat16", False)
    transformers_reads("llava", tmp_path / "b")


def test_a_non_empty_destination_is_kept_unless_told_otherwise(tmp_path):
    tensors = save_hf("llava", tmp_path / "a")
    model = reload(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "precious").write_text("x")
    with pytest.raises(CheckpointError, match="is not empty; choose another directory or pass overwrite=True"):
        save(model, tmp_path / "b")
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["precious"]
    with pytest.raises(CheckpointError, match="is a file; give a directory"):
        save(model, tmp_path / "b" / "precious")
    save(model, tmp_path / "b", overwrite=True)
    assert not (tmp_path / "b" / "precious").exists()
    assert_same_tensors(reload(tmp_path / "b"), tensors)
    (tmp_path / "empty").mkdir()
    save(model, tmp_path / "empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "empty"]


def test_a_model_can_be_saved_over_the_files_it_is_mapped_from(tmp_path):
    tensors = save_hf("llava", tmp_path / "a")
    model = reload(tmp_path / "a")
    save(model, tmp_path / "a", overwrite=True)
    assert_same_tensors(model, tensors)
    assert_same_tensors(reload(tmp_path / "a"), tensors)


def test_a_place_where_nothing_can_be_written_is_found_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot be written: .*file: "):
        check_destination(tmp_path / "file" / "inner" / "new")
    assert check_destination(tmp_path / "some" / "new") == tmp_path / "some" / "new"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(CheckpointError, match="root of a file system"):
        check_destination("/", overwrite=True)


def test_a_place_that_cannot_be_looked_at_is_refused(tmp_path, monkeypatch):
    def closed(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "exists", closed)  # a folder that only its owner may search; root may search all
    with pytest.raises(CheckpointError, match=r"cannot be written: .*Permission denied"):
        check_destination(tmp_path / "closed" / "new")


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: save_module._save_tokenizer(tokenizer(), folder),
        lambda folder: adapters._save_pickled({"weight": torch.zeros(1000)}, folder / "mm_projector.bin"),
    ],
    ids=["tokenizer", "projector"],
)
def test_a_full_disk_is_one_sentence_whichever_library_writes(write, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, before[1]))
    try:
        with (
            pytest.raises(CheckpointError, match=r"new was not written .*File too large"),
            written_whole(tmp_path / "new") as new,
        ):
            write(new)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("step", "problem"), [("_write_weights", SafetensorError), ("_write_side_files", OSError)])
def test_a_failure_leaves_nothing_behind_and_the_old_checkpoint_whole(tmp_path, monkeypatch, step, problem):
    tensors = save_hf("llava", tmp_path / "a")
    model = reload(tmp_path / "a")

    def fail(*_):
        raise problem("no space left on device")

    monkeypatch.setattr(save_module, step, fail)
    with pytest.raises(CheckpointError, match=r"new was not written .*no space"):
        save(model, tmp_path / "new")
    with pytest.raises(CheckpointError, match=r"a was not written .*no space"):
        save(model, tmp_path / "a", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert_same_tensors(reload(tmp_path / "a"), tensors)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mm_projector_type": "mlp3x_gelu"}, "a projector of two Linears, not 'mlp' of depth 3"),
        ({"mm_projector_type": "linear"}, "a projector of two Linears, not 'linear'"),
        (ANYRES | {"mm_patch_merge_type": "flat"}, "transformers has no LLaVA with image_aspect_ratio 'anyres' and"),
        (ANYRES | {"mm_patch_merge_type": "spatial"}, "mm_patch_merge_type 'spatial'; save with layout='original'"),
    ],
)
def test_what_transformers_cannot_hold_is_refused(tmp_path, fields, message):
    write_original(tmp_path / "a", **fields)
    with pytest.raises(CheckpointError, match=message):
        save(with_tokenizer(reload(tmp_path / "a")), tmp_path / "b", layout="hf")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("llava", {"vision_feature_layer": [-2, -1]}, "reads one hidden state of CLIP"),
        ("llava_onevision", {"vision_feature_layer": -2}, "or the last of SigLIP"),
        ("llava", {"projector_hidden_act": "relu"}, "has no projector like"),
    ],
)
def test_what_the_original_cannot_hold_is_refused(tmp_path, kind, changes, message):
    save_hf(kind, tmp_path / "a", **changes)
    with pytest.raises(CheckpointError, match=message):
        save(reload(tmp_path / "a"), tmp_path / "b", layout="original")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_other_mistakes(tmp_path):
    write_original(tmp_path / "a", image_aspect_ratio="square")
    model = reload(tmp_path / "a")
    with pytest.raises(CheckpointError, match="layout is 'gguf'"):
        save(model, tmp_path / "b", layout="gguf")
    with pytest.raises(CheckpointError, match="this model has no tokenizer"):
        save(model, tmp_path / "b", layout="hf")
    with pytest.raises(CheckpointError, match="on the meta device"):
        save(model.to("meta"), tmp_path / "b", layout="original")


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rope", [{"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}, LLAMA3])
def test_a_model_built_by_hand_writes_its_config(tmp_path, kind, rope):
    """Nothing is copied then: every field of config.json comes from the LlavaConfig."""
    tensors = save_hf(kind, tmp_path / "a", text={"rope_parameters": rope})
    model = reload(tmp_path / "a")
    assert model.config.decoder.rope.factor == rope["factor"]
    model.config = dataclasses.replace(model.config, source={})
    model.side_files = {}
    save(model, tmp_path / "b", layout="hf")
    assert load_checkpoint(tmp_path / "b").config == model.config
    assert_same_tensors(reload(tmp_path / "b"), tensors)
    theirs = transformers_reads(kind, tmp_path / "b")
    wanted = hf_config(kind, text={"rope_parameters": rope}).text_config.rope_parameters
    assert theirs.config.text_config.rope_parameters.items() >= wanted.items()


@pytest.mark.parametrize("kind", ["llava", "llava_next", "llava_onevision"])
def test_answers_survive_the_other_layout(tmp_path, kind):
    """The same prompt and image give the same logits, bit for bit, from both layouts of one model."""
    save_hf(kind, tmp_path / "hf")
    processor = {"do_pad": True, "size": {"shortest_edge": 28}, "crop_size": 28} if kind == "llava" else {}
    (tmp_path / "hf" / "preprocessor_config.json").write_text(json.dumps(processor))
    words = tokenizer("<video>", "<image>")
    model = reload(tmp_path / "hf")
    save(model, tmp_path / "original", layout="original")
    other = reload(tmp_path / "original")
    image = np.random.default_rng(0).integers(0, 256, (41, 90, 3), dtype=np.uint8)
    request = {"prompt": "w3 w4 <image> w5", "images": [image]}
    outputs = []
    for one in (model, other):
        one.processor = Processor(one.config.geometry, words, one.config.image_token_id, template=None)
        with torch.no_grad():
            outputs.append(one.eval()(one.prepare([request]), logits="all").logits)
    assert torch.equal(*outputs)
