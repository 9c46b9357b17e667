"""Cost estimates: FLOPs against PyTorch's counter, and figures computed by hand."""

import copy
import dataclasses
import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from llava_fast.cli.main import app
from llava_fast.errors import RecipeError
from llava_fast.models.batch import Batch
from llava_fast.models.connectors.mlp import ProjectorConfig
from llava_fast.train.estimate import cost
from llava_fast.train.estimate.cost import config_of, count_parameters, plan
from llava_fast.train.estimate.flops import GPUS, Utilisation, forward_flops, known_gpu, peak_flops, step_flops
from llava_fast.train.optim import freeze
from llava_fast.train.parallel import World
from llava_fast.train.recipe import load_recipe
from llava_fast.train.run import build_loader, load_model
from llava_fast.train.trainer import Trainer
from tests.support import tiny


def request(number, answer):
    return {
        "messages": [{"role": "user", "content": "<image>\nhello"}, {"role": "assistant", "content": answer}],
        "images": [tiny.picture(50 + number, 90)],
    }


@pytest.mark.parametrize(
    "trained",
    [
        ["projector"],
        ["decoder"],
        ["projector", "decoder"],
        ["vision_tower", "projector", "decoder"],
        ["vision_tower"],
    ],
)
def test_operations_are_those_of_the_layers_that_run(make_recipe, trained):
    """All products with weights, forward and backward, from the shapes that each Linear is called with and from what
    requires gradients."""
    model = copy.deepcopy(tiny.pair("next").ours)
    freeze(model, make_recipe(trainable=trained))
    batch = model.prepare([request(0, "a box"), request(3, "two green cups")], labels=True)
    inner = count_linears(model, batch)
    lengths, tiles = batch.plan.lengths, batch.plan.tiles
    projected = len(batch.plan.column("kept"))
    supervised = len(batch.plan.column("supervised_row"))
    ours = step_flops(model.config, lengths, tiles, trained, supervised, projected)
    # attention, head and patch embedding are no Linears: the next test has them
    forward = forward_flops(model.config, lengths, tiles, supervised, projected)
    tower, decoder = "vision_tower" in trained, "decoder" in trained
    ours -= forward.tower_attention * (1 + 2 * tower) + forward.decoder_attention * 3
    ours -= forward.head * (2 + decoder)
    vision = model.config.vision
    ours -= 2 * tiles * vision.patches_per_tile * 3 * vision.patch_size**2 * vision.hidden_size * (1 + 2 * tower)
    assert ours == pytest.approx(inner, rel=1e-9)


def count_linears(model, batch) -> float:
    """Operations of all Linears, forward and backward, from the shapes that each is called with."""
    total = 0

    def add(module, inputs, output):
        nonlocal total
        rows = inputs[0].numel() // module.in_features
        each = 2 * rows * module.in_features * module.out_features
        times = 1 + output.requires_grad * inputs[0].requires_grad + module.weight.requires_grad
        total += each * times

    linears = [each for name, each in model.named_modules() if type(each) is torch.nn.Linear and "lm_head" not in name]
    hooks = [module.register_forward_hook(add) for module in linears]
    try:
        model(batch, logits="none")
    finally:
        for hook in hooks:
            hook.remove()
    return total


def test_attention_and_head_by_hand():
    config = tiny.pair("next_mistral_window").ours.config  # 4 heads of 24, 3 layers, a window of 48
    forward = forward_flops(config, [100, 3], tiles=2, supervised=5)
    seen = sum(min(row + 1, 48) for row in range(100)) + 1 + 2 + 3
    assert forward.decoder_attention == 3 * seen * 4 * 4 * 24
    assert forward.head == 2 * 5 * config.decoder.vocab_size * 64
    rows = config.vision.patches_per_tile + 1
    assert forward.tower_attention == 2 * rows**2 * 4 * 32 * config.vision.layers_needed
    decoder = step_flops(config, [100, 3], 0, ["decoder"], supervised=5)
    both = (forward.decoder + forward.head) * 3 + forward.decoder_attention * 3
    assert decoder == both
    adapted = step_flops(config, [100, 3], 0, [], supervised=5, adapters=1000)
    assert adapted == (forward.decoder + forward.head) * 2 + forward.decoder_attention * 3 + 6 * 103 * 1000


