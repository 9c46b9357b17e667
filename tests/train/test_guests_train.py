"""Every family through a recipe: the loss falls, and what is exported is read again, by
transformers where it has the family."""

import json
from fnmatch import fnmatch

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import llava_fast
from llava_fast.checkpoints.assemble import Assembly
from llava_fast.errors import CheckpointError
from llava_fast.families import family_of_config
from llava_fast.train.estimate.cost import plan
from llava_fast.train.recipe import load_recipe
from llava_fast.train.run import train
from tests.checkpoints import test_llama_vid, test_llava_uhd, test_xcomposer
from tests.checkpoints.test_guests import GUESTS, HOSTED
from tests.support import qwen_vl, slimes, tiny
from tests.support.parity import all_logits
from tests.support.training_runs import SHAPES, losses, write_picture

PARTS = ("vision_tower", "projector", "decoder")
WRITTEN = {"xcomposer": test_xcomposer, "llama_vid": test_llama_vid}
"""Families of their own layout, by tests that write a checkpoint."""
LLAVAS = ("llava15", "next", "video", "onevision")


@pytest.mark.parametrize("name", LLAVAS + GUESTS + HOSTED)
def test_it_trains_and_transformers_reads_what_is_exported(name, recipe_in, tmp_path):
    start = tmp_path / "start"
    tiny.save(tiny.CASES[name], tiny.pair(name).hf, start)
    optimizer = {"learning_rate": 2e-3}
    options = {"trainable": list(PARTS), "epochs": 2, "optimizer": optimizer}
    recipe = recipe_in(tmp_path / "run", model=str(start), **options)
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
        (found,) = all_logits(after, after.prepare([request]))
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


@pytest.mark.parametrize("kind", ["uhd_v1_query64", "uhd_first"])
def test_llava_uhd_trains_and_is_read_again(kind, recipe_in, tmp_path):
    """Text alone among the samples, and images of several shapes in a batch."""
    start = tmp_path / "start"
    test_llava_uhd.write(start, mm_projector_type=kind)
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
    projected = {"kv_proj.weight"} if kind != "uhd_first" else set()  # as wide as its tower here
    assert {"query", "attn.in_proj_weight", "proj", "pos_embed"} | projected <= set(names)
    assert after.generate([{"prompt": "<image> hello", "images": [tiny.picture(20, 90)]}], max_new_tokens=3)


@pytest.mark.parametrize("router_text", ["prompt", "all"])
def test_slime_trains_and_is_read_again(router_text, recipe_in, tmp_path):
    """Text alone among the samples; what its connector does not use stays as it was."""
    start = tmp_path / "start"
    slimes.write(start)
    options = {"model": str(start), "trainable": list(PARTS), "epochs": 2, "optimizer": {"learning_rate": 2e-3}}
    recipe = recipe_in(tmp_path / "run", **options, layout="original", data={"router_text": router_text})
    assert plan(recipe, 1).total_memory > 0
    train(recipe)
    each = losses(recipe)
    assert sum(each[-2:]) < sum(each[:2]), each
    before, after = llava_fast.load(start), llava_fast.load(recipe.output / "model")
    assert after.config == before.config
    changed = {
        name
        for name, value in after.projector.state_dict().items()
        if not value.equal(before.projector.state_dict()[name])
    }
    assert {"mlp.layers.0.weight", "compressor.query", "compressor.attn.in_proj_weight"} <= changed
    assert not changed & {"compressor.pos_embed", "noise", "mean", "std", "gate", "expert.query"}


