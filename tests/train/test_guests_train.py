"""Every family through a recipe: the loss falls, and what is exported is read again, by
transformers where it has the family."""

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

import llava_fast
from llava_fast.errors import CheckpointError
from llava_fast.families import family_of_config
from llava_fast.train.estimate.cost import plan
from llava_fast.train.run import train
from tests.checkpoints import test_llama_vid, test_llava_uhd, test_xcomposer
from tests.checkpoints.test_guests import GUESTS, HOSTED
from tests.support import tiny
from tests.support.training_runs import SHAPES, losses

PARTS = ("vision_tower", "projector", "decoder")
WRITTEN = {"xcomposer": test_xcomposer, "llama_vid": test_llama_vid}
"""Families of their own layout, by tests that write a checkpoint."""
LLAVAS = ("llava15", "next", "video", "onevision")


@pytest.mark.parametrize("name", LLAVAS + GUESTS + HOSTED)
def test_it_trains_and_transformers_reads_what_is_exported(name, recipe_in, tmp_path):
    start = tmp_path / "start"
    tiny.save(tiny.CASES[name], tiny.pair(name).hf, start)
    optimizer = {"learning_rate": 2e-3}
    recipe = recipe_in(tmp_path / "run", model=str(start), trainable=list(PARTS), epochs=2, optimizer=optimizer)
    assert plan(recipe, 1).total_memory > 0
    train(recipe)
    each = losses(recipe)
    assert sum(each[-2:]) < sum(each[:2]), each
    before, after = llava_fast.load(start), llava_fast.load(recipe.output / "model")
    for part in PARTS:
        pairs = zip(getattr(before, part).parameters(), getattr(after, part).parameters(), strict=True)
        assert any(not torch.equal(old, new) for old, new in pairs), part
    stock, report = AutoModelForImageTextToText.from_pretrained(recipe.output / "model", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    pair = tiny.Pair(tiny.CASES[name], stock, tiny.pair(name).processor, after)
    request = {"prompt": "the <image> hello", "images": [tiny.picture(60, 90)]}
    with torch.no_grad():
        found = after(after.prepare([request]), logits="all").logits
        torch.testing.assert_close(found, stock(**pair.reference_inputs(**request)).logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["internvl", "vipllava", "blip2", "instructblip", "idefics3"])
def test_a_projector_that_is_trained_alone_is_exported_beside_the_model(name, recipe_in, tmp_path):
    """In the names of its own layout: these families have no original one."""
    tiny.save(tiny.CASES[name], tiny.pair(name).hf, tmp_path / "start")
    recipe = recipe_in(tmp_path / "run", model=str(tmp_path / "start"), trainable=["projector"], steps=1)
    assert plan(recipe, 1).total_memory > 0
    train(recipe)
    model = llava_fast.load(recipe.output / "model")
    stored = torch.load(recipe.output / "projector" / "mm_projector.bin")
    names = family_of_config(model.config).names
    alone = {names.from_stored(key).removeprefix("projector."): value for key, value in stored.items()}
    assert alone.keys() == model.projector.state_dict().keys()
    assert all(torch.equal(value, alone[key]) for key, value in model.projector.state_dict().items())


def test_an_original_llava_trains_and_is_read_again(recipe_in, tmp_path):
    start = tmp_path / "start"
    llava_fast.save(tiny.pair("llava15").ours, start, layout="original")
    optimizer = {"learning_rate": 2e-3}
    options = {"model": str(start), "trainable": list(PARTS), "epochs": 2, "optimizer": optimizer}
    recipe = recipe_in(tmp_path / "run", **options, layout="original")
    train(recipe)
    each = losses(recipe)
    assert sum(each[-2:]) < sum(each[:2]), each
    before, after = llava_fast.load(start), llava_fast.load(recipe.output / "model")
    assert after.config == before.config
    assert not torch.equal(after.decoder.embed_tokens.weight, before.decoder.embed_tokens.weight)


def test_llava_uhd_trains_and_is_read_again(recipe_in, tmp_path):
    """Text alone among the samples, and images of several shapes in a batch."""
    start = tmp_path / "start"
    test_llava_uhd.write(start)
    optimizer = {"learning_rate": 2e-3}
    options = {"model": str(start), "trainable": list(PARTS), "epochs": 2, "optimizer": optimizer}
    with pytest.raises(CheckpointError, match="llava_uhd has no other layout than 'original'"):
        train(recipe_in(tmp_path / "hf", **options))
    assert not (tmp_path / "hf" / "metrics.jsonl").exists()
    recipe = recipe_in(tmp_path / "run", **options, layout="original")
    assert plan(recipe, 1).total_memory > 0
    train(recipe)
    each = losses(recipe)
    assert sum(each[-2:]) < sum(each[:2]), each
    before, after = llava_fast.load(start), llava_fast.load(recipe.output / "model")
    assert after.config == before.config
    names = [
        name
        for name, value in after.projector.state_dict().items()
        if not value.equal(before.projector.state_dict()[name])
    ]
    assert {"query", "kv_proj.weight", "attn.in_proj_weight", "proj", "pos_embed"} <= set(names)
    assert after.generate([{"prompt": "<image> hello", "images": [tiny.picture(20, 90)]}], max_new_tokens=3)


@pytest.mark.parametrize("family", WRITTEN.values(), ids=WRITTEN)
def test_families_of_lavis_parts_train_and_are_read_again(family, recipe_in, tmp_path):
    start = tmp_path / "start"
    family.write(start)
    options = {"model": str(start), "trainable": list(PARTS), "epochs": 2, "layout": "original"}
    recipe = recipe_in(tmp_path / "run", **options, optimizer={"learning_rate": 2e-3})
    assert plan(recipe, 1).total_memory > 0
    train(recipe)
    each = losses(recipe)
    assert sum(each[-2:]) < sum(each[:2]), each
    before, after = llava_fast.load(start), llava_fast.load(recipe.output / "model")
    assert after.config == before.config
    for part in PARTS:
        old, new = (dict(getattr(model, part).named_parameters()) for model in (before, after))
        assert old.keys() == new.keys()
        assert sum(not torch.equal(value, new[name]) for name, value in old.items()) > len(old) / 2, part
    assert after.generate([{"prompt": "<image> hello", "images": [tiny.picture(20, 90)]}], max_new_tokens=3)


@pytest.mark.parametrize("family", WRITTEN.values(), ids=WRITTEN)
def test_parts_and_adapters_of_lavis_parts(family, recipe_in, tmp_path):
    """Patterns name a connector's parts, as the shipped recipes do; an adapter is read again beside its base."""
    start = tmp_path / "start"
    family.write(start)
    kept = "projector.start" if family is test_xcomposer else "projector.norm.weight"
    trained = "projector.language_projection.*" if family is test_xcomposer else "projector.content.*"
    lora = {"rank": 4, "alpha": 8, "targets": ["q_proj", "down_proj"]}
    options = {"model": str(start), "trainable": [trained], "lora": lora, "steps": 2, "layout": "original"}
    recipe = recipe_in(tmp_path / "run", **options, optimizer={"learning_rate": 1e-2})
    train(recipe)
    before, after = llava_fast.load(start), llava_fast.load(recipe.output / "model")
    adapted = llava_fast.load(recipe.output / "adapter", model_base=start)
    assert torch.equal(before.get_parameter(kept), after.get_parameter(kept))
    assert not torch.equal(before.decoder.layers[0].mlp.down_proj.weight, after.decoder.layers[0].mlp.down_proj.weight)
    for (name, one), other in zip(after.named_parameters(), adapted.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=name)


def test_adapters_on_a_hosted_decoder_and_the_plan_of_a_run(recipe_in, tmp_path):
    start = tmp_path / "start"
    tiny.save(tiny.CASES["llava_opt"], tiny.pair("llava_opt").hf, start)
    lora = {"rank": 4, "alpha": 8, "targets": ["q_proj", "out_proj", "fc1"]}
    recipe = recipe_in(
        tmp_path / "run", model=str(start), trainable=["projector"], lora=lora, steps=2, recompute="layers"
    )
    assert "decoder, kept" in plan(recipe, gpus=1).to_text()
    train(recipe)
    before, after = llava_fast.load(start), llava_fast.load(recipe.output / "model")
    old = before.decoder.layers[0].fc1.weight
    assert not torch.equal(after.decoder.layers[0].fc1.weight, old)
    assert torch.equal(after.decoder.layers[0].fc2.weight, before.decoder.layers[0].fc2.weight)


def test_adapters_of_smolvlm_are_read_by_peft(recipe_in, tmp_path):
    """Its decoder and connector have other names in transformers than LLaVA's."""
    start = tmp_path / "start"
    tiny.save(tiny.CASES["smolvlm"], tiny.pair("smolvlm").hf, start)
    lora = {"rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj"]}
    optimizer = {"learning_rate": 1e-2}
    recipe = recipe_in(
        tmp_path / "run", model=str(start), trainable=["projector"], lora=lora, steps=3, optimizer=optimizer
    )
    train(recipe)
    request = {"prompt": "the <image> hello", "images": [tiny.picture(60, 90)]}
    stock = PeftModel.from_pretrained(tiny.hf_model(tiny.CASES["smolvlm"]), recipe.output / "adapter").eval()
    with torch.no_grad():
        expected = stock(**tiny.pair("smolvlm").reference_inputs(**request)).logits[0]
        for folder in ("model", "adapter"):
            ours = llava_fast.load(recipe.output / folder)
            found = ours(ours.prepare([request]), logits="all").logits
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_adapters_beside_a_q_former_name_modules_only(recipe_in, tmp_path, caplog):
    """Its query tokens are a parameter outside of any module, which PEFT can neither save nor load."""
    start = tmp_path / "start"
    tiny.save(tiny.CASES["blip2"], tiny.pair("blip2").hf, start)
    lora = {"rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj"]}
    recipe = recipe_in(tmp_path / "run", model=str(start), trainable=["projector"], lora=lora, steps=2)
    train(recipe)
    assert "PEFT cannot read query_tokens" in caplog.text
    stock = PeftModel.from_pretrained(tiny.hf_model(tiny.CASES["blip2"]), recipe.output / "adapter")
    assert set(stock.peft_config["default"].modules_to_save) == {"language_projection", "qformer"}
    request = {"prompt": "the <image> hello", "images": [tiny.picture(60, 90)]}
    found = []
    for folder in ("model", "adapter"):
        ours = llava_fast.load(recipe.output / folder)
        found.append(ours(ours.prepare([request]), logits="all").logits)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", [*HOSTED, "instructblip", *WRITTEN])
def test_in_two_processes_the_losses_are_the_same(name, shape, recipe_in, run, tmp_path):
    start = tmp_path / "start"
    if name in WRITTEN:
        WRITTEN[name].write(start)
    else:
        tiny.save(tiny.CASES[name], tiny.pair(name).hf, start)
    options = {"batch_size": 3, "steps": 3, "layout": "original" if name in WRITTEN else "hf"}
    alone = recipe_in(tmp_path / "alone", model=str(start), trainable=list(PARTS), **options)
    train(alone)
    parallel = alone.parallel.model_copy(update=SHAPES[shape])
    shared = alone.model_copy(update={"output": tmp_path / shape, "parallel": parallel})
    run(shared, processes=2)
    np.testing.assert_allclose(losses(shared), losses(alone), rtol=1e-4)
