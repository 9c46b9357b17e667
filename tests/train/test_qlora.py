"""Adapters over quantised weights: what they train, and the exports over the base in floating point."""

import json

import pytest
import torch

import llava_fast
from llava_fast import Quantisation
from llava_fast.checkpoints.save import Deferred
from llava_fast.errors import RecipeError
from llava_fast.models.quantised import Quantised, QuantisedLinear, is_quantised
from llava_fast.train import run as training
from llava_fast.train.estimate.cost import config_of, count_parameters, plan
from llava_fast.train.lora import _merge_later
from llava_fast.train.parallel import World
from llava_fast.train.run import load_model, train
from tests.support.training_runs import break_off, losses

pytest.importorskip("peft")

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture
def recipe(make_recipe):
    """Recipes with int8 or int4 weights under adapters of rank 4, beside a trained projector."""

    def make(**changes):
        optimizer = {"learning_rate": 1e-2, "rates": {"projector": 2e-3}}
        lora = {"rank": 4, "alpha": 8}
        return make_recipe(
            **{"quantize": "int8", "lora": lora, "trainable": ["projector"], "optimizer": optimizer} | changes
        )

    return make


def test_what_is_trained(recipe):
    model = load_model(recipe(precision="bfloat16"), ALONE)
    adapted = [m for name, m in model.named_modules() if name.endswith("q_proj.base_layer")]
    assert adapted
    assert all(type(module) is QuantisedLinear and module.dtype == torch.bfloat16 for module in adapted)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name.startswith(("projector.", "image_newline")) for name in trained)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert sum("lora_" in name for name in trained) == 2 * 7 * model.config.decoder.num_layers


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_learns_and_exports_the_adapter_and_a_dense_model(recipe, scheme):
    made = recipe(quantize=scheme, epochs=4)
    path = train(made)
    found = losses(made)
    assert found[-1] < 0.8 * found[0]
    merged = llava_fast.load(path, chat_template="vicuna_v1")
    assert not is_quantised(merged)
    assert "quantization_config" not in json.loads((path / "config.json").read_text())

    base = llava_fast.load(made.model, quantize=scheme, merge=False)
    factors = llava_fast.load(made.output / "adapter", model_base=made.model, chat_template="vicuna_v1")
    for name, module in base.named_modules():
        if isinstance(module, Quantised):
            adapter = factors.get_submodule(name).weight - llava_fast.load(made.model).get_submodule(name).weight
            torch.testing.assert_close(merged.get_submodule(name).weight, module.dense() + adapter, rtol=0, atol=1e-5)


def test_goes_on_where_it_broke_off(recipe, tmp_path):
    whole = recipe(epochs=2, checkpoints={"every": 1})
    train(whole)
    broken = recipe(epochs=2, checkpoints={"every": 1}, output=str(tmp_path / "again"))
    break_off(broken, 2)
    train(broken)
    assert losses(broken) == losses(whole)


@pytest.mark.parametrize(
    "rounding", [Quantisation("int8", head=None), Quantisation("int4", 64, symmetric=False)], ids=str
)
def test_a_plan_counts_the_bytes_of_a_quantised_checkpoint(recipe, tmp_path, rounding):
    llava_fast.save(llava_fast.load(recipe().model, quantize=rounding), tmp_path / "q")
    made = recipe(model=str(tmp_path / "q"), quantize=None)
    counts = count_parameters(config_of(made.model), made)
    kept = [module for module in llava_fast.load(made.model).modules() if isinstance(module, Quantised)]
    assert counts.quantised_bytes == sum(each.nbytes for module in kept for each in module.buffers())
    assert counts.scheme == rounding.scheme


def test_a_quantised_checkpoint_is_trained_as_it_is(recipe, tmp_path):
    dense = recipe()
    llava_fast.save(llava_fast.load(dense.model, quantize="int8"), tmp_path / "q")
    made = recipe(model=str(tmp_path / "q"), quantize=None)
    train(made)
    assert losses(made)
    with pytest.raises(RecipeError, match="'decoder' names weights that are quantised in the checkpoint"):
        load_model(recipe(model=str(tmp_path / "q"), quantize=None, lora=None, trainable=["decoder"]), ALONE)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training, "is_sharded", lambda recipe, world: True)
        with pytest.raises(RecipeError, match="a quantised model does not support sharding: use ddp"):
            load_model(made, ALONE)


def test_biases_alone_are_not_trained(recipe, tmp_path):
    """Of a quantised projector or of some layers of the decoder."""
    dense = recipe()
    llava_fast.save(llava_fast.load(dense.model, quantize=Quantisation("int8", projector="int8")), tmp_path / "q")
    for pattern in ("projector", "decoder.layers.*"):
        with pytest.raises(RecipeError, match="names weights that are quantised in the checkpoint"):
            load_model(recipe(model=str(tmp_path / "q"), quantize=None, trainable=[pattern]), ALONE)


def test_a_weight_is_merged_where_its_factors_lie():
    """Weights are made on their module's device, factors are gathered on the host."""
    made = []

    class Weight(torch.Tensor):
        def to(self, *args, **kwargs):
            made.append(args)
            return torch.zeros(4, 4)

    later = Deferred(torch.zeros(4, 4), lambda: torch.zeros(4, 4).as_subclass(Weight))
    _merge_later(later, torch.ones(2, 4), torch.ones(4, 2), 1.0)
    assert made == [(torch.device("cpu"),)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": None, "trainable": ["decoder"]}, "`quantize` freezes the decoder's weights"),
        ({"parallel": {"kind": "fsdp2"}}, "`quantize` does not support sharding: use `parallel.kind: ddp`"),
        ({"quantize": "nf4"}, "quantize: Input should be 'int8' or 'int4'"),
    ],
)
def test_what_does_not_go_together(recipe, changes, message):
    with pytest.raises(RecipeError, match=message):
        recipe(**changes)


def test_the_plan_counts_quantised_weights(recipe):
    made = recipe(precision="bfloat16")
    whole = plan(recipe(quantize=None, precision="bfloat16"), 1, samples=10).sections["Memory of each of 1 GPUs"]
    small = plan(made, 1, samples=10).sections["Memory of each of 1 GPUs"]
    quantised = next(figure for figure in small if figure.what == "quantised weights")
    model = load_model(made, ALONE)
    assert quantised.value == sum(m.quantised.nbytes for m in model.modules() if isinstance(m, Quantised))
    frozen = [next(f.value for f in figures if f.what == "frozen weights") for figures in (whole, small)]
    values = sum(m.codes.numel() for m in model.modules() if isinstance(m, Quantised))
    assert frozen[0] - frozen[1] == 2 * values
