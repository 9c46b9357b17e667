"""Whatever is wrong with a checkpoint's files is one CheckpointError, within a second, that names the file."""

import dataclasses
import json
import os
import random
import time

import pytest
import torch

from llava_fast.api import load_processor
from llava_fast.checkpoints.load import load_checkpoint, load_weights
from llava_fast.errors import CheckpointError
from llava_fast.models.vlm import LlavaModel
from llava_fast.storage.files import MOST_BYTES, read_json, read_text
from tests.support import malformed
from tests.support.malformed import NAN, damaged, fields, tensors, write

CASES = malformed.cases()
TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json")
JSON_FILES = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
    "chat_template.json",
    *TOKENIZER_FILES,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("saved")
    malformed.save_kinds(root)
    return root


@pytest.fixture
def linked(saved, tmp_path):
    """A function that makes a directory of links to one of the saved checkpoints."""

    def link(kind):
        for file in (saved / kind).iterdir():
            os.symlink(file, tmp_path / file.name) if file.is_dir() else os.link(file, tmp_path / file.name)
        return tmp_path

    return link


def open_whole(path):
    """Config, tokenizer, template and weights: all that `llava_fast.load` reads."""
    checkpoint = load_checkpoint(path)
    processor = load_processor(checkpoint, "a model")
    with torch.device("meta"):
        model = LlavaModel(checkpoint.config)
    load_weights(model, checkpoint)
    return model, processor


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("kind", "what", "file", "change"), CASES, ids=[f"{kind}: {what}" for kind, what, _, _ in CASES]
)
def test_malformed(linked, kind, what, file, change):
    path = linked(kind)
    change(path)
    start = time.thread_time()
    with pytest.raises(CheckpointError) as error:
        open_whole(path)
    assert time.thread_time() - start < 1
    assert file in str(error.value)
    assert "\n" not in str(error.value)
    assert not (path / "ran").exists()


@pytest.mark.parametrize("kind", ["llava", "llava_next", "original", "original, tiled"])
def test_the_checkpoints_that_are_damaged_are_whole(linked, kind):
    path = linked(kind.split(",")[0])
    if kind.endswith("tiled"):
        malformed.together(malformed.TILED, lambda path: None)(path)
    model, processor = open_whole(path)
    assert processor.tokenizer.convert_tokens_to_ids("w5") == 5
    assert not next(model.parameters()).is_meta


@pytest.mark.parametrize("file", JSON_FILES)
def test_a_byte_order_mark_is_skipped(linked, file):
    path = linked("llava")
    plain = open_whole(path)
    write(path / file, b"\xef\xbb\xbf" + (path / file).read_bytes())
    model, processor = open_whole(path)
    assert model.config == plain[0].config
    assert processor.tokenizer.get_vocab() == plain[1].tokenizer.get_vocab()
    assert processor.template == plain[1].template


CODE = [{"AutoConfig": "x.Y", "AutoTokenizer": ["x.Y", None]}]
HARMLESS = [
    *fields("config.json", (), {"odd": [7, [[]], {"a": NAN}], "pad_token_id": [None, -1], "auto_map": CODE}),
    *fields("preprocessor_config.json", (), {"crop_size": [None], "image_mean": [None, [0, 0.5, 1]], "do_pad": [None]}),
    *fields("processor_config.json", (), {"image_processor": [None, {"crop_size": None}]}),
    *fields("tokenizer_config.json", (), {"model_max_length": [None, int(1e30)], "auto_map": CODE}),
    ("NaN weights", "", tensors("model.safetensors", lambda content: next(iter(content.values())).fill_(NAN))),
]


@pytest.mark.parametrize(("what", "file", "change"), HARMLESS, ids=[what for what, _, _ in HARMLESS])
def test_what_is_odd_and_harmless_loads(linked, what, file, change):
    path = linked("llava")
    change(path)
    open_whole(path)


@pytest.mark.parametrize("section", [None, "text_config", "vision_config"])
def test_a_table_of_a_hundred_million_labels_is_not_built(linked, section):
    path = linked("llava")
    content = json.loads((path / "config.json").read_text())
    (content if section is None else content[section])["num_labels"] = 10**8
    write(path / "config.json", json.dumps(content).encode())
    with pytest.raises(CheckpointError, match=r"config.json.*num_labels"):
        open_whole(path)


def test_five_hundred_mutated_side_files(saved, tmp_path):
    """Values of every kind in every place, and bytes changed, left out and put in: it loads or is one clear error."""
    chance, loaded = random.Random(0), 0
    checkpoint = load_checkpoint(saved / "llava")
    texts = {name: (saved / "llava" / name).read_text() for name in JSON_FILES}
    for number in range(500):
        path = tmp_path / str(number)
        path.mkdir()
        for file in (saved / "llava").iterdir():
            os.link(file, path / file.name)
        name = chance.choice(JSON_FILES)
        write(path / name, _mutated_json(chance, texts[name]) if number % 2 else _mutated_bytes(chance, texts[name]))
        start = time.thread_time()
        try:
            if name in TOKENIZER_FILES:
                assert load_processor(dataclasses.replace(checkpoint, path=path, tokenizer_path=path), "a model")
            else:
                load_checkpoint(path)
            loaded += 1
        except CheckpointError as error:
            assert "\n" not in str(error)
        assert time.thread_time() - start < 1, name
    assert 50 < loaded < 400


VALUES = (None, True, 0, -1, 7, 10**9, 10**30, 1.5, NAN, float("-inf"), "", "x", "x" * 10_000, [], [[]], [7], {})


def _mutated_json(chance, text):
    content = json.loads(text)
    places = []
    stack = [content]
    while stack:
        each = stack.pop()
        inner = list(each) if isinstance(each, dict) else range(min(len(each), 8))
        places += [(each, key) for key in inner]
        stack += [each[key] for key in inner if isinstance(each[key], (dict, list))]
    for _ in range(chance.choice((1, 1, 1, 3))):
        parent, key = chance.choice(places)
        if isinstance(parent, dict) and chance.random() < 0.1:
            parent.pop(key, None)
        elif key in (parent if isinstance(parent, dict) else range(len(parent))):
            parent[key] = chance.choice(VALUES)
    return content


def _mutated_bytes(chance, text):
    raw = bytearray(text.encode())
    for _ in range(chance.choice((1, 1, 2, 8))):
        place = chance.randrange(len(raw))
        kind = chance.randrange(3)
        if kind == 0:
            raw[place] = chance.randrange(256)
        elif kind == 1:
            del raw[place : place + chance.choice((1, 1, 4, 64))]
        else:
            raw[place:place] = bytes(chance.choices(b'{}[]",:0123456789-eE.\\u \xff\x00', k=chance.choice((1, 3))))
        if not raw:
            break
    return bytes(raw)


def test_what_a_message_says(tmp_path):
    file = tmp_path / "config.json"
    for what, _, change in damaged("config.json"):
        if not what.endswith("directory"):
            change(tmp_path)
            with pytest.raises(CheckpointError, match=r"config\.json"):
                read_json(file)
    write(file, {"a": "x" * 1000})
    assert read_json(file) == {"a": "x" * 1000}
    write(tmp_path / "text", b"\xef\xbb\xbfa\r\nb")
    assert read_text(tmp_path / "text") == "a\nb"
    assert MOST_BYTES > 40_000_000
