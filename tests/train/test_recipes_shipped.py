"""The shipped recipes: each can be loaded by name and has the settings of the papers."""

import itertools

import pytest
from typer.testing import CliRunner

import llava_fast
from llava_fast.checkpoints.assemble import Assembly
from llava_fast.cli import recipe as recipe_cli
from llava_fast.errors import RecipeError
from llava_fast.train.optim import freeze
from llava_fast.train.recipe import SHIPPED, load_recipe, shipped_recipes
from tests.checkpoints import test_llama_vid, test_xcomposer

# rate, other rates, global batch, epochs, what is trained: PARITY's table, from the papers and the published scripts
TABLE = {
    "llava-stage1": (2e-3, {}, 128, 1, ["projector"]),
    "llava-stage2": (2e-5, {}, 32, 3, ["projector", "decoder"]),
    "llava-1.5-stage1": (1e-3, {}, 256, 1, ["projector"]),
    "llava-1.5-stage2": (2e-5, {}, 128, 1, ["projector", "decoder"]),
    "llava-1.5-lora": (2e-4, {"projector": 2e-5}, 128, 1, ["projector"]),
    "llava-next": (1e-5, {"vision_tower": 2e-6}, 32, 1, ["vision_tower", "projector", "decoder"]),
    "slime-stage1a": (1e-3, {}, 256, 1, ["projector.mlp.*"]),
    "slime-stage1b": (1e-3, {}, 256, 1, ["projector.expert.*"]),
    "slime-stage2": (1e-3, {}, 256, 1, ["projector.compressor.*"]),
    "slime-stage3": (2e-5, {}, 128, 1, ["projector", "decoder"]),
    "llava-next-video-dpo": (5e-7, {}, 128, 3, ["vision_tower", "projector", "decoder"]),
}


LAVIS_PARTS = {  # rate, weight decay, warm-up, batch, length, whether the projector's Q-Former is trained
    "xcomposer": (1e-5, 0.1, 0.01, 256, 2048, True),
    "llama-vid-stage1": (1e-3, 0.0, 0.03, 256, 2048, False),
    "llama-vid-stage2": (2e-5, 0.0, 0.03, 128, 2048, True),
    "llama-vid-stage3": (2e-5, 0.0, 0.03, 8, 65536, False),
}


def test_all_are_here():
    assert (
        sorted([*TABLE, *LAVIS_PARTS, "blip-2-stage1", "blip-2-stage2", "instructblip", "monkey", "qwen-vl"])
        == shipped_recipes()
    )


@pytest.mark.parametrize("name", LAVIS_PARTS)
def test_stages_of_lavis_parts(name, tmp_path):
    recipe = load_recipe(name)
    settings = recipe.optimizer
    found = settings.learning_rate, settings.weight_decay, settings.warmup, recipe.batch_size, recipe.data.max_length
    assert (*found, True) == (*LAVIS_PARTS[name][:5], settings.schedule == "cosine")
    assert (recipe.epochs, recipe.layout) == (1, "original")
    assert "# Source:" in (SHIPPED / f"{name}.yaml").read_text()
    (test_xcomposer if name == "xcomposer" else test_llama_vid).write(tmp_path)
    model = llava_fast.load(tmp_path)
    trained = set(freeze(model, recipe))
    qformer = "projector.encoder." if name == "xcomposer" else "projector.qformer.encoder."
    assert any(each.startswith(qformer) for each in trained) == LAVIS_PARTS[name][5]
    assert any(each.startswith("vision_tower.") for each in trained) == (name == "xcomposer")
    assert any(each.startswith("decoder.") for each in trained) == (name != "llama-vid-stage1")
    assert trained.isdisjoint({"projector.start", "projector.end"})


@pytest.mark.parametrize(
    ("name", "batch", "warmup", "epochs", "windows"),
    [("qwen-vl", 128, 0.01, 5, []), ("monkey", 1024, 0.02, 1, ["vision_tower.*_lora.*"])],
)
def test_what_qwen_vl_and_monkey_train(name, batch, warmup, epochs, windows):
    recipe = load_recipe(name)
    settings, data = recipe.optimizer, recipe.data
    assert (settings.learning_rate, settings.weight_decay, settings.betas) == (1e-5, 0.1, (0.9, 0.95))
    assert (settings.warmup, recipe.batch_size, recipe.epochs, recipe.layout) == (warmup, batch, epochs, "original")
    assert (data.max_length, data.label_mask) == (2048, "original")
    pool = ("query", "pos_embed", "kv_proj.*", "attn.*", "ln_q.*", "ln_kv.*")
    assert recipe.trainable == ["decoder", *windows, *(f"projector.{part}" for part in pool)]
    assert "# Source:" in (SHIPPED / f"{name}.yaml").read_text()