def test_slimes_adapters(recipe_in, tmp_path):
    """Beside a trained connector, in the original's files."""
    start = tmp_path / "start"
    slimes.write(start)
    lora = {"rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj"]}
    options = {"model": str(start), "trainable": ["projector"], "lora": lora, "steps": 3, "layout": "original"}
    recipe = recipe_in(tmp_path / "run", **options, optimizer={"learning_rate": 1e-2})
    train(recipe)
    request = {"prompt": "the <image> hello", "images": [tiny.picture(60, 90)]}
    found = []
    for folder in ("model", "adapter"):
        ours = llava_fast.load(recipe.output / folder)
        with torch.no_grad():
            found.append(ours(ours.prepare([request]), logits="all").logits)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
    assert not torch.equal(ours.projector.mlp.layers[0].weight, llava_fast.load(start).projector.mlp.layers[0].weight)


def test_slimes_stages_from_a_language_model(recipe_in, tmp_path):
    """Each trains its own part of the connector and takes the others from the stage before."""
    slimes.write(tmp_path / "start", patch=2)
    whole = llava_fast.load(tmp_path / "start")
    decoder = tmp_path / "decoder"
    LlamaForCausalLM(LlamaConfig.from_pretrained(tmp_path / "start")).save_pretrained(decoder)
    fields = json.loads((decoder / "config.json").read_text())
    kept = {name: value for name, value in fields.items() if name not in slimes.CONFIG}
    (decoder / "config.json").write_text(json.dumps(kept | {"model_type": "llama"}))
    tiny.tokenizer().save_pretrained(decoder)
    tower = tmp_path / "tower"
    CLIPVisionModel(CLIPVisionConfig.from_pretrained(tmp_path / "start" / "tower")).save_pretrained(tower)
    stages = {
        "1a": ({"use_global_only": True, "mm_learnable_gated": 0}, "projector.mlp.*"),
        "1b": ({"use_global_only": True, "mm_learnable_gated": 1}, "projector.expert.*"),
        "2": ({"use_local_only": True}, "projector.compressor.*"),
    }
    own = {"mm_resampler_type": "cosine", "mm_resampler_topp": 1.0, "mm_resampler_temp": 1.0, "mm_resampler_dim": 4}
    model = {"decoder": str(decoder), "vision_tower": str(tower), "projector": "gated", "aspect": "anyres"}
    model["merge"] = "spatial"
    before = None
    for stage, (settings, trained) in stages.items():
        given = model | {"settings": own | settings | {"seperator": slimes.SEPARATOR}}
        if before is not None:
            given["projector_from"] = str(before)
        recipe = recipe_in(tmp_path / stage, model=given, trainable=[trained], steps=1, layout="original")
        train(recipe)
        old, new = llava_fast.load(recipe.model), llava_fast.load(recipe.output / "model")
        assert new.config.projector.expert == {"1a": 0, "1b": 1, "2": None}[stage]
        for name, value in new.state_dict().items():
            is_trained = fnmatch(name, trained) and not name.endswith(("pos_embed", "in_proj_bias"))
            assert value.equal(old.state_dict()[name]) != is_trained or name.endswith("in_proj_bias"), name
        before = recipe.output / "model"
    stored = load_file(before / "model.safetensors")  # what the original trainer writes after a stage
    (tmp_path / "stage").mkdir()
    for part in ("mm_projector", "sampler"):
        kept = {name: value for name, value in stored.items() if f".{part}." in name}
        kept = {name: value for name, value in kept.items() if not name.endswith((".mean", ".std"))}
        torch.save(kept, tmp_path / "stage" / f"{part}.bin")
    taken = llava_fast.load(Assembly(**given | {"projector_from": str(tmp_path / "stage")}))
    assert all(value.equal(new.projector.state_dict()[name]) for name, value in taken.projector.state_dict().items())
    assert new.projector.state_dict().keys() == whole.projector.state_dict().keys()
    with pytest.raises(CheckpointError, match="settings: 'mm_topp' is not a field of a slime's config"):
        llava_fast.load(Assembly(**model, settings={"mm_topp": 1.0}))


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


