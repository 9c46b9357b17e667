"""A checkpoint's chat templates: which of several is used, and that an invalid one is an error."""

import json

import pytest

from llava_fast.api import load_processor
from llava_fast.checkpoints.load import load_checkpoint
from llava_fast.errors import CheckpointError, RequestError
from tests.support.tiny_checkpoints import edit_json, save_hf, tokenizer, write_original

DEFAULT, OTHER = "default: {{ messages[0].content[0].text }}", "other: {{ messages[0].content[0].text }}"
NAMED = [{"name": "tool_use", "template": OTHER}, {"name": "default", "template": DEFAULT}]
MAPPING = {each["name"]: each["template"] for each in NAMED}
TURN = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    save_hf("llava", path)
    tokenizer("<image>").save_pretrained(path)
    return path


@pytest.fixture
def checkpoint(saved, tmp_path):
    """The saved checkpoint in a directory of its own."""
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def rendered(path, asked=None):
    return load_processor(load_checkpoint(path), "a model", asked).template.render(TURN)


def write(path, file, content):
    """One file's content; in a JSON file that is there, the fields."""
    if (path / file).exists() and isinstance(content, dict):
        edit_json(path / file, **content)
    else:
        (path / file).parent.mkdir(exist_ok=True)
        (path / file).write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize(
    "files",
    [
        {"chat_template.jinja": DEFAULT},
        {"chat_template.jinja": "\ufeff" + DEFAULT},
        {"chat_template.jinja": DEFAULT, "additional_chat_templates/tool_use.jinja": OTHER},
        {"chat_template.json": {"chat_template": DEFAULT}},
        {"chat_template.json": {"chat_template": MAPPING}},
        {"chat_template.json": {"chat_template": NAMED}},
        {"processor_config.json": {"chat_template": MAPPING}},
        {"tokenizer_config.json": {"chat_template": DEFAULT}},
        {"tokenizer_config.json": {"chat_template": NAMED}},
        {"chat_template.jinja": DEFAULT, "tokenizer_config.json": {"chat_template": OTHER}},
    ],
)
def test_the_default_is_used_and_others_by_name(checkpoint, files):
    for file, content in files.items():
        write(checkpoint, file, content)
    assert rendered(checkpoint) == "default: Hi"
    assert rendered(checkpoint, "vicuna_v1").startswith("A chat between")
    if "tool_use" in str(files):
        assert rendered(checkpoint, "tool_use") == "other: Hi"
    with pytest.raises(RequestError, match="unknown chat template 'rag'"):
        rendered(checkpoint, "rag")


def test_without_any_template_the_family_decides(checkpoint):
    assert rendered(checkpoint).startswith("A chat between")
    write(checkpoint, "chat_template.json", {"chat_template": None})
    assert rendered(checkpoint).startswith("A chat between")


@pytest.mark.parametrize(
    ("file", "template", "message"),
    [
        ("chat_template.json", 7, "chat_template"),
        ("processor_config.json", [7], "chat_template"),
        ("tokenizer_config.json", [{"name": "default"}], "chat_template"),
        ("chat_template.json", {"default": 7}, "chat_template"),
        ("processor_config.json", {}, "no chat template named 'default'"),
        ("tokenizer_config.json", [], "no chat template named 'default'"),
        ("tokenizer_config.json", {"tool_use": OTHER}, "no chat template named 'default'.*tool_use"),
        ("chat_template.json", "", "is empty"),
        ("tokenizer_config.json", "{% for", "not valid Jinja"),
        ("tokenizer_config.json", "{{ 'a' * 10 ** 10 }}", "cannot be used"),
    ],
)
def test_one_that_cannot_be_used_is_an_error(checkpoint, file, template, message):
    write(checkpoint, file, {"chat_template": template})
    with pytest.raises(CheckpointError, match=f"{file}.*{message}"):
        rendered(checkpoint)


@pytest.mark.parametrize("content", [b"\xff\xfe{", b"", b"{{"])
def test_a_jinja_file_that_cannot_be_used(checkpoint, content):
    (checkpoint / "chat_template.jinja").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja"):
        rendered(checkpoint)


def test_the_note_of_a_trained_model_must_name_a_built_in_template(checkpoint):
    write(checkpoint, "llava_fast.json", {"chat_template": "plain"})
    assert load_processor(load_checkpoint(checkpoint), "a model").template.name == "plain"
    write(checkpoint, "llava_fast.json", {"chat_template": "fancy"})
    with pytest.raises(CheckpointError, match=r"llava_fast\.json: chat_template 'fancy'"):
        rendered(checkpoint)


def test_an_original_checkpoint_has_its_format_from_its_name(tmp_path):
    write_original(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    write(tmp_path, "tokenizer_config.json", {"chat_template": NAMED})
    assert rendered(tmp_path).startswith("A chat between")
    assert rendered(tmp_path, "tool_use") == "other: Hi"
