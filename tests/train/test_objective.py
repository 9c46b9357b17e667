"""The trainer with objectives that it does not know: what a new file in objectives/ can rely on."""

import shutil

import numpy as np
import pytest
import torch

import llava_fast
from llava_fast.models.fused import MergedLinear
from llava_fast.train.metrics import FILE, read_metrics
from llava_fast.train.objective import Means, Objective, forward
from llava_fast.train.objectives.sft import Sft
from llava_fast.train.optim import freeze
from llava_fast.train.parallel import World
from llava_fast.train.recipe import Recipe
from llava_fast.train.run import build_loader, build_trainer, load_model, train
from llava_fast.train.trainer import Trainer
from tests.support.training_runs import losses

ALONE = World(0, 1, torch.device("cpu"))


class Turns(Objective):
    """A mean over sequences whose kind alternates: the negative log-likelihood, or the square of its distance from a
    level that slowly follows the step's mean. It needs the whole step before any gradient, and its level in a
    checkpoint."""

    unit = "sequences"
    figures = ("likelihood",)
    stops_at_spikes = False

    def start(self, model, world):
        super().start(model, world)
        self.level = torch.zeros(())

    def begin(self, step):
        super().begin(step)
        self.squared = step % 2 == 1

    def count(self, plan):
        return len(plan.lengths)

    def survey(self, model, batches, count):
        with torch.no_grad():
            total = sum(self._sums(model, batch).sum() for batch in batches)
        self.level = 0.5 * self.level + 0.5 * total / count

    def losses(self, model, batch):
        sums = self._sums(model, batch)
        self.means.add(likelihood=-sums)
        return (sums - self.level) ** 2 if self.squared else sums

    def _sums(self, model, batch):
        rows = forward(model, batch, self.recipe.precision)[0]
        owner = torch.from_numpy(batch.plan.column("sequence")[batch.plan.column("supervised_row")].astype(np.int64))
        return torch.zeros(len(batch.plan.lengths)).index_add(0, owner, rows)

    def state(self):
        return {"level": float(self.level)}

    def load_state(self, state):
        self.level = torch.tensor(state["level"])


def trainer_of(recipe: Recipe) -> Trainer:
    model, objective = load_model(recipe, ALONE), Turns(recipe)
    return Trainer(recipe, model, build_loader(recipe, model, ALONE, objective), ALONE, objective)


def test_an_objective_of_its_own(make_recipe, tmp_path):
    """Its losses do not depend on micro-batches."""
    changes = {"batch_size": 5, "steps": 2, "recompute": "none"}
    whole = make_recipe(micro_batch_rows=100000, output=str(tmp_path / "whole"), **changes)
    small = make_recipe(micro_batch_rows=1, output=str(tmp_path / "small"), **changes)
    for recipe in (whole, small):
        recipe.output.mkdir()
        trainer_of(recipe).run()
    np.testing.assert_allclose(losses(whole), losses(small), rtol=1e-4)
    steps = read_metrics(small.output / FILE)
    assert all(step["likelihood"] < 0 and step["sequences"] == 5 for step in steps)
    assert steps[0]["loss"] == pytest.approx(-steps[0]["likelihood"], rel=1e-5)


def test_it_goes_on_with_its_state(make_recipe):
    """Bit for bit; without its state the losses are others."""
    recipe = make_recipe(batch_size=4, steps=3, recompute="none", checkpoints={"every": 1, "keep": 9})
    recipe.output.mkdir()
    trainer_of(recipe).run()
    whole = losses(recipe)
    for forgets in (False, True):
        for step in (2, 3):
            shutil.rmtree(recipe.output / "checkpoints" / f"step-{step:06d}")
        trainer = trainer_of(recipe)
        if forgets:
            trainer.objective.load_state = lambda state: None
        trainer.run()
        assert (losses(recipe) == whole) != forgets


def test_an_ordinary_checkpoint_holds_nothing_of_an_objective(make_recipe):
    recipe = make_recipe()
    trainer = build_trainer(recipe, load_model(recipe, ALONE), ALONE)
    assert isinstance(trainer.objective, Sft)
    assert trainer.state(0).keys() == {"model", "optimizer", "schedule", "run"}


def test_sections_name_objectives(make_recipe):
    assert Recipe.objective_fields() == ["dpo", "kto", "stage_one"]
    assert [type(make_recipe(**section).objective()).__name__ for section in ({}, {"dpo": {}}, {"kto": {}})] == [
        "Sft",
        "DpoObjective",
        "KtoObjective",
    ]


def test_means():
    means = Means(["a", "b"], ALONE)
    means.add(a=torch.tensor([1.0, 2.0]))
    means.add(a=torch.tensor([6.0]), b=torch.zeros(0))
    assert means.take() == {"a": 3.0, "b": None}
    means.clear()
    assert means.take() == {"a": None, "b": None}


def test_merged_linears_are_taken_apart(make_recipe, tmp_path):
    """A model that was loaded to answer has one weight for several Linears; it is trained as any other."""
    plain, merged = (make_recipe(steps=2, output=str(tmp_path / name)) for name in ("plain", "merged"))
    train(plain)
    model = llava_fast.load(merged.model, device="cpu", chat_template=merged.data.template, merge=True)
    freeze(model, merged)
    assert any(isinstance(module, MergedLinear) for module in model.modules())
    merged.output.mkdir()
    trainer = build_trainer(merged, model.train(), ALONE)
    assert not any(isinstance(module, MergedLinear) for module in trainer.model.modules())
    trainer.run()
    np.testing.assert_allclose(losses(merged), losses(plain), rtol=1e-6)  # gradients' norm in another order
    trained = dict(load_model(plain, ALONE).named_parameters())
    found = dict(trainer.bare.named_parameters())
    assert {name for name, each in found.items() if each.requires_grad} == {
        name for name, each in trained.items() if each.requires_grad
    }