@pytest.mark.parametrize("name", ["qwen-vl", "monkey"])
def test_qwen_vl_and_monkey_train_what_their_recipes_say(name, recipe_in, tmp_path):
    """The rest of the tower and of the connector is frozen, as in the published trainers."""
    start = tmp_path / "start"
    qwen_vl.write(start, name == "monkey")
    shipped = load_recipe(name)
    optimizer = shipped.optimizer.model_copy(update={"learning_rate": 2e-3})
    options = {"model": str(start), "epochs": 2, "optimizer": optimizer.model_dump(), "layout": "original"}
    options["data"] = {"template": None, "label_mask": "original"}
    recipe = recipe_in(tmp_path / "run", trainable=shipped.trainable, **options)
    assert plan(recipe, 1).total_memory > 0
    train(recipe)
    each = losses(recipe)
    assert sum(each[-2:]) < sum(each[:2]), each
    before, after = (load_file(folder / "model.safetensors") for folder in (start, recipe.output / "model"))
    assert before.keys() == after.keys()
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    visual = {key for key in changed if ".visual." in key}
    assert visual == {key for key in after if ".attn_pool." in key or "_lora." in key}
    assert {key for key in after if key.startswith("transformer.h.")} < changed
    model = llava_fast.load(recipe.output / "model")
    assert model.generate([{"prompt": "<image> hello", "images": [tiny.picture(20, 90)]}], max_new_tokens=3)


