"""Stage 1 of BLIP-2 by recipe: losses fall, processes share a batch as one process runs it, a killed run goes on, and
stage 2 begins with what it exports."""

import json
import re
import signal

import numpy as np
import pytest
import torch
import yaml
from transformers import Blip2ForConditionalGeneration, OPTConfig, OPTForCausalLM, T5Config, T5ForConditionalGeneration
from typer.testing import CliRunner

import llava_fast
from llava_fast.cli.main import app
from llava_fast.errors import CheckpointError, DataError, RecipeError
from llava_fast.train.data.check import check, plan_for
from llava_fast.train.estimate.cost import plan
from llava_fast.train.recipe import load_recipe, parse_recipe
from llava_fast.train.run import train
from tests.support import stage_one, tiny
from tests.support.qformers import t5_tokenizer
from tests.support.training_runs import losses, steps


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage_one")
    stage_one.save_reference(folder / "blip2")
    stage_one.save_bert(folder / "bert")
    stage_one.save_captions(folder)
    llava_fast.assemble_stage_one(folder / "new", folder / "bert", folder / "blip2", queries=4, features=16)
    return folder


@pytest.fixture
def recipe(folder, tmp_path):
    def make(name="run", **changes):
        given = {
            "model": str(folder / "new"),
            "output": str(tmp_path / name),
            "stage_one": {},
            "data": {"sources": [{"path": str(folder / "captions.json")}], "batching": "padded", "workers": 0},
            "optimizer": {"learning_rate": 3e-3, "warmup": 0.1, "first_rate": 1e-4, "last_rate": 1e-3},
            "batch_size": 4,
            "micro_batch": 4,
            "epochs": 4,
            "precision": "float32",
            "tensorboard": False,
        }
        return parse_recipe(given | changes)

    return make


def test_a_new_model_begins_with_bert(folder):
    bert = stage_one.save_bert(folder / "again").state_dict()
    model = llava_fast.load_retrieval(folder / "new")
    layer, theirs = model.projector.layers[1], "bert.encoder.layer.1."
    for ours in (layer.intermediate, layer.intermediate_query):
        assert torch.equal(ours["dense"].weight, bert[f"{theirs}intermediate.dense.weight"])
    for ours in (layer.output, layer.output_query):
        assert torch.equal(ours.LayerNorm.weight, bert[f"{theirs}output.LayerNorm.weight"])
    assert torch.equal(layer.attention.attention.query.weight, bert[f"{theirs}attention.self.query.weight"])
    words = model.projector.embeddings.word_embeddings.weight
    assert torch.equal(words[:-1], bert["bert.embeddings.word_embeddings.weight"])
    assert len(words) == model.first_word + 1
    tower = llava_fast.load_retrieval(folder / "blip2").vision_tower.state_dict()
    assert all(torch.equal(value, tower[name]) for name, value in model.vision_tower.state_dict().items())
    first = model.projector.layers[0].crossattention.attention.key.weight
    assert 0.01 < first.std() < 0.03
    with pytest.raises(CheckpointError, match="must be a bert"):
        llava_fast.assemble_stage_one(folder / "no", folder / "blip2", folder / "blip2")


def test_losses_fall_and_the_model_is_read_again(recipe, folder):
    made = recipe(model=str(folder / "blip2"), batch_size=6, micro_batch=6, epochs=30)
    path = train(made)
    values = steps(made)
    names = ("contrastive_loss", "matching_loss", "caption_loss")
    for name in names:
        begin, end = (np.mean([each[name] for each in part]) for part in (values[:6], values[-6:]))
        assert end < 0.6 * begin, (name, begin, end)
    assert values[0]["pairs"] == 6
    assert values[0]["loss"] == pytest.approx(sum(values[0][name] for name in names), rel=1e-5)
    rates = [each["lr"] for each in values]
    assert rates[:2] == pytest.approx([1e-4, 1e-4 + (3e-3 - 1e-4) / 6])  # six steps of warm-up
    assert rates[6] == max(rates) == pytest.approx(3e-3)
    assert 1e-3 < rates[-1] < 1.01e-3
    model = llava_fast.load_retrieval(path)
    pictures = [str(folder / f"{number}.png") for number in range(12)]
    assert (model.contrastive(pictures, stage_one.CAPTIONS).argmax(1) == torch.arange(12)).float().mean() > 0.7
    matches = model.matching(pictures, stage_one.CAPTIONS)
    assert matches.diagonal().mean() > 2 * matches.mean()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_are_one(kind, recipe, run):
    one = recipe("one", steps=3)
    run(one)
    two = recipe("two", steps=3, micro_batch=2, parallel={"kind": kind})
    run(two, processes=2)
    for alone, shared in zip(steps(one), steps(two), strict=True):
        for name in ("loss", "contrastive_loss", "matching_loss", "caption_loss", "gradient_norm"):
            assert shared[name] == pytest.approx(alone[name], rel=2e-4), name
    alone, shared = (dict(llava_fast.load_retrieval(each.output / "model").named_parameters()) for each in (one, two))
    for name, value in alone.items():
        torch.testing.assert_close(shared[name], value, rtol=1e-3, atol=3e-5)