def test_a_decoder_of_7b_by_the_usual_rule():
    """6 operations per weight and row, and attention's."""
    config = config_of(load_recipe("llava-1.5-stage2").model)
    decoder = 6.74e9 - 32000 * 4096  # the embedding is looked up, not multiplied
    assert step_flops(config, [1000] * 8, 0, ["decoder"]) == pytest.approx(6 * 8000 * decoder, rel=0.03)


@pytest.mark.parametrize("name", json.loads(cost.KNOWN_DECODERS.read_text()))
def test_known_decoders_have_the_parameters_of_their_names(name):
    recipe = load_recipe("llava-1.5-stage2", [f"model.decoder=somewhere/{name}"])
    found = count_parameters(config_of(recipe.model), recipe).all["decoder"]
    sizes = {"7b": 6.74e9, "13b": 13.02e9, "8B": 8.03e9, "Mistral": 7.24e9, "Qwen2": 7.62e9}
    wanted = next(size for part, size in reversed(sizes.items()) if part in name)
    assert found == pytest.approx(wanted, rel=1e-3)
    with torch.device("meta"):  # and transformers makes as many of the same fields
        fields = json.loads(cost.KNOWN_DECODERS.read_text())[name]
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    assert found == sum(parameter.numel() for parameter in model.parameters())


def test_parameters_of_a_recipe(make_recipe):
    recipe = make_recipe(trainable=["projector"], lora={"rank": 8})
    model = tiny.pair("next").ours
    counts = count_parameters(config_of(recipe.model), recipe)
    assert sum(counts.all.values()) == sum(parameter.numel() for parameter in model.parameters())
    assert counts.trained == {"vision_tower": 0, "projector": counts.all["projector"], "decoder": 0}
    layer = 4 * (64 + 64) + 2 * (64 + 128) + (128 + 64)
    assert counts.adapters == 3 * 8 * layer


def figures(made, section):
    return {each.what: each.value for each in made.sections[section]}


def test_sharding_divides_what_is_trained_and_replicas_do_not():
    recipe = load_recipe("llava-1.5-stage2")
    trained, tower = 6.7384e9 + 20.98e6, 303.5e6
    eight = figures(plan(recipe, 8), "Memory of each of 8 GPUs")
    assert eight["weights, sharded"] == pytest.approx(trained * 4 / 8, rel=1e-3)
    assert (eight["gradients"], eight["AdamW"]) == pytest.approx((trained * 4 / 8, trained), rel=1e-3)
    assert eight["frozen tower"] == pytest.approx(tower * 2, rel=1e-3)
    ddp = figures(plan(load_recipe("llava-1.5-stage2", ["parallel.kind=ddp"]), 8), "Memory of each of 8 GPUs")
    assert ddp["AdamW"] == pytest.approx(trained * 8, rel=1e-3)
    small = load_recipe("llava-1.5-stage2", ["optimizer.states=8bit"])
    assert figures(plan(small, 8), "Memory of each of 8 GPUs")["AdamW"] == pytest.approx(trained * 2 / 8, rel=1e-3)
    assert plan(recipe, 8).total_memory == pytest.approx(sum(value for key, value in eight.items() if key != "all"))
    assert "DOES NOT FIT" in plan(recipe, 1).to_text()
    assert "DOES NOT FIT" not in plan(recipe, 8).to_text()


@pytest.mark.parametrize(
    ("kind", "depth", "trained", "values"),
    [
        ("linear", 1, True, 10),
        ("linear", 1, False, 0),
        ("mlp", 2, True, 10 + 2 * 7),  # features; the hidden row before and after its activation
        ("mlp", 2, False, 7),
        ("mlp", 3, True, 10 + 4 * 7),
        ("yi", 2, True, 10 + 2 * 7 + 2 * 7),
        ("identity", 1, True, 0),
    ],
)
def test_what_a_projector_keeps_of_a_row(kind, depth, trained, values):
    assert ProjectorConfig(kind, 10, 7, depth).kept_per_row(trained) == values