def test_adapters_of_qwen_vl_have_published_names(recipe_in, tmp_path):
    start = tmp_path / "start"
    qwen_vl.write(start)
    lora = {"rank": 4, "alpha": 8, "targets": ["c_attn", "c_proj", "w1", "w2"]}
    optimizer = {"learning_rate": 1e-2}
    options = {"trainable": ["projector.query"], "lora": lora, "steps": 3, "optimizer": optimizer, "layout": "original"}
    recipe = recipe_in(tmp_path / "run", model=str(start), **options)
    train(recipe)
    stored = load_file(recipe.output / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight" in stored
    request = {"prompt": "the <image> hello", "images": [tiny.picture(60, 90)]}
    found = []
    for folder in ("model", "adapter"):
        ours = llava_fast.load(recipe.output / folder)
        found.append(ours(ours.prepare([request]), logits="all").logits)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


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


@pytest.mark.parametrize(("name", "targets"), [("blip2", ["q_proj", "v_proj"]), ("blip2_t5", ["q", "v"])])
def test_adapters_beside_a_q_former_name_modules_only(name, targets, recipe_in, tmp_path, caplog):
    """Its query tokens are a parameter outside of any module, which PEFT can neither save nor load."""
    start = tmp_path / "start"
    tiny.save(tiny.CASES[name], tiny.pair(name).hf, start)
    lora = {"rank": 4, "alpha": 8, "targets": targets}
    options = {"trainable": ["projector"], "lora": lora, "steps": 2, "data": {"on_problem": "skip"}}
    recipe = recipe_in(tmp_path / "run", model=str(start), **options)
    train(recipe)
    assert "PEFT cannot read query_tokens" in caplog.text
    stock = PeftModel.from_pretrained(tiny.hf_model(tiny.CASES[name]), recipe.output / "adapter")
    assert set(stock.peft_config["default"].modules_to_save) == {"language_projection", "qformer"}
    request = {"prompt": "the <image> hello", "images": [tiny.picture(60, 90)]}
    found = []
    for folder in ("model", "adapter"):
        ours = llava_fast.load(recipe.output / folder)
        found += all_logits(ours, ours.prepare([request]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("section", ["dpo", "kto"])
def test_an_encoder_decoder_learns_preferences(section, make_recipe, tmp_path):
    tiny.save(tiny.CASES["blip2_t5"], tiny.pair("blip2_t5").hf, tmp_path / "start")
    write_picture(tmp_path, np.random.default_rng(0), 0)
    questions, answers = ("what is near?", "the other?", "and a?"), ("hello the a", "no")
    pairs = [{"prompt": text, "chosen": answers[0], "rejected": answers[1], "image": "0.png"} for text in questions]
    (tmp_path / "pairs.json").write_text(json.dumps([*pairs, pairs[0] | {"prompt": "a text alone?", "image": ""}]))
    data = {"sources": [{"path": str(tmp_path / "pairs.json"), "images": str(tmp_path)}]}
    options = {"model": str(tmp_path / "start"), "data": data, "batch_size": 4, "epochs": 6, section: {}}
    recipe = make_recipe(**options, optimizer={"learning_rate": 2e-3})
    train(recipe)
    each = losses(recipe)
    assert each[0] == pytest.approx(np.log(2) if section == "dpo" else 0.5, abs=1e-3)  # it is its own reference
    assert each[-1] < 0.9 * each[0]


@pytest.mark.parametrize("grows", [True, False], ids=["ntk", "log_n"])
def test_preferences_beyond_the_trained_length_of_a_qwen_are_left_out(grows, make_recipe, tmp_path, caplog):
    """There its reference, an inference, would differ from the policy in training, or be refused."""
    qwen_vl.write(tmp_path / "start")
    config = json.loads((tmp_path / "start" / "config.json").read_text())
    (tmp_path / "start" / "config.json").write_text(json.dumps(config | {"use_dynamic_ntk": grows, "seq_length": 200}))
    pair = {"prompt": "the hello?", "chosen": "hello foo", "rejected": "the"}
    pairs = [pair, pair | {"chosen": " foo the" * 80}]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    data = {"sources": [{"path": str(tmp_path / "pairs.json")}]}
    recipe = make_recipe(model=str(tmp_path / "start"), data=data, batch_size=1, steps=1, layout="original", dpo={})
    with caplog.at_level("INFO"):
        train(recipe)
    assert "1 left out as longer than 200 rows" in caplog.text
    assert losses(recipe) == [pytest.approx(np.log(2), abs=1e-5)]


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["ddp", "fsdp2"])
def test_slime_in_two_processes(shape, recipe_in, run, tmp_path):
    """Without a router, whose noise differs, the losses are the same; with it each process has its own rows."""
    for top_p in (1.0, 0.8):
        start = tmp_path / f"start{top_p}"
        slimes.write(start, mm_resampler_topp=top_p)
        options = {"model": str(start), "trainable": list(PARTS), "batch_size": 3, "steps": 3, "layout": "original"}
        alone = recipe_in(tmp_path / f"alone{top_p}", **options)
        parallel = alone.parallel.model_copy(update=SHAPES[shape])
        shared = alone.model_copy(update={"output": tmp_path / f"{shape}{top_p}", "parallel": parallel})
        run(shared, processes=2)
        assert len(losses(shared)) == 3
        if top_p == 1:
            train(alone)
            np.testing.assert_allclose(losses(shared), losses(alone), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", [*HOSTED, "instructblip", "blip2_t5", "monkey", *WRITTEN])
def test_in_two_processes_the_losses_are_the_same(name, shape, recipe_in, run, tmp_path):
    start = tmp_path / "start"
    data = {"on_problem": "skip"} if name.endswith("t5") else {}
    options = {"trainable": list(PARTS), "batch_size": 3, "steps": 3, "data": data}
    if name == "monkey":
        qwen_vl.write(start, monkey=True)
        options |= {"layout": "original", "data": {"template": None}}
    elif name in WRITTEN:
        WRITTEN[name].write(start)
        options["layout"] = "original"
    else:
        tiny.save(tiny.CASES[name], tiny.pair(name).hf, start)
    alone = recipe_in(tmp_path / "alone", model=str(start), **options)
    train(alone)
    parallel = alone.parallel.model_copy(update=SHAPES[shape])
    shared = alone.model_copy(update={"output": tmp_path / shape, "parallel": parallel})
    run(shared, processes=2)
    np.testing.assert_allclose(losses(shared), losses(alone), rtol=1e-4)
