"""KTO: its loss computed by hand, its data, and runs that do not depend on how they are parallelised."""

import dataclasses
import functools
import json
import math
import signal

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

import llava_fast
from llava_fast.cli.main import app
from llava_fast.errors import DataError, RecipeError
from llava_fast.models.batch import Batch
from llava_fast.train.data.labelled import LabelledBatches, mismatched, read_labelled
from llava_fast.train.data.samples import Source
from llava_fast.train.data.schedule import Schedule
from llava_fast.train.estimate.cost import plan
from llava_fast.train.objectives.kto import kto_losses
from llava_fast.train.objectives.reference import answer_log_probs
from llava_fast.train.run import build_trainer, load_model, train
from tests.support.training_runs import ALONE, SHAPES, break_off, losses, objective_recipes, steps, write_picture

GOOD = ["a red cup", "two green cups near a table", "the red box says hello"]
BAD = ["nothing", "hello hello hello", "a table says nothing at all"]
QUESTIONS = ["what is near?", "what is it?", "what is on the table?", "is it red?"]


@pytest.fixture(scope="module")
def answers_file(tmp_path_factory):
    """10 labelled answers, of which 6 are desirable, some with an image, and a preference pair."""
    folder = tmp_path_factory.mktemp("labelled")
    rng = np.random.default_rng(0)
    lines = []
    for number in range(10):
        label = number % 5 < 3
        sample = {"id": f"sample-{number}", "prompt": QUESTIONS[number % 4], "label": label}
        sample["completion"] = (GOOD if label else BAD)[number % 3]
        if number % 3:
            sample["image"] = write_picture(folder, rng, number)
        lines.append(sample)
    lines.append({"id": "sample-10", "prompt": "which one?", "chosen": GOOD[0], "rejected": BAD[0]})
    (folder / "answers.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "answers.jsonl"


@pytest.fixture
def recipe(make_recipe, answers_file):
    """Recipes over the answers; `settings` are those of `kto`."""

    return objective_recipes(make_recipe, "kto", answers_file)


def by_hand(ratios, kl, desirable, beta, lambda_d, lambda_u) -> tuple[list[float], list[float]]:
    """Losses and their derivatives by the log-ratios, as the paper's equation 8 has them (float64).

    With s(x) = 1 / (1 + exp(-x)) the value of an answer is v = lambda_D s(beta (r - z)) or lambda_U s(beta (z - r)),
    and its loss lambda - v. As s' = s (1 - s), its derivative by r is -lambda_D beta s (1 - s) or
    +lambda_U beta s (1 - s).
    """
    found, slopes = [], []
    for ratio, good in zip(ratios, desirable, strict=True):
        weight, sign = (lambda_d, 1.0) if good else (lambda_u, -1.0)
        value = 1 / (1 + math.exp(-beta * sign * (ratio - kl)))
        found.append(weight - weight * value)
        slopes.append(-sign * weight * beta * value * (1 - value))
    return found, slopes


@pytest.mark.parametrize("kl", [0.0, 1.75])
def test_the_loss_and_its_slope_by_hand(kl):
    ratios, desirable = [-7.0, -0.5, 0.0, 0.3, 4.0, 30.0], [True, False, True, False, True, False]
    expected, slopes = by_hand(ratios, kl, desirable, 0.3, 1.5, 0.75)
    given = torch.tensor(ratios, dtype=torch.float64, requires_grad=True)
    found = kto_losses(given, torch.tensor(kl), torch.tensor(desirable), 0.3, (0.75, 1.5))
    np.testing.assert_allclose(found.detach(), expected, rtol=1e-12)
    found.sum().backward()
    np.testing.assert_allclose(given.grad, slopes, rtol=1e-12)


def whole_sequences(trainer, settings) -> tuple[float, float, dict]:
    """Loss, reference point and gradients of step 1 from each answer as an ordinary sequence; the reference is the
    checkpoint. All beyond the models' float32 losses is float64."""
    model, batches = trainer.bare, trainer.loader.micro_batches
    reference = llava_fast.load(trainer.recipe.model, chat_template="vicuna_v1")
    table, numbers = batches.table, [int(number) for number in trainer.loader.schedule.samples(0)]

    def ratio(number: int, answer_of: int) -> torch.Tensor:
        request, other = table[number].request, table[answer_of].request
        batch = model.prepare(
            [{**request, "messages": [*request["messages"][:-1], other["messages"][-1]]}], labels=True
        )
        with torch.no_grad():
            base = reference(batch, logits="none").losses.double().sum()
        return base - model(batch, logits="none").losses.double().sum()

    with torch.no_grad():
        mean = sum(float(ratio(number, int(batches.others[number]))) for number in numbers) / len(numbers)
    own = [ratio(number, number) for number in numbers]
    labels = [table.desirable(number) for number in numbers]
    weights = settings["desirable_weight"], settings["undesirable_weight"]
    expected, slopes = by_hand(
        [float(each.detach()) for each in own], max(mean, 0.0), labels, settings["beta"], *weights
    )
    model.zero_grad()
    sum(each * slope for each, slope in zip(own, slopes, strict=True)).div(len(own)).backward()
    gradients = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    return sum(expected) / len(expected), mean, gradients


@pytest.mark.parametrize(("rows", "recompute", "push"), [(1, "layers", 1), (100000, "none", 1), (100000, "none", -1)])
def test_a_step_is_that_of_ordinary_sequences(recipe, rows, recompute, push):
    settings = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.75}
    made = recipe(settings, micro_batch_rows=rows, recompute=recompute, optimizer={"clip": None})
    trainer = build_trainer(made, load_model(made, ALONE), ALONE)
    mean = 0.0
    for seed in range(20):  # a model whose mean log-ratio of mismatched answers has the sign that is asked for
        generator = torch.Generator().manual_seed(seed)
        trainer.bare.load_state_dict(load_model(made, ALONE).state_dict())
        with torch.no_grad():
            for parameter in trainer.trained:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
        expected, mean, gradients = whole_sequences(trainer, settings)
        if mean * push > 0:
            break
    assert mean * push > 0
    found: dict = {}
    trainer.optimizer.zero_grad()
    trainer.optimizer.register_step_pre_hook(
        lambda *_: found.update({n: p.grad.clone() for n, p in trainer.bare.named_parameters() if p.grad is not None})
    )
    values = trainer.step(next(trainer.loader.steps(0)))
    assert values["answers"] == 6
    assert values["kl"] == pytest.approx(mean, rel=1e-3)  # a difference of log-probabilities of about -50 in float32
    assert values["loss"] == pytest.approx(expected, rel=1e-5)
    assert found.keys() == gradients.keys()
    assert len(found) > 20
    for name, wanted in gradients.items():
        assert float((found[name] - wanted).abs().max()) <= 2e-4 * float(wanted.abs().max()), name