@pytest.mark.parametrize("processes", [1, 2])
def test_in_sixteen_bits(processes, recipe, run):
    whole = recipe("whole", steps=2)
    run(whole)
    half = recipe("half", steps=2, precision="bfloat16", micro_batch=4 // processes, parallel={"kind": "auto"})
    run(half, processes=processes)
    for alone, rounded in zip(steps(whole), steps(half), strict=True):
        assert rounded["loss"] == pytest.approx(alone["loss"], rel=2e-2)


def test_a_killed_run_goes_on_bit_for_bit(recipe, run):
    whole, killed = (recipe(name, checkpoints={"every": 2}) for name in ("whole", "killed"))
    run(whole)
    assert run(killed, kill="step:6") == [-signal.SIGKILL]
    run(killed)
    assert losses(killed) == losses(whole)
    one, other = (llava_fast.load_retrieval(each.output / "model").state_dict() for each in (whole, killed))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_stage_two_begins_with_it(recipe, tmp_path, folder):
    first = train(recipe())
    torch.manual_seed(2)
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2}
    words = tiny.tokenizer()
    lm = OPTForCausalLM(OPTConfig(**sizes, num_attention_heads=2, vocab_size=len(words), max_position_embeddings=128))
    lm.model.save_pretrained(tmp_path / "opt")  # the base model alone, as facebook/opt-2.7b
    lm.save_pretrained(tmp_path / "whole")
    for name in ("opt", "whole"):
        words.save_pretrained(tmp_path / name)
        llava_fast.assemble_stage_two(tmp_path / f"with-{name}", first, tmp_path / name)
    model, before = llava_fast.load(tmp_path / "with-opt"), llava_fast.load_retrieval(first)
    same = llava_fast.load(tmp_path / "with-whole").state_dict()
    assert all(torch.equal(value, same[name]) for name, value in model.state_dict().items())
    theirs = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "with-opt").language_model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in lm.state_dict().items())
    assert torch.equal(model.projector.query_tokens, before.projector.query_tokens)
    with torch.no_grad():
        tiles = torch.from_numpy(model.processor.tiles(tiny.picture(40, 50)))
        rows = before.projector.images(before.tower_rows(tiles))[0]
        expected = model.projector.language_projection(rows)
        torch.testing.assert_close(model.projector(before.tower_rows(tiles)), expected)
    data = {"sources": [{"path": str(folder / "captions.json")}], "template": "plain", "workers": 0}
    given = {"model": str(tmp_path / "with-opt"), "output": str(tmp_path / "two"), "data": data, "batch_size": 4}
    optimizer = {"learning_rate": 1e-2, "last_rate": 1e-3}
    made = parse_recipe({**given, "optimizer": optimizer, "precision": "float32", "tensorboard": False, "epochs": 5})
    path = train(made)
    told = [each["loss"] for each in steps(made)]
    assert np.mean(told[-3:]) < np.mean(told[:3])  # of the same samples
    after = dict(llava_fast.load(path).named_parameters())
    for name, value in model.named_parameters():
        assert torch.equal(after[name], value) == (not name.startswith("projector.")), name


@pytest.mark.parametrize("stored", [False, True], ids=["no head stored", "head stored"])
def test_stage_two_with_an_encoder_decoder(stored, folder, tmp_path):
    torch.manual_seed(3)
    words = t5_tokenizer()
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 2, "vocab_size": len(words)}
    ids = {"decoder_start_token_id": 5, "pad_token_id": 5, "eos_token_id": 2}
    lm = T5ForConditionalGeneration(T5Config(**sizes, **ids, feed_forward_proj="gated-gelu"))
    if stored:
        lm.lm_head.weight = torch.nn.Parameter(torch.randn(len(words), 32))
    lm.config.scale_decoder_outputs = lm.config.tie_word_embeddings = not stored
    lm.save_pretrained(tmp_path / "t5")
    config = json.loads((tmp_path / "t5" / "config.json").read_text())
    config |= {"tie_word_embeddings": False, "scale_decoder_outputs": False}  # as Flan-T5's say
    (tmp_path / "t5" / "config.json").write_text(json.dumps(config))
    words.save_pretrained(tmp_path / "t5")
    llava_fast.assemble_stage_two(tmp_path / "two", folder / "new", tmp_path / "t5")
    model = llava_fast.load(tmp_path / "two")
    assert model.config.decoder.tie_embeddings != stored
    head = model.state_dict().get("decoder.lm_head.weight", model.decoder.embed_tokens.weight)
    assert torch.equal(head[: len(words)], lm.lm_head.weight)


