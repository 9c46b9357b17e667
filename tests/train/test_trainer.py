"""The trainer on a CPU: its results, bit-identical resuming, and how it stops."""

import json

import numpy as np
import pytest
import torch

import llava_fast
from llava_fast.errors import DataError, RecipeError, TrainingError
from llava_fast.models.batch import Batch
from llava_fast.train import run
from llava_fast.train import trainer as training
from llava_fast.train.metrics import FILE, read_metrics
from llava_fast.train.parallel import World
from llava_fast.train.resume import RECIPE_FILE
from llava_fast.train.run import build_loader, load_model, train
from llava_fast.train.trainer import Trainer
from tests.support.training_runs import break_off, losses

ALONE = World(0, 1, torch.device("cpu"))


def build(recipe) -> Trainer:
    model = load_model(recipe, ALONE)
    return Trainer(recipe, model, build_loader(recipe, model, ALONE), ALONE)


def test_learns_and_exports(make_recipe):
    recipe = make_recipe(epochs=4, optimizer={"learning_rate": 3e-3}, data={"template": "mistral"})
    leftover = recipe.output / ".model.saving-1"  # of an export that was killed
    leftover.mkdir(parents=True)
    path = train(recipe)
    assert not leftover.exists()
    found = losses(recipe)
    assert len(found) == 12
    assert found[-1] < 0.7 * found[0]
    before, after = llava_fast.load(recipe.model), llava_fast.load(path)
    assert (before.processor.template.name, after.processor.template.name) == ("vicuna_v1", "mistral")
    changed = {
        name.split(".")[0]
        for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True)
        if not torch.equal(old, new)
    }
    assert changed == {"projector", "decoder", "image_newline"}


def test_packed_equals_padded(make_recipe, tmp_path):
    packed = make_recipe(epochs=2, micro_batch_rows=700)
    padded = make_recipe(epochs=2, micro_batch=2, data={"batching": "padded"}, output=str(tmp_path / "padded"))
    for recipe in (packed, padded):
        train(recipe)
    np.testing.assert_allclose(losses(packed), losses(padded), rtol=1e-5)


def test_micro_batches_do_not_change_the_loss(make_recipe, tmp_path):
    whole = make_recipe(micro_batch_rows=100000)
    small = make_recipe(micro_batch_rows=1, output=str(tmp_path / "small"))
    for recipe in (whole, small):
        train(recipe)
    np.testing.assert_allclose(losses(whole), losses(small), rtol=1e-5)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_goes_on_bit_for_bit(make_recipe, tmp_path, workers):
    whole = make_recipe(epochs=3, checkpoints={"every": 2}, data={"workers": workers})
    train(whole)
    killed = whole.model_copy(update={"output": tmp_path / "killed"})
    break_off(killed, 5)
    assert len(losses(killed)) == 5  # one more than its checkpoint holds
    train(killed)
    assert losses(killed) == losses(whole)
    assert [values["step"] for values in read_metrics(killed.output / FILE)] == list(range(1, 10))
    first, second = (llava_fast.load(recipe.output / "model") for recipe in (whole, killed))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_refuses_to_run_over_another_run(make_recipe):
    recipe = make_recipe()
    train(recipe)
    with pytest.raises(TrainingError, match="has a run"):
        train(recipe, resume=False)


def test_refuses_to_resume_with_other_data(make_recipe):
    recipe = make_recipe()
    train(recipe)
    with pytest.raises(TrainingError, match="data, seed or batch size"):
        train(recipe.model_copy(update={"seed": 5}))


def test_refuses_to_resume_with_data_that_was_edited_but_not_moved(make_recipe, tiny_data, tmp_path):
    def over(folder, text):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "data.json").write_text(text)
        source = {"path": str(tmp_path / folder / "data.json"), "images": str(tiny_data.parent)}
        return make_recipe(steps=1, data={"sources": [source]})

    records = json.loads(tiny_data.read_text())
    train(over("first", json.dumps(records)))
    train(over("elsewhere", json.dumps(records, indent=1)))
    records[3]["conversations"][-1]["value"] = "another answer"
    with pytest.raises(TrainingError, match="data, seed or batch size"):
        train(over("edited", json.dumps(records)))


def test_refuses_to_resume_another_recipe(make_recipe, caplog):
    recipe = make_recipe(steps=1)
    train(recipe)
    with pytest.raises(TrainingError, match=r"another recipe: trainable changed .*'decoder'.* and is \['projector'\]"):
        train(recipe.model_copy(update={"trainable": ["projector"]}))
    (recipe.output / RECIPE_FILE).unlink()  # as in a run of an older version
    with pytest.raises(TrainingError, match="does not match") as caught:
        train(recipe.model_copy(update={"trainable": ["vision_tower"]}))
    assert "Traceback" not in str(caught.value)
    assert "vision_tower" in str(caught.value)
    with caplog.at_level("INFO", "llava_fast.train"):
        train(recipe.model_copy(update={"steps": 2}))
        train(recipe.model_copy(update={"steps": 3}))
    assert "since the last start of this run: steps" in caplog.text
    assert len(losses(recipe)) == 3


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/none"])
def test_an_output_that_cannot_be_written_stops_at_once(make_recipe, tmp_path, monkeypatch, place):
    monkeypatch.setattr(run, "load_model", lambda *_: 1 / 0)
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match=r"output: .* is not writable"):
        train(make_recipe(output=str(tmp_path / place)))


