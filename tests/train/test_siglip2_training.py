"""A LLaVA assembled with a tower of native sizes (SigLIP 2 NaFlex): trained by a recipe, saved, loaded and asked."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Siglip2Config, Siglip2Model
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

import llava_fast
from llava_fast.checkpoints.assemble import Assembly, assemble
from llava_fast.errors import CheckpointError
from llava_fast.train.estimate.cost import plan
from llava_fast.train.run import train
from tests.support import tiny
from tests.support.training_runs import SHAPES, losses


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A decoder, and a tower's repository as google/siglip2-base-patch16-naflex is: with its text half and its head."""
    folder = tmp_path_factory.mktemp("parts")
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": tiny.VOCABULARY}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**tiny.TEXT, **heads)).save_pretrained(folder / "decoder")
    tiny.tokenizer().save_pretrained(folder / "decoder")
    vision = tiny.TOWER | {"patch_size": 8, "num_patches": 16}
    Siglip2Model(Siglip2Config(vision_config=vision, text_config=dict(tiny.TOWER))).save_pretrained(folder / "tower")
    Siglip2ImageProcessorPil(patch_size=8, max_num_patches=20).save_pretrained(folder / "tower")
    return {"decoder": str(folder / "decoder"), "vision_tower": str(folder / "tower"), "aspect": "native"}


@pytest.fixture(scope="module")
def alone(parts, recipe_in, tmp_path_factory):
    recipe = recipe_in(
        tmp_path_factory.mktemp("siglip2") / "alone",
        model=parts,
        trainable=["vision_tower", "projector", "decoder"],
        batch_size=4,
        steps=3,
        optimizer={"learning_rate": 1e-2},
    )
    train(recipe)
    return recipe


def test_it_trains_and_is_loaded_and_asked(parts, alone):
    start, end = llava_fast.load(Assembly(**parts)), llava_fast.load(alone.output / "model")
    assert end.config.geometry.tiling.max_patches == 20
    assert end.config.vision == start.config.vision
    before = start.vision_tower.state_dict()
    changed = {name for name, value in end.vision_tower.state_dict().items() if not torch.equal(value, before[name])}
    assert {"embeddings.patch_embedding.weight", "embeddings.position_embedding.weight"} <= changed
    images = [tiny.picture(30, 80), tiny.picture(64, 20)]
    (answer,) = end.generate([{"prompt": "<image> and <image>", "images": images}], max_new_tokens=4, ignore_eos=True)
    assert len(answer.token_ids) == 4


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["ddp", "fsdp2"])
def test_two_processes_give_the_same_losses(alone, run, tmp_path, shape):
    """Batches without an image among them, where the tower runs on no patch."""
    parallel = alone.parallel.model_copy(update=SHAPES[shape])
    shared = alone.model_copy(update={"output": tmp_path / shape, "parallel": parallel})
    run(shared, processes=2)
    np.testing.assert_allclose(losses(shared), losses(alone), rtol=1e-4)


def test_its_cost_is_planned(alone):
    (tiles,) = (each.value for each in plan(alone, gpus=1).sections["A sample"] if each.what == "image tiles")
    assert tiles == 20  # of a 1024x768 image: 4 rows of 5 patches


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"aspect": "pad"}, "image_aspect_ratio is 'pad'; supported are native"),
        ({"merge": "spatial"}, "mm_patch_merge_type is 'spatial'; supported are flat"),
        ({"feature_layer": -9}, "a tower of 3 layers has no feature layer -9"),
    ],
)
def test_what_such_a_tower_does_not_do_is_refused(parts, change, said):
    with pytest.raises(CheckpointError, match=said):
        assemble(Assembly(**parts | change))