def test_recomputing_trades_memory_for_time():
    made = [
        plan(load_recipe("llava-1.5-stage2", [f"recompute={how}"]), 8, samples=665298)
        for how in ("layers", "selective", "none")
    ]
    assert made[0].total_memory < made[1].total_memory < made[2].total_memory
    assert made[0].hours > made[1].hours > made[2].hours


def test_hours_by_hand():
    made = plan(load_recipe("llava-1.5-stage2"), 8, "A100-80G", samples=665298, rows=800, share=0.5)
    weights = 6.74e9 - 2 * 32000 * 4096
    sample = 8 * weights * 800 + 2 * 0.29e9 * 577  # forward, backward (twice), forward again; and the frozen tower
    assert made.hours == pytest.approx(665298 * sample / (8 * 312e12 * 0.5) / 3600, rel=0.05)
    twice = plan(load_recipe("llava-1.5-stage2", ["epochs=2"]), 8, "A100-80G", samples=665298, rows=800, share=0.25)
    assert twice.hours == pytest.approx(4 * made.hours, rel=1e-3)


def test_samples_are_counted_where_the_data_is(make_recipe):
    made = plan(make_recipe(epochs=2, batch_size=8), 1)
    assert figures(made, "Time")["steps"] == 6  # 22 samples
    assert plan(load_recipe("llava-1.5-stage2"), 8).hours is None
    assert plan(load_recipe("llava-1.5-stage2", ["steps=10"]), 8).hours is not None


def test_gpus_by_the_names_that_cuda_gives():
    names = {
        "NVIDIA A100-SXM4-80GB": "A100-80G",
        "NVIDIA A100-SXM4-40GB": "A100-40G",
        "NVIDIA H100 80GB HBM3": "H100",
        "NVIDIA H100 PCIe": "H100-PCIe",
        "NVIDIA H200": "H200",
    }
    assert {name: known_gpu(name) for name in names} == {name: GPUS[kind] for name, kind in names.items()}
    assert known_gpu("NVIDIA GeForce RTX 4090") is None
    assert known_gpu("NVIDIA H100 NVL") is None
    assert [peak_flops(GPUS["H100"], *how) for how in (("bfloat16",), ("float32", True), ("float32", False))] == [
        989e12,
        494e12,
        67e12,
    ]
    assert peak_flops(None, "bfloat16") is None
    with pytest.raises(RecipeError, match="'TPU': choose one of A100-40G"):
        plan(load_recipe("llava-1.5-stage2"), 8, "TPU")


def test_every_figure_says_how():
    for name in ("llava-stage1", "llava-1.5-lora", "llava-next"):
        made = plan(load_recipe(name), 8, samples=1000)
        assert all(each.how for figures in made.sections.values() for each in figures)
        assert dataclasses.replace(made).to_text().count("\n") > 20


def test_a_trainer_reports_its_utilisation(make_recipe):
    recipe = make_recipe(trainable=["projector", "decoder"], micro_batch_rows=700)
    world = World(0, 1, torch.device("cpu"))
    model = load_model(recipe, world)
    trainer = Trainer(recipe, model, build_loader(recipe, model, world), world)
    batch, other = list(trainer.loader.steps(0))[:2]
    assert len(batch.micro_batches) > 1
    assert trainer.step(batch)["mfu"] is None  # no one knows a CPU's peak
    trainer.utilisation.peak = 1e9
    values = trainer.step(other)
    plans = [made.plan for made in other.micro_batches]
    flops = sum(
        step_flops(
            model.config,
            plan.lengths,
            plan.tiles,
            recipe.trainable,
            len(plan.column("supervised_row")),
            len(plan.column("kept")),
        )
        for plan in plans
    )
    assert values["mfu"] == pytest.approx(flops / 1e9 * values["samples_per_second"] / len(other.names))


