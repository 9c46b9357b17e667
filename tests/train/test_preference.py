"""Preference tuning: the loss against two passes, both kinds of reference, and runs that change preferences."""

import functools
import json
import signal

import numpy as np
import pytest
import torch
import yaml
from torch.nn import functional as F
from typer.testing import CliRunner

import llava_fast
from llava_fast.cli.main import app
from llava_fast.errors import DataError, RecipeError
from llava_fast.models.batch import Batch
from llava_fast.train.objectives import reference as references
from llava_fast.train.objectives.reference import adapters_off
from llava_fast.train.run import build_trainer, load_model, train
from tests.support.training_runs import ALONE, SHAPES, break_off, objective_recipes, steps, write_picture

ANSWERS = ["a red cup", "two green cups near a table", "nothing", "a small box on the table", "the red box says hello"]


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    """12 pairs: of two answers, the one earlier in ANSWERS is preferred. Some have an image, some share first words."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    with (folder / "pairs.jsonl").open("w") as file:
        for number in range(12):
            better, worse = sorted(rng.choice(len(ANSWERS), 2, replace=False))
            pair = {"id": f"pair-{number}", "prompt": "what is near?", "chosen": ANSWERS[better]}
            pair["rejected"] = ANSWERS[worse] if number % 3 else f"{ANSWERS[better]} {ANSWERS[worse]}"
            if number % 4:
                pair["image"] = write_picture(folder, rng, number)
            file.write(json.dumps(pair) + "\n")
    return folder / "pairs.jsonl"


@pytest.fixture
def recipe(make_recipe, pairs_file):
    """Recipes over the pairs; `settings` are those of `dpo`."""

    return objective_recipes(make_recipe, "dpo", pairs_file)


def two_pass(trainer, settings) -> tuple[float, dict]:
    """The loss of step 1 and its gradients, from each answer as an ordinary sequence; the reference is the model."""
    model, answers = trainer.bare, trainer.loader.micro_batches.answers
    reference = llava_fast.load(trainer.recipe.model, chat_template="vicuna_v1")
    chosen = [int(number) for number in trainer.loader.schedule.samples(0)]
    total = torch.zeros(())
    for number in chosen:
        log_probs, bases = [], []
        for which in (0, 1):
            batch = model.prepare([answers[2 * number + which].request], labels=True)
            log_probs.append(-model(batch, logits="none").losses)
            with torch.no_grad():
                bases.append(-reference(batch, logits="none").losses.sum())
        margin = settings["beta"] * (log_probs[0].sum() - bases[0] - log_probs[1].sum() + bases[1])
        smooth = settings["label_smoothing"]
        each = -(1 - smooth) * F.logsigmoid(margin) - smooth * F.logsigmoid(-margin)
        total = total + each - settings["sft_weight"] * log_probs[0].mean()
    loss = total / len(chosen)
    model.zero_grad()
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("rows", "recompute"), [(1, "none"), (100000, "none"), (100000, "layers"), (1, "selective")])
def test_a_step_equals_two_passes(recipe, rows, recompute):
    settings = {"beta": 0.3, "label_smoothing": 0.1, "sft_weight": 0.5}
    made = recipe(settings, micro_batch_rows=rows, recompute=recompute, optimizer={"clip": None})
    trainer = build_trainer(made, load_model(made, ALONE), ALONE)
    with torch.no_grad():  # away from the reference, where every margin is 0
        for parameter in trainer.trained:
            parameter.add_(torch.randn_like(parameter) * 0.02)
    expected, gradients = two_pass(trainer, settings)
    found: dict = {}
    trainer.optimizer.zero_grad()
    trainer.optimizer.register_step_pre_hook(
        lambda *_: found.update({n: p.grad.clone() for n, p in trainer.bare.named_parameters() if p.grad is not None})
    )
    values = trainer.step(next(trainer.loader.steps(0)))
    assert values["loss"] == pytest.approx(expected, rel=1e-5)
    assert values["pairs"] == 6
    assert found.keys() == gradients.keys()
    assert len(found) > 20
    for name, wanted in gradients.items():
        assert float((found[name] - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max()), name


def test_learns_the_preferences(recipe):
    made = recipe(epochs=8, optimizer={"learning_rate": 1e-3})
    path = train(made)
    found = steps(made)
    assert len(found) == 16
    assert found[0]["dpo_loss"] == pytest.approx(np.log(2), abs=1e-4)  # the model is its own reference
    assert found[0]["reward_margin"] == pytest.approx(0, abs=1e-3)
    assert found[-1]["loss"] < 0.5
    assert found[-1]["reward_margin"] > 0.5
    assert found[-1]["reward_accuracy"] == 1
    # What the exported model says of each pair, by ordinary sequences.
    before, after = (llava_fast.load(each, chat_template="vicuna_v1") for each in (made.model, path))
    answers = build_trainer(made, load_model(made, ALONE), ALONE).loader.micro_batches.answers
    moved = []
    with torch.no_grad():
        for number in range(12):
            margins = []
            for model in (before, after):
                losses = [
                    model(model.prepare([answers[2 * number + which].request], labels=True), logits="none").losses.sum()
                    for which in (0, 1)
                ]
                margins.append(float(losses[1] - losses[0]))
            moved.append(margins[1] - margins[0])
    assert min(moved) > 0


@pytest.mark.parametrize("reference", ["precomputed", "base"])
def test_over_quantised_weights_the_first_step_has_no_margin(recipe, reference):
    """The reference is computed without gradients, where a faster product that rounds its inputs would do."""
    made = recipe({"reference": reference}, quantize="int8", lora={"rank": 4}, trainable=[], epochs=1)
    train(made)
    assert steps(made)[0]["reward_margin"] == pytest.approx(0, abs=1e-6)


def test_the_sft_term_keeps_chosen_answers_likely(recipe, tmp_path):
    plain = recipe(epochs=4, output=str(tmp_path / "plain"))
    held = recipe({"sft_weight": 1.0}, epochs=4, output=str(tmp_path / "held"))
    for made in (plain, held):
        train(made)
    assert steps(held)[-1]["sft_loss"] < 0.8 * steps(plain)[-1]["sft_loss"]


def test_a_killed_run_goes_on_with_the_same_reference(recipe, tmp_path, monkeypatch):
    whole = recipe(epochs=3, checkpoints={"every": 2}, output=str(tmp_path / "whole"))
    train(whole)
    killed = whole.model_copy(update={"output": tmp_path / "killed"})
    break_off(killed, 3)
    (kept,) = (killed.output / "references").iterdir()
    monkeypatch.setattr(references, "tqdm", None)  # a second pass over the data would need it
    train(killed)
    assert list((killed.output / "references").iterdir()) == [kept]
    assert [values["loss"] for values in steps(killed)] == [values["loss"] for values in steps(whole)]


@pytest.fixture(scope="module")
def uneven(recipe_in, pairs_file, tmp_path_factory):
    """Recipes of 5 steps that leave one of two processes with fewer pairs, or none; by reference, after a run alone."""

    def make(reference: str):
        alone = recipe_in(
            tmp_path_factory.mktemp(reference) / "alone",
            dpo={"beta": 0.3, "sft_weight": 0.5, "reference": reference},
            data={"sources": [{"path": str(pairs_file)}]},
            batch_size=5,
            steps=5,
            epochs=2,
            micro_batch_rows=1,
            recompute="none",
            checkpoints={"every": 2},
            **({"lora": {"rank": 4}, "trainable": []} if reference == "base" else {}),
        )
        train(alone)
        return alone

    return functools.cache(make)


@pytest.mark.parametrize(
    ("shape", "reference"),
    [*((shape, "precomputed") for shape in SHAPES), ("ddp", "base"), ("fsdp2", "base")],
)
def test_two_processes_give_the_losses_of_one(uneven, run, tmp_path, shape, reference):
    pytest.importorskip("peft")
    alone = uneven(reference)
    parallel = alone.parallel.model_copy(update=SHAPES[shape])
    shared = alone.model_copy(update={"output": tmp_path / "shared", "parallel": parallel})
    run(shared, processes=2)
    for name in ("loss", "dpo_loss", "sft_loss", "reward_chosen", "reward_margin", "pairs"):
        found, wanted = ([values[name] for values in steps(made)] for made in (shared, alone))
        near = 1e-5 * name.startswith("reward")  # rewards begin at 0, as differences of log-probabilities of about -50
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=near, err_msg=name)
    if (shape, reference) == ("fsdp2", "precomputed"):
        killed = shared.model_copy(update={"output": tmp_path / "killed"})
        assert -signal.SIGKILL in run(killed, processes=2, kill="step:4")
        run(killed, processes=2)
        assert [values["loss"] for values in steps(killed)] == [values["loss"] for values in steps(shared)]


def test_another_model_or_other_data_has_another_reference(recipe, pairs_file, tmp_path):
    made = recipe()
    first = build_trainer(made, load_model(made, ALONE), ALONE).loader.micro_batches.references
    changed = load_model(made, ALONE)
    with torch.no_grad():
        changed.decoder.norm.weight.mul_(1.5)
    second = build_trainer(made, changed, ALONE).loader.micro_batches.references
    other = tmp_path / "other.jsonl"
    other.write_text(pairs_file.read_text().replace("what is near?", "what is it?"))
    data = {"sources": [{"path": str(other), "images": str(pairs_file.parent)}]}
    third = build_trainer(recipe(data=data), load_model(made, ALONE), ALONE).loader.micro_batches.references
    assert len(list((made.output / "references").iterdir())) == 3
    assert (first != second).all()
    assert (first != third).all()


@pytest.fixture
def adapted():
    """Puts adapters on a model's decoder: in place, or by PEFT's own wrapper."""
    peft = pytest.importorskip("peft")

    def adapt(model, wrapped: bool, start_at_zero: bool = True):
        model.requires_grad_(False)
        config = peft.LoraConfig(
            r=4, target_modules=r"decoder\.layers.*(q_proj|v_proj)", init_lora_weights=start_at_zero, lora_dropout=0.0
        )
        torch.manual_seed(0)
        return peft.get_peft_model(model, config) if wrapped else peft.inject_adapter_in_model(config, model)

    return adapt


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_base_without_its_adapters(recipe, adapted, wrapped):
    made = recipe()
    model = load_model(made, ALONE)
    batch = Batch.from_prepared(next(build_trainer(made, model, ALONE).loader.steps(0)).micro_batches[0])
    with torch.no_grad():
        plain = model(batch, logits="none").losses
        tuned = adapted(model, wrapped, start_at_zero=False)
        assert not torch.allclose(tuned(batch, logits="none").losses, plain, rtol=1e-2)
        with adapters_off(tuned):
            assert all(parameter.requires_grad == ("lora_" in name) for name, parameter in tuned.named_parameters())
            assert torch.equal(tuned(batch, logits="none").losses, plain)
        assert not torch.allclose(tuned(batch, logits="none").losses, plain, rtol=1e-2)
    assert all(parameter.requires_grad == ("lora_" in name) for name, parameter in tuned.named_parameters())


def test_a_run_against_the_base_equals_one_against_precomputed(recipe, tmp_path):
    pytest.importorskip("peft")
    losses = []
    for reference in ("base", "precomputed"):
        made = recipe(
            {"reference": reference},
            lora={"rank": 4},
            trainable=[],
            epochs=4,
            optimizer={"learning_rate": 5e-3},
            output=str(tmp_path / reference),
        )
        model = load_model(made, ALONE)
        trainer = build_trainer(made, model, ALONE)
        tower_runs = []
        hook = model.vision_tower.register_forward_hook(lambda *_: tower_runs.append(1))  # noqa: B023
        trainer.run()
        hook.remove()
        losses.append([values["loss"] for values in steps(made)])
        assert len(tower_runs) == 8  # once a batch, also where the reference runs beside it
        assert losses[-1][-1] < 0.9 * losses[-1][0]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


def test_adapters_off_needs_adapters(recipe):
    pytest.importorskip("peft")
    made = recipe()
    with pytest.raises(RecipeError, match="needs a model with adapters"), adapters_off(load_model(made, ALONE)):
        pass


def test_the_base_allows_nothing_else_to_be_trained(recipe):
    pytest.importorskip("peft")
    made = recipe({"reference": "base"}, lora={"rank": 4}, trainable=["projector"])
    with pytest.raises(RecipeError, match="only adapters may be trained"):
        build_trainer(made, load_model(made, ALONE), ALONE)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"settings": {"beta": 0}}, "dpo.beta"),
        ({"settings": {"label_smoothing": 0.5}}, "dpo.label_smoothing"),
        ({"settings": {"refernce": "base"}}, "dpo.refernce"),
        ({"settings": {"reference": "base"}}, "give `lora`"),
        ({"data": {"batching": "grouped"}}, "batching: packed"),
        ({"data": {"label_mask": "original"}}, "label_mask: answers"),
        ({"data": {"too_long": "cut"}}, "too_long: drop"),
    ],
)
def test_recipes_that_cannot_be_run(recipe, changes, said):
    with pytest.raises(RecipeError, match=said):
        recipe(**changes)


def test_dpo_is_for_recipes_with_its_section(make_recipe, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(make_recipe().model_dump(mode="json")))
    done = CliRunner().invoke(app, ["dpo", str(path)])
    assert isinstance(done.exception, RecipeError)
    assert "run `llava-fast train`" in str(done.exception)


@pytest.mark.parametrize("command", ["train", "dpo"])
def test_the_command(recipe, tmp_path, command):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe().model_dump(mode="json")))
    done = CliRunner().invoke(app, [command, str(path), "--set", "steps=1"])
    assert done.exit_code == 0, done.output
    assert f"the trained model is in {tmp_path / 'run' / 'model'}" in done.output


def test_a_bad_pair_is_named_before_anything_runs(recipe, pairs_file, tmp_path):
    lines = pairs_file.read_text().splitlines()
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join([*lines, json.dumps({"id": "odd", "prompt": "what?", "chosen": "a", "rejected": "a"})]))
    made = recipe(data={"sources": [{"path": str(bad), "images": str(pairs_file.parent)}]})
    with pytest.raises(DataError, match=r"bad.jsonl\[12\] \(id odd\): its two answers are the same"):
        train(made)


def test_long_pairs_are_left_out(recipe, caplog):
    made = recipe()
    loader = build_trainer(made, load_model(made, ALONE), ALONE).loader
    limit = int(loader.lengths.text[loader.lengths.visual == 0].max())  # no pair with an image fits
    made = recipe(data={"max_length": limit})
    with caplog.at_level("INFO"):
        loader = build_trainer(made, load_model(made, ALONE), ALONE).loader
    assert "12 samples: 3 to train on" in caplog.text
    assert f"9 left out as longer than {limit} rows" in caplog.text
    assert len(loader.schedule.order(0)) == 3
    assert np.isnan(loader.micro_batches.references[:, 0]).sum() == 9
