"""Recipes: what is refused, and that the error says which field."""

import pytest

from llava_fast.errors import RecipeError
from llava_fast.train.recipe import load_recipe

GOOD = """
model: somewhere
output: runs/x
data: {sources: [{path: data.json}]}
optimizer: {learning_rate: 1.0e-3}
batch_size: 8
"""


def write(tmp_path, text: str):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_reads_and_changes(tmp_path):
    recipe = load_recipe(write(tmp_path, GOOD), ["optimizer.learning_rate=2.0e-5", "trainable=[projector, decoder]"])
    assert recipe.optimizer.learning_rate == 2e-5
    assert recipe.trainable == ["projector", "decoder"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("batch_sise=3", "batch_sise: there is no such field; did you mean batch_size?"),
        ("data.qqq=3", r"data\.qqq: there is no such field$"),
        ("optimizer={}", "optimizer.learning_rate: it is missing"),
        ("batch_size=x: y: z", "the value is not YAML"),
        ("batch_size=0", "batch_size"),
        ("data.sources=[]", "data.sources"),
        ("optimizer.rates={tower: 1.0}", "optimizer.rates.tower"),
        ("trainable=[]", "nothing is trained"),
        ("loss_average=micro_batch", "grouped"),
        ("model.x=1", "model is not a section"),
        ("nonsense", "key=value"),
    ],
)
def test_names_the_field_that_is_wrong(tmp_path, change, said):
    with pytest.raises(RecipeError, match=said):
        load_recipe(write(tmp_path, GOOD), [change])


@pytest.mark.parametrize(("text", "said"), [("- a", "mapping"), ("a: [", "not YAML"), ("{}", "learning_rate|model")])
def test_not_a_recipe(tmp_path, text, said):
    with pytest.raises(RecipeError, match=said):
        load_recipe(write(tmp_path, text))


def test_a_directory_is_no_recipe(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read as a recipe"):
        load_recipe(tmp_path)


def test_missing_file(tmp_path):
    with pytest.raises(RecipeError, match="there is no recipe"):
        load_recipe(tmp_path / "none.yaml")


def test_a_model_may_be_put_together(tmp_path):
    path = write(tmp_path, GOOD.replace("model: somewhere", "model: {decoder: a, vision_tower: b}"))
    recipe = load_recipe(path, ["model.decoder=c", "model.pinpoints=[[336, 672]]"])
    assert (recipe.model.decoder, recipe.model.pinpoints) == ("c", [(336, 672)])
    with pytest.raises(RecipeError, match=r"model\.parts\.tower"):
        load_recipe(path, ["model.tower=x"])


def test_a_place_in_a_list_is_changed_by_its_number(tmp_path):
    recipe = load_recipe(write(tmp_path, GOOD), ["data.sources.0.path=other.json", "data.sources.0.images=pictures"])
    assert (recipe.data.sources[0].path, recipe.data.sources[0].images) == ("other.json", "pictures")
    with pytest.raises(RecipeError, match="'1' is not an index of a list of 1"):
        load_recipe(write(tmp_path, GOOD), ["data.sources.1.path=other.json"])