def test_keeps_so_many_checkpoints(make_recipe):
    recipe = make_recipe(epochs=2, checkpoints={"every": 1, "keep": 2})
    train(recipe)
    assert sorted(each.name for each in (recipe.output / "checkpoints").iterdir()) == ["step-000005", "step-000006"]


def test_only_what_is_named_is_trained(make_recipe):
    trainer = build(make_recipe(trainable=["projector", "decoder.layers.1.*"]))
    names = {name for name, parameter in trainer.bare.named_parameters() if parameter.requires_grad}
    assert names
    assert all(name.startswith(("projector", "image_newline", "decoder.layers.1.")) for name in names)
    with pytest.raises(RecipeError, match="'brain' is neither a part"):
        build(make_recipe(trainable=["brain"]))


def test_a_part_has_its_own_rate(make_recipe):
    recipe = make_recipe(
        trainable=["vision_tower", "projector", "decoder"],
        optimizer={"learning_rate": 1e-3, "rates": {"vision_tower": 2e-4}, "weight_decay": 0.1},
    )
    groups = {group["name"]: (group["lr"], group["weight_decay"]) for group in build(recipe).optimizer.param_groups}
    assert groups["vision_tower matrices"] == (2e-4, 0.1)
    assert groups["decoder vectors"] == (1e-3, 0.0)


def test_a_loss_that_is_not_finite_stops_with_the_samples_names(make_recipe):
    recipe = make_recipe()
    trainer = build(recipe)
    batch = next(trainer.loader.steps(0))
    weight = trainer.bare.decoder.norm.weight
    with torch.no_grad():
        weight[0] = float("nan")
    before = trainer.bare.projector.layers[0].weight.clone()
    with pytest.raises(TrainingError, match=r"step 1: .*sample-\d"):
        trainer.step(batch)
    assert torch.equal(before, trainer.bare.projector.layers[0].weight)


def test_a_spike_stops(make_recipe, monkeypatch):
    monkeypatch.setattr(training, "_RECENT", 2)
    trainer = build(make_recipe(epochs=3))
    trainer.recent.extend([0.01, 0.01])
    with pytest.raises(TrainingError, match=r"times the median 0.0100"):
        trainer.step(next(trainer.loader.steps(0)))


def test_bfloat16_follows_float32(make_recipe, tmp_path):
    exact, rounded = make_recipe(epochs=2), make_recipe(epochs=2, precision="bfloat16", output=str(tmp_path / "bf16"))
    for recipe in (exact, rounded):
        train(recipe)
    np.testing.assert_allclose(losses(rounded), losses(exact), rtol=0.02)
    trainer = build(rounded)
    kinds = {parameter.dtype for parameter in trainer.bare.parameters() if parameter.requires_grad}
    assert kinds == {torch.float32}
    assert trainer.bare.vision_tower.embeddings.position_embedding.weight.dtype == torch.bfloat16


def test_long_samples_are_dropped_or_cut(make_recipe, tmp_path):
    taken = {}
    for policy in ("drop", "cut"):
        recipe = make_recipe(data={"max_length": 450, "too_long": policy}, output=str(tmp_path / policy))
        loader = build(recipe).loader
        batches = [made for batch in loader.steps(0) for made in batch.micro_batches]
        lengths = [length for made in batches for length in made.plan.lengths]
        assert max(lengths) <= 450
        assert all(made.plan.has_labels for made in batches)
        assert sorted(lengths) == sorted(
            loader.rows(np.concatenate([loader.schedule.samples(s) for s in range(loader.schedule.total)]))
        )
        taken[policy] = len(lengths)
    assert taken["drop"] == 14  # of 22; of the eight longer ones, some keep a part of their answers
    assert 14 < taken["cut"] < 22


def test_a_sample_with_a_problem_stops_or_is_skipped(make_recipe, tiny_data, tmp_path):
    records = json.loads(tiny_data.read_text())
    records[5]["image"] = "gone.png"
    (tmp_path / "broken.json").write_text(json.dumps(records))
    sources = [{"path": str(tmp_path / "broken.json"), "images": str(tiny_data.parent)}]
    with pytest.raises(DataError, match=r"(?s)1 samples cannot .*sample-5.*gone\.png"):
        train(make_recipe(data={"sources": sources}))
    train(make_recipe(data={"sources": sources, "on_problem": "skip"}))


def test_recomputing_changes_memory_alone(make_recipe, tmp_path):
    found, kept = {}, {}
    for how in ("none", "layers", "selective"):
        parts = ["vision_tower", "projector", "decoder"]
        trainer = build(make_recipe(recompute=how, trainable=parts, output=str(tmp_path / how)))
        batch = next(trainer.loader.steps(0))
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: (sizes.append(t.numel()), t)[1], id_):
            made = Batch.from_prepared(batch.micro_batches[0])
            loss = trainer.bare(made, logits="none").losses.sum()
        loss.backward()
        found[how] = [parameter.grad.clone() for parameter in trainer.trained]
        kept[how] = sum(sizes)
    assert kept["layers"] < 0.5 * kept["none"]
    for how in ("layers", "selective"):
        assert all(torch.equal(a, b) for a, b in zip(found[how], found["none"], strict=True))


def id_(tensor):
    return tensor