def test_learns_the_labels(recipe):
    made = recipe(epochs=5, micro_batch_rows=4000, recompute="none", optimizer={"learning_rate": 2e-3})
    path = train(made)
    found = steps(made)
    assert found[0]["loss"] == pytest.approx(0.5, abs=1e-3)  # the model is its own reference
    assert found[0]["kl"] == pytest.approx(0, abs=1e-3)
    assert found[-1]["loss"] < 0.45
    assert found[-1]["reward_desirable"] > found[-1]["reward_undesirable"] + 0.3
    assert {"desirable", "answers"} <= found[0].keys()
    assert "supervised_tokens" not in found[0]
    table = read_labelled(made.data.sources)
    before, after = (llava_fast.load(each, chat_template="vicuna_v1") for each in (made.model, path))
    moved = {True: [], False: []}
    with torch.no_grad():
        for number in range(len(table)):
            batch = before.prepare([table[number].request], labels=True)
            told = [float(model(batch, logits="none").losses.sum()) for model in (before, after)]
            moved[table.desirable(number)].append(told[0] - told[1])
    assert np.mean(moved[True]) > 0 > np.mean(moved[False])


def test_a_killed_run_goes_on_bit_for_bit(recipe, tmp_path):
    whole = recipe(epochs=2, checkpoints={"every": 2}, recompute="none", output=str(tmp_path / "whole"))
    train(whole)
    killed = whole.model_copy(update={"output": tmp_path / "killed"})
    break_off(killed, 3)
    (kept,) = (killed.output / "references").iterdir()
    train(killed)
    assert list((killed.output / "references").iterdir()) == [kept]
    for name in ("loss", "kl", "reward_desirable"):
        assert [values[name] for values in steps(killed)] == [values[name] for values in steps(whole)]


