"""Tiny random checkpoints for the tests: transformers' own in Hugging Face's layout, hand-written original ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)

import llava_fast
from llava_fast.checkpoints.load import LoadedCheckpoint, load_weights
from llava_fast.errors import CheckpointError
from llava_fast.families import read_config
from llava_fast.families.llava_names import from_stored, to_stored
from llava_fast.models.config import LlavaConfig as OurConfig
from llava_fast.models.vlm import LlavaModel

read_original_config = read_config


def read_hf_config(path: str | Path) -> OurConfig:
    """The config of a directory in Hugging Face's layout."""
    return read_config(Path(path))[0]


KINDS = ("llava", "llava_next", "llava_next_video", "llava_onevision")

TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "patch_size": 14,
    "image_size": 28,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 256,
}
PINPOINTS = [[28, 56], [56, 28], [56, 56]]


def hf_config(kind: str, text: dict | None = None, **changes):
    """A transformers config of one of KINDS, small."""
    text = {**TEXT, **(text or {})}
    clip, siglip = CLIPVisionConfig(**TOWER), SiglipVisionConfig(**TOWER, vision_use_head=False)
    if kind == "llava":
        parts = {"vision_config": clip, "text_config": LlamaConfig(**text), "image_token_index": 95}
        return LlavaConfig(**(parts | changes))
    tiled = {"image_token_index": 95, "image_grid_pinpoints": PINPOINTS}
    if kind == "llava_next":
        parts = {"vision_config": clip, "text_config": MistralConfig(**text)}
        return LlavaNextConfig(**(tiled | parts | changes))
    if kind == "llava_next_video":
        parts = {"vision_config": clip, "text_config": LlamaConfig(**text), "video_token_index": 94}
        return LlavaNextVideoConfig(**(tiled | parts | changes))
    text = Qwen2Config(**({"tie_word_embeddings": True} | text))
    parts = {"vision_config": siglip, "text_config": text, "video_token_index": 94}
    return LlavaOnevisionConfig(**(tiled | parts | changes))


def hf_model(kind: str, **changes):
    """A random transformers model of one of KINDS."""
    classes = {
        "llava": LlavaForConditionalGeneration,
        "llava_next": LlavaNextForConditionalGeneration,
        "llava_next_video": LlavaNextVideoForConditionalGeneration,
        "llava_onevision": LlavaOnevisionForConditionalGeneration,
    }
    torch.manual_seed(0)
    return classes[kind](hf_config(kind, **changes))


def save_hf(kind: str, path: Path, **changes) -> dict[str, torch.Tensor]:
    """Save a random model with transformers; returns its tensors under our names."""
    model = hf_model(kind, **changes)
    model.save_pretrained(path)
    tensors = {from_stored(name): tensor for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop("decoder.lm_head.weight")
    return tensors


def build(checkpoint: LoadedCheckpoint) -> LlavaModel:
    """The checkpoint's model, built on the meta device and filled."""
    with torch.device("meta"):
        model = LlavaModel(checkpoint.config)
    load_weights(model, checkpoint)
    return model


def assert_same_tensors(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Every parameter equals the tensor of its name, bit for bit, and none is left over."""
    parameters = dict(model.named_parameters())
    assert parameters.keys() == tensors.keys()
    for name, parameter in parameters.items():
        assert parameter.dtype == tensors[name].dtype, name
        assert torch.equal(parameter, tensors[name]), name


ORIGINAL = {
    "model_type": "llava_llama",
    "architectures": ["LlavaLlamaForCausalLM"],
    **TEXT,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "mm_vision_tower": "tower",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_projector_type": "mlp2x_gelu",
    "mm_hidden_size": 32,
    "image_aspect_ratio": "pad",
    "tune_mm_mlp_adapter": False,
    "use_mm_proj": True,
}


def write_tower(path: Path, kind: str = "clip", weights: bool = False) -> dict[str, torch.Tensor]:
    """A tower's own repository: config.json and, if asked, weights with their text half. Returns our names."""
    from transformers import CLIPVisionModel, SiglipVisionModel

    torch.manual_seed(1)
    if kind == "clip":
        model = CLIPVisionModel(CLIPVisionConfig(**TOWER))
    else:
        model = SiglipVisionModel(SiglipVisionConfig(**TOWER))
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(model.config.to_dict()))
    tensors = {f"vision_tower.{name}": tensor for name, tensor in model.state_dict().items()}
    if weights:
        stored = {name.replace("vision_tower.", "vision_model.", 1): t for name, t in tensors.items()}
        stored |= {"logit_scale": torch.ones(()), "text_model.final_layer_norm.weight": torch.ones(4)}
        save_file(stored, path / "model.safetensors")
    return tensors


def write_original(path: Path, tower: bool = True, weights: bool = True, **changes) -> dict[str, torch.Tensor]:
    """An original LLaVA directory with a tower described inside it. Returns its tensors under our names.

    `tower` puts the tower's weights into the checkpoint, as 1.6 does; `changes` are config.json fields.
    """
    config = {key: value for key, value in (ORIGINAL | changes).items() if value is not None}
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    if config["mm_vision_tower"] == "tower" and not (path / "tower").exists():
        write_tower(path / "tower")
    if not weights:
        return {}
    read, _ = read_original_config(path)
    generator = torch.Generator().manual_seed(2)
    with torch.device("meta"):
        names = {name: parameter.shape for name, parameter in LlavaModel(read).named_parameters()}
    tensors = {
        name: torch.randn(shape, generator=generator)
        for name, shape in names.items()
        if tower or not name.startswith("vision_tower.")
    }
    kind = read.projector.kind
    save_file({to_stored(n, "original", kind): t for n, t in tensors.items()}, path / "model.safetensors")
    return tensors


def edit_json(path: Path, **changes) -> None:
    """Change fields of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def edit_tensors(file: Path, edit) -> None:
    """Rewrite a safetensors file after `edit(dict)`."""
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def tokenizer(*placeholders, size=94):
    """A word-level tokenizer of `size` words, then `placeholders` as special tokens."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{number}": number for number in range(3, size)}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.add_special_tokens({"additional_special_tokens": list(placeholders)})
    return fast


def assert_saved_in_its_layout(name: str, model, folder: Path, tmp_path: Path) -> None:
    """A model read from `folder`, of the family `name`, whose layout is original alone, is saved to the bit:
    config.json, tensors, config and geometry. Another layout is refused."""
    llava_fast.save(model, tmp_path / "saved", layout="original")
    written, read = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "saved", folder))
    assert written == read | {"unfreeze_mm_vision_tower": True, "torch_dtype": "float32"}
    stored, expected = (load_file(path / "model.safetensors") for path in (tmp_path / "saved", folder))
    assert stored.keys() == {name for name in expected if not name.endswith("position_ids")}
    assert all(torch.equal(value, expected[name]) for name, value in stored.items())
    again = llava_fast.load(tmp_path / "saved")
    assert again.config == model.config
    assert again.processor.geometry == model.processor.geometry
    with pytest.raises(CheckpointError, match=f"{name} has no other layout than 'original'"):
        llava_fast.save(model, tmp_path / "hf", layout="hf")