def test_refused_recipes(recipe, folder, tmp_path):
    for changes, problem in (
        ({"micro_batch": 1}, "micro_batch to 2 or more"),
        ({"micro_batch": 3}, "multiple of micro_batch"),
        ({"data": {"sources": [{"path": "x"}]}}, "batching: padded"),
        ({"data": {"sources": [{"path": "x"}], "batching": "padded", "max_length": 8}}, "leave data.max_length"),
        ({"data": {"sources": [{"path": "x"}], "batching": "padded", "too_long": "cut"}}, "leave data.max_length"),
        ({"micro_batch_rows": 100}, "leave micro_batch_rows out"),
        ({"lora": {}, "trainable": []}, "leave `lora`"),
        ({"dpo": {}}, "one objective"),
        ({"layout": "original"}, "layout: hf"),
    ):
        with pytest.raises(RecipeError, match=problem):
            recipe(**changes)
    tiny.save(tiny.CASES["blip2"], tiny.hf_model(tiny.CASES["blip2"]), tmp_path / "generates")
    with pytest.raises(CheckpointError, match="is no Blip2ForImageTextRetrieval"):
        train(recipe(model=str(tmp_path / "generates")))


def test_samples_that_are_no_pairs(recipe, folder, tmp_path):
    samples = json.loads((folder / "captions.json").read_text())
    samples[1]["conversations"] += samples[1]["conversations"][:1] + samples[1]["conversations"][1:]
    samples[1]["conversations"][2] = {"from": "human", "value": "and?"}
    (folder / "other.json").write_text(json.dumps(samples))
    with pytest.raises(DataError, match="one caption"):
        train(recipe(data={"sources": [{"path": str(folder / "other.json")}], "batching": "padded", "workers": 0}))


def test_a_pair_left_alone_learns_its_caption_only(recipe, folder, tmp_path):
    (folder / "five.json").write_text(json.dumps(json.loads((folder / "captions.json").read_text())[:5]))
    data = {"sources": [{"path": str(folder / "five.json")}], "batching": "padded", "workers": 0}
    made = recipe(data=data, epochs=1)
    train(made)
    rest = steps(made)[1]
    assert (rest["pairs"], rest["contrastive_loss"], rest["matching_loss"]) == (1, 0, 0)
    assert rest["caption_loss"] > 1
    assert rest["loss"] == pytest.approx(rest["caption_loss"])


def test_the_layer_norm_after_the_tower_can_be_trained(recipe, folder):
    """As LAVIS trains it, and the recipe says how."""
    path = train(recipe(trainable=["projector", "vision_tower.post_layernorm.*"], steps=1))
    before, after = (llava_fast.load_retrieval(each).vision_tower.state_dict() for each in (folder / "new", path))
    changed = [name for name, value in after.items() if not torch.equal(value, before[name])]
    assert changed == ["post_layernorm.weight", "post_layernorm.bias"]


def test_its_data_is_checked_as_training_reads_it(recipe, tmp_path):
    file = tmp_path / "recipe.yaml"
    for most in (8, 16):  # the second does not reuse the first's lengths
        made = recipe(stage_one={"most_tokens": most})
        file.write_text(yaml.safe_dump(made.model_dump(mode="json", exclude_unset=True)))
        assert check(plan_for(str(file)), 0, progress=False).tokens["text"]["max"] == most
    checked = CliRunner().invoke(app, ["data", "check", str(file), "--workers", "0"])
    assert checked.exit_code == 0, checked.output
    assert "12 samples, no problem found." in checked.output


def test_its_cost_is_estimated(recipe):
    estimate = plan(recipe(), 2)
    text = estimate.to_text()
    for figure in ("12 samples x 4 epochs", "4 of a 1024x768 image, 16 of text", "4 samples\n"):
        assert figure in text
    assert re.search(r"projector +([\d,]+)   \1 trained", text)
    assert estimate.total_memory > 0


def test_by_the_command_line(folder, tmp_path):
    def convert(*arguments):
        return CliRunner().invoke(app, ["convert", *map(str, arguments)])

    made = convert(folder / "blip2", tmp_path / "new", "--text-encoder", folder / "bert")
    assert made.exit_code == 0, made.exception
    assert llava_fast.load_retrieval(tmp_path / "new").config.projector.queries == 32
    both = convert(folder / "blip2", tmp_path / "other", "--text-encoder", folder / "bert", "--decoder", "x")
    assert isinstance(both.exception, CheckpointError)


def test_the_shipped_recipe():
    shipped = load_recipe("blip-2-stage1")
    rates = shipped.optimizer
    assert (rates.learning_rate, rates.first_rate, rates.last_rate, rates.weight_decay) == (1e-4, 1e-6, 1e-5, 0.05)
    assert (shipped.micro_batch, shipped.epochs, shipped.trainable) == (100, 10, ["projector"])
    assert shipped.stage_one.most_tokens == 32