@pytest.fixture(scope="module")
def uneven(recipe_in, answers_file, tmp_path_factory):
    """Recipes of 3 steps that leave one of two processes with fewer answers, or none; by reference, after a run
    alone."""

    def make(reference: str):
        alone = recipe_in(
            tmp_path_factory.mktemp(reference) / "alone",
            kto={"beta": 0.3, "reference": reference},
            data={"sources": [{"path": str(answers_file)}]},
            batch_size=3,
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
    [("ddp", "precomputed"), ("fsdp2", "precomputed"), ("fsdp2", "base")],
)
def test_two_processes_give_the_losses_of_one(uneven, run, tmp_path, shape, reference):
    pytest.importorskip("peft")
    alone = uneven(reference)
    parallel = alone.parallel.model_copy(update=SHAPES[shape])
    shared = alone.model_copy(update={"output": tmp_path / "shared", "parallel": parallel})
    run(shared, processes=2)
    for name in ("loss", "kl", "reward_desirable", "reward_undesirable", "answers"):
        found, wanted = ([values[name] for values in steps(made)] for made in (shared, alone))
        near = 1e-4 * (name == "kl") + 2e-5 * name.startswith("reward")  # differences of log-probabilities of about -50
        missing = [value is None for value in wanted]
        assert missing == [value is None for value in found]
        pairs = [(a, b) for a, b in zip(found, wanted, strict=True) if b is not None]
        np.testing.assert_allclose(*zip(*pairs, strict=True), rtol=1e-4, atol=near, err_msg=name)
    if (shape, reference) == ("fsdp2", "precomputed"):
        killed = shared.model_copy(update={"output": tmp_path / "killed"})
        assert -signal.SIGKILL in run(killed, processes=2, kill="step:4")
        run(killed, processes=2)
        assert losses(killed) == losses(shared)


def test_a_run_against_the_base_equals_one_against_precomputed(recipe, tmp_path):
    pytest.importorskip("peft")
    found = []
    for reference in ("base", "precomputed"):
        made = recipe(
            {"reference": reference},
            lora={"rank": 4},
            trainable=[],
            epochs=2,
            optimizer={"learning_rate": 5e-3},
            output=str(tmp_path / reference),
        )
        train(made)
        found.append(losses(made))
        assert found[-1][-1] < found[-1][0]
    np.testing.assert_allclose(*found, rtol=1e-4)


def test_a_bad_answer_is_left_out(recipe, answers_file, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for file in answers_file.parent.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    picture = folder / "4.png"
    picture.write_bytes(picture.read_bytes()[:-400])  # its header is sound
    sources = [{"path": str(folder / "answers.jsonl")}]
    lora = {"lora": {"rank": 2, "alpha": 4}, "trainable": []}
    for reference in ("precomputed", "base"):
        made = recipe(
            {"reference": reference},
            data={"sources": sources, "on_problem": "skip"},
            epochs=2,
            micro_batch_rows=1,
            output=str(tmp_path / reference),
            **lora,
        )
        train(made)
        found = steps(made)
        assert sum(values["left_out"] for values in found) == 2
        assert sum(values["answers"] for values in found) == 2 * 11
        assert np.isfinite(losses(made)).all()


# ---------------------------------------------------------------- data


@pytest.fixture
def table(tmp_path):
    def read(*lines):
        (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
        return read_labelled([Source(path=str(tmp_path / "data.jsonl"))])

    return read


SAMPLE = {"id": "s", "prompt": "what is it?", "completion": "a red cup", "label": True}


def test_forms(table):
    turns = [{"from": "human", "value": "what is it?"}, {"from": "gpt", "value": "a red cup"}]
    openai = [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "a red cup"}]
    found = table(
        SAMPLE,
        {"conversations": turns, "label": False},
        {"messages": openai, "label": True},
        SAMPLE | {"completion": [{"role": "assistant", "content": "a red cup"}]},
        {"id": "p", "prompt": "what is it?", "chosen": "a red cup", "rejected": "a red cup!"},
        {"id": "p", "prompt": "what is it?", "answer": "a red cup", "rejected": "a red cup!"},
    )
    said = [[message["content"] for message in sample.request["messages"]] for sample in found]
    assert said == [["what is it?", text] for text in ["a red cup"] * 5 + ["a red cup!", "a red cup", "a red cup!"]]
    assert [found.desirable(number) for number in range(8)] == [True, False, True, True, True, False, True, False]
    assert found.name(5) == "data.jsonl[4] (id p)"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"label": None}, "it needs a label: true"),
        ({"label": "yes"}, "it needs a label: true"),
        ({"label": 1}, "it needs a label: true"),
        ({"completion": None}, "no text under 'completion'"),
        ({"prompt": None}, "no prompt"),
        ({"conversations": [{"from": "human", "value": "what?"}]}, "end with the labelled answer"),
        ({"label": None, "rejected": "a red cup", "chosen": "a red cup"}, "two answers are the same"),
        ({"label": None, "rejected": "a red cup"}, "no text under 'answer'"),
    ],
)
def test_what_is_wrong_is_said_by_name(table, change, said):
    with pytest.raises(DataError, match=said) as raised:
        table(SAMPLE | change)[0]
    assert str(raised.value).startswith("data.jsonl[0] (id s): ")