@pytest.mark.parametrize(
    ("name", "rate", "batch", "template", "mixing"),
    [("blip-2-stage2", 1e-4, 1024, "plain", "concat"), ("instructblip", 1e-5, 128, None, "sqrt")],
)
def test_q_formers_stages(name, rate, batch, template, mixing):
    recipe = load_recipe(name)
    settings, data = recipe.optimizer, recipe.data
    assert (settings.learning_rate, settings.weight_decay, settings.schedule) == (rate, 0.05, "cosine")
    assert (recipe.trainable, recipe.batch_size, data.template, data.mixing) == (["projector"], batch, template, mixing)
    assert "# Source:" in (SHIPPED / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", TABLE)
def test_says_what_the_papers_say(name):
    recipe = load_recipe(name, ["output=elsewhere"])
    settings = recipe.optimizer
    found = (settings.learning_rate, settings.rates, recipe.batch_size, recipe.epochs, recipe.trainable)
    assert found == TABLE[name]
    assert (settings.weight_decay, recipe.precision, recipe.tf32) == (0.0, "bfloat16", True)
    assert (settings.schedule, settings.warmup) == (("linear", 0.1) if recipe.dpo else ("cosine", 0.03))
    if recipe.dpo:
        assert recipe.dpo.beta == 0.1
    else:
        assert recipe.data.label_mask == "original"
        assert isinstance(recipe.model, Assembly)
    comments = (SHIPPED / f"{name}.yaml").read_text()
    assert "# Source:" in comments
    assert "# Published time" in comments


def test_the_two_stages_fit_together():
    slimes = [f"slime-stage{stage}" for stage in ("1a", "1b", "2", "3")]
    llavas = [("llava-stage1", "llava-stage2"), ("llava-1.5-stage1", "llava-1.5-stage2")]
    for first, second in [*llavas, *itertools.pairwise(slimes)]:
        one, two = load_recipe(first), load_recipe(second)
        assert two.model.projector_from == f"{one.output}/model"
        same = {"decoder", "vision_tower", "projector", "feature_layer"}
        assert one.model.model_dump(include=same) == two.model.model_dump(include=same)
    assert load_recipe("llava-1.5-lora").lora.rank == 128


@pytest.mark.parametrize("name", TABLE)
def test_the_exact_batches_that_its_comments_name_are_accepted(name):
    lines = (SHIPPED / f"{name}.yaml").read_text().splitlines()
    asked = [word for line in lines if "loss_average" in line for word in line.split("-s ")[1:]]
    changes = [word.strip() for word in asked if word.startswith(("data.batching", "micro_batch", "loss_average"))]
    recipe = load_recipe(name, changes)
    assert recipe.loss_average == ("step" if recipe.dpo else "micro_batch")


def test_an_unknown_name_lists_those_that_there_are():
    with pytest.raises(RecipeError, match=r"no recipe llava-2; shipped with the package: blip-2-stage1, "):
        load_recipe("llava-2")


def test_a_file_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llava-next").write_text((SHIPPED / "llava-stage1.yaml").read_text())
    assert load_recipe("llava-next").batch_size == 128


def test_list_and_show():
    run = CliRunner()
    listed = run.invoke(recipe_cli.app, ["list"]).stdout.splitlines()
    assert len(listed) == len(shipped_recipes()) == len(TABLE) + len(LAVIS_PARTS) + 5
    assert all(len(line.split("  ", 1)[1].strip()) > 20 for line in listed)
    shown = run.invoke(recipe_cli.app, ["show", "llava-1.5-stage1"]).stdout
    assert shown == (SHIPPED / "llava-1.5-stage1.yaml").read_text()


def test_show_with_changes_is_a_whole_recipe(tmp_path):
    text = CliRunner().invoke(recipe_cli.app, ["show", "llava-1.5-lora", "-s", "batch_size=64"]).stdout
    (tmp_path / "mine.yaml").write_text(text)
    wanted = load_recipe("llava-1.5-lora", ["batch_size=64"])
    assert load_recipe(tmp_path / "mine.yaml") == wanted
