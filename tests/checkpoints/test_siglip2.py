"""SigLIP 2: its checkpoints of one image size are SigLIP towers; those of native sizes (NaFlex) are refused by name."""

import json

import pytest
from safetensors.torch import load_file
from transformers import SiglipConfig as HfSiglip
from transformers import SiglipVisionConfig

import llava_fast
from llava_fast.errors import CheckpointError
from llava_fast.models.towers.vit import SiglipConfig
from tests.support import tiny
from tests.support.tiny_checkpoints import TOWER, edit_json, tokenizer, write_original, write_tower


def test_one_of_a_fixed_size_is_a_siglip_tower(tmp_path):
    """As google/siglip2-base-patch16-256 is stored: a whole SigLIP, text half included, whose config says "siglip"."""
    folder = tmp_path / "siglip2-base-patch16-256"
    stored = write_tower(folder, "siglip", weights=True)
    config = HfSiglip(vision_config=SiglipVisionConfig(**TOWER).to_dict()).to_dict()
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["SiglipModel"]}))
    write_original(tmp_path / "llava", tower=False, mm_vision_tower=str(folder), mm_vision_select_layer=-2)
    tokenizer().save_pretrained(tmp_path / "llava")
    model = llava_fast.load(tmp_path / "llava")
    assert isinstance(model.config.vision, SiglipConfig)
    assert model.config.vision.kind == "siglip"
    assert (
        model.vision_tower.embeddings.patch_embedding.weight
        == load_file(folder / "model.safetensors")["vision_model.embeddings.patch_embedding.weight"]
    ).all()
    assert stored


def test_native_sizes_are_refused_by_name(tmp_path):
    tiny.save(tiny.CASES["llava15"], tiny.hf_model(tiny.CASES["llava15"]), tmp_path)
    edit_json(tmp_path / "config.json", vision_config={"model_type": "siglip2_vision_model", "num_patches": 256})
    with pytest.raises(CheckpointError, match=r"'siglip2_vision_model'; supported are .*siglip_vision_model"):
        llava_fast.load(tmp_path)