def test_mismatched_answers_are_those_of_the_step_to_other_questions(table):
    asked = ["a", "b", "b", "c", "d", "d", "e"]
    found = table(*(SAMPLE | {"id": str(i), "prompt": text} for i, text in enumerate(asked)))
    order = np.array([0, 1, 2, 3, 4, 5])  # steps {0, 1, 2}, {3, 4}, and of the next epoch the same
    schedule = Schedule(lambda epoch: order if epoch else order[:5], 3, 2, 4)
    assert mismatched(found, schedule).tolist() == [1, 0, 0, 4, 3, 3, -1]
    lonely = Schedule(lambda epoch: np.array([0, 1, 4, 5]), 2, 2, 2)
    assert mismatched(found, lonely).tolist() == [1, 0, -1, -1, 0, 0, -1]
    with pytest.raises(DataError, match="all samples have the same question"):
        mismatched(found, Schedule(lambda epoch: np.array([1, 2]), 2, 1, 1))


def test_a_pair_is_never_compared_with_its_other_half(table):
    pairs = [{"prompt": text, "chosen": "a red cup", "rejected": "nothing"} for text in ("a", "b")]
    found = mismatched(table(*pairs), Schedule(lambda epoch: np.arange(4), 4, 1, 1))
    assert found.tolist() == [2, 2, 0, 0]


def test_a_mismatched_answer_follows_the_question_and_is_cut_to_fit(table, tiny_next):
    model = llava_fast.load(tiny_next, chat_template="vicuna_v1")
    found = table(SAMPLE, SAMPLE | {"prompt": "where?", "completion": "two green cups near a table", "label": False})
    others = np.array([1, 0])
    prepared = LabelledBatches(found, model.processor, others)[[0, 1]].prepared
    assert prepared.plan.column("desirable").tolist() == [1, 0]
    with torch.no_grad():
        batch = Batch.from_prepared(prepared)
        log_probs, _ = answer_log_probs(model(batch, logits="none").losses, prepared.plan)
        for number, other in enumerate(others):
            request, last = found[number].request, found[int(other)].request["messages"][-1]
            swapped = {**request, "messages": [*request["messages"][:-1], last]}
            for which, each in enumerate((request, swapped)):
                alone = model(model.prepare([each], labels=True), logits="none").losses
                torch.testing.assert_close(log_probs[number, which], -alone.sum(), rtol=1e-5, atol=1e-5)
    own, wrong = prepared.plan.branches[0]
    assert wrong > own
    tight = dataclasses.replace(model.processor, max_rows=prepared.plan.lengths[0] - wrong)  # its own answer just fits
    plan_of = LabelledBatches(found, tight, others)[[0]].prepared.plan
    assert plan_of.branches == ((own, own),)


# ---------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"settings": {"beta": 0}}, "kto.beta"),
        ({"settings": {"desirable_weight": -1}}, "kto.desirable_weight"),
        ({"settings": {"desirable_weight": 0, "undesirable_weight": 0}}, "both 0"),
        ({"settings": {"reference": "base"}}, "`kto.reference: base` .* give `lora`"),
        ({"settings": {"lambda": 1}}, "kto.lambda"),
        ({"batch_size": 1}, "batch_size >= 2"),
        ({"data": {"batching": "grouped"}}, "`kto` needs data.batching: packed"),
        ({"dpo": {}}, "one objective, but the recipe has 'dpo' and 'kto'"),
    ],
)
def test_recipes_that_cannot_be_run(recipe, changes, said):
    with pytest.raises(RecipeError, match=said):
        recipe(**changes)


def test_the_command(recipe, tmp_path, caplog):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe().model_dump(mode="json")))
    with caplog.at_level("INFO"):
        done = CliRunner().invoke(app, ["train", str(path), "--set", "steps=1"])
    assert done.exit_code == 0, done.output
    assert (
        "7 desirable and 5 undesirable answers: the ratio of their weights times their numbers is 1.40" in caplog.text
    )


def test_the_estimate_knows_its_passes(recipe):
    ordinary, kto, base = (
        {figure.what: figure.value for figure in plan(made, 1, rows=100, tiles=1).sections["Time"]}
        for made in (
            recipe(lora={"rank": 4}, trainable=[]).model_copy(update={"kto": None}),
            recipe(lora={"rank": 4}, trainable=[]),
            recipe({"reference": "base"}, lora={"rank": 4}, trainable=[]),
        )
    )
    assert "without gradients" not in ordinary
    assert "the reference" not in base
    assert kto["without gradients"] == kto["forward pass of a sample"]
    assert base["without gradients"] == 2 * base["forward pass of a sample"]
    assert kto["the reference"] > 0