def test_a_known_gpu_has_a_peak(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    model = tiny.pair("next").ours
    meter = Utilisation(model, torch.device("cuda", 0), "bfloat16", True, gpus=8)
    assert meter.share(312e12, 2.0) == pytest.approx(1 / 16)


def test_the_command_line(make_recipe):
    run = CliRunner()
    shown = run.invoke(app, ["plan", "llava-1.5-stage1", "--gpus", "4", "--gpu", "H200", "--samples", "558128"])
    assert shown.exit_code == 0
    assert "Memory of each of 4 GPUs" in shown.stdout
    assert "558,128 samples" in shown.stdout
    shown = run.invoke(app, ["plan", "llava-1.5-stage1", "-s", "trainable=[decoder]", "--tokens-per-sample", "2000"])
    assert "give --samples" in shown.stdout
    assert "as given" in shown.stdout
    assert "llava-1.5-lora" in run.invoke(app, ["recipe", "list"]).stdout


@pytest.mark.parametrize("case", ["next", "next_qwen3"])
def test_memory_is_what_a_step_holds(make_recipe, case, tmp_path):
    """Weights, gradients and optimizer states to the byte; what is kept of a forward pass, counted tensor by tensor as
    autograd saves it, within a tenth (on a CPU each sequence's attention leaves its result twice)."""
    tiny.save(tiny.CASES[case], tiny.hf_model(tiny.CASES[case]), tmp_path / case)
    recipe = make_recipe(model=str(tmp_path / case), recompute="none", micro_batch_rows=3000, batch_size=8)
    world = World(0, 1, torch.device("cpu"))
    model = load_model(recipe, world)
    trainer = Trainer(recipe, model, build_loader(recipe, model, world), world)
    batch = next(trainer.loader.steps(0))
    made = batch.micro_batches[0]
    rows, tiles = sum(made.plan.lengths), made.plan.tiles
    samples = len(made.plan.lengths)
    changed = recipe.model_copy(update={"micro_batch_rows": rows})
    said = figures(plan(changed, 1, rows=rows // samples, tiles=tiles // samples), "Memory of each of 1 GPUs")

    kept: dict[int, int] = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    for parameter in model.parameters():
        keep(parameter)
    weights = dict(kept)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = trainer._loss(Batch.from_prepared(made), 1, 1)
    activations = sum(size for place, size in kept.items() if place not in weights)
    loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert said["gradients"] == sum(parameter.grad.nbytes for parameter in trained)
    assert said["trained weights"] + said["frozen weights"] == sum(each.nbytes for each in model.parameters())
    trainer.optimizer.step()
    states = [value for state in trainer.optimizer.state.values() for value in state.values() if value.dim()]
    assert said["AdamW"] == sum(value.nbytes for value in states)
    kept_by_plan = sum(size for what, size in said.items() if what.endswith(", kept"))
    assert kept_by_plan == pytest.approx(activations, rel=0.1)


@pytest.mark.parametrize("name", ["instructblip", "blip2_t5"])
def test_questions_of_a_q_former_and_both_halves_of_a_t5_count(name):
    """Forward products of the connector and of the decoder, from the shapes that each Linear is called with."""
    model, found = tiny.pair(name).ours, {"projector": 0, "decoder": 0}

    def add(part, module, inputs):
        found[part] += 2 * inputs[0].numel() * module.out_features

    handles = [
        each.register_forward_pre_hook(lambda module, inputs, part=part: add(part, module, inputs))
        for part in found
        for path, each in model.get_submodule(part).named_modules()
        if type(each) is torch.nn.Linear and path != "lm_head"
    ]
    batch = model.prepare([request(0, "a box")], labels=True)  # of one tile, or the first layer would run less
    with torch.no_grad():
        model(batch, logits="none")
    for handle in handles:
        handle.remove()
    told = int((batch.plan.column("instruction") >= 0).sum()) if name == "instructblip" else 0
    forward = forward_flops(model.config, batch.plan.lengths, batch.plan.tiles, instruction=told)
    assert forward.projector == pytest.approx(found["projector"], rel=1e-4)  # a whole number of entries per query
    assert forward.decoder == found["decoder"]
    assert bool(model.config.projector.text_matrix_size) == (name == "instructblip")


def test_a_plan_says_what_it_assumes_of_questions(make_recipe, tmp_path):
    tiny.save(tiny.CASES["instructblip"], tiny.pair("instructblip").hf, tmp_path)
    recipe = make_recipe(model=str(tmp_path), trainable=["projector"], recompute="layers")
    text = plan(recipe, gpus=1).to_text()
    assert "question                                 125   rows of text that the connector reads" in text
    assert "projector, kept of text" in text
