"""The lmms-eval model classes on a stub of lmms-eval: its base class, its registry and the requests it makes."""

import abc
import dataclasses
import importlib
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from PIL import Image

import llava_fast
from llava_fast.errors import RequestError
from tests.support import tiny

TASK, SPLIT = "toy", "test"
DOCS = [
    {"question": "what is this?", "pictures": [tiny.picture(60, 90)], "choices": ["hello", "a longer answer"]},
    {"question": "and <image> here, or <image>?", "pictures": [tiny.picture(30, 30), tiny.picture(90, 20)]},
    {"question": "no picture, then", "pictures": []},
    {"question": "the last one", "pictures": [tiny.picture(20, 80)]},
]


class Instance:
    def __init__(self, *args):
        self.args = args


class Hook:
    def __init__(self):
        self.seen = []

    def add_partial(self, *what):
        self.seen.append(what)


@dataclasses.dataclass
class TokenCounts:
    input_tokens: int
    output_tokens: int


@dataclasses.dataclass
class GenerationResult:
    text: object
    token_counts: TokenCounts


@pytest.fixture(params=["0.7"])
def classes(request, monkeypatch):
    """The module under test, imported over the stub of a version, and what was registered."""

    class Base(abc.ABC):
        is_simple = True

        def __init__(self):
            self.named = self.pretrained  # as the real one reads it, before anything else is set
            self.cache_hook, self.task_dict = Hook(), {}

        @classmethod
        def create_from_arg_string(cls, text, more=None):
            given = dict(part.split("=") for part in text.split(",")) | (more or {})
            return cls(**{name: value for name, value in given.items() if value is not None})

        @abc.abstractmethod
        def loglikelihood(self, requests): ...

        generate_until = generate_until_multi_round = loglikelihood

    registry: dict = {}
    stub = {name: types.ModuleType(name) for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.models")}
    stub["lmms_eval.api.model"] = types.SimpleNamespace(lmms=Base)
    stub["lmms_eval.api.registry"] = types.SimpleNamespace(
        register_model=lambda name: lambda kind: registry.setdefault(name, kind)
    )
    stub["lmms_eval.models.registry_v2"] = types.SimpleNamespace(ModelManifest=lambda *parts: parts)
    results = types.SimpleNamespace(GenerationResult=GenerationResult, TokenCounts=TokenCounts)
    stub["lmms_eval.api.instance"] = results if request.param == "0.7" else types.SimpleNamespace()
    for name, module in stub.items():
        monkeypatch.setitem(sys.modules, name, module)
    # Set, so that undoing it leaves what was imported before, or nothing.
    monkeypatch.setitem(sys.modules, "llava_fast.integrations.lmms_eval", None)
    del sys.modules["llava_fast.integrations.lmms_eval"]
    module = importlib.import_module("llava_fast.integrations.lmms_eval")
    return types.SimpleNamespace(module=module, registry=registry, base=Base)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny.save(tiny.CASES["next"], tiny.hf_model(tiny.CASES["next"]), folder)
    return str(folder)


@pytest.fixture
def loaded(classes, checkpoint):
    def load(name="llava_fast", **more):
        made = classes.registry[name].create_from_arg_string(f"pretrained={checkpoint},chat_template=vicuna_v1", more)
        made.task_dict = {TASK: {SPLIT: DOCS}}
        return made

    return load


def pictures(doc: dict) -> list:
    return [Image.fromarray(picture) for picture in doc["pictures"]]


def messages(doc: dict) -> list[dict]:
    if "<image>" in doc["question"]:
        first, second, third = doc["question"].split("<image>")
        shown = [{"type": "image", "url": picture} for picture in pictures(doc)]
        texts = [{"type": "text", "text": text} for text in (first, second, third)]
        return [{"role": "user", "content": [texts[0], shown[0], texts[1], shown[1], texts[2]]}]
    items = [{"type": "image", "url": picture} for picture in pictures(doc)]
    return [{"role": "user", "content": [*items, {"type": "text", "text": doc["question"]}]}]


def texts(results: list) -> list:
    """What lmms-eval makes of answers: its evaluator takes results apart, and older ones take answers as they are."""
    return [each.text if isinstance(each, GenerationResult) else each for each in results]


def instances(chat: bool, settings: list[dict]) -> list[Instance]:
    out = []
    for number, (doc, given) in enumerate(zip(DOCS, settings, strict=True)):
        middle = (messages, given) if chat else (given, pictures)
        out.append(Instance(doc["question"], *middle, number, TASK, SPLIT))
    return out


def expected_answers(model, chat: bool, settings: list[dict]) -> list[str]:
    """Each document asked alone, by an ordinary request."""
    answers = []
    for doc, options in zip(DOCS, settings, strict=True):
        content = doc["question"] if "<image>" in doc["question"] else messages(doc)[0]["content"]
        if chat:
            content = messages(doc)[0]["content"]
        if isinstance(content, list):
            content = [item if item["type"] == "text" else {"type": "image"} for item in content]
        request = {"messages": [{"role": "user", "content": content}], "images": pictures(doc)}
        answers.append(model.generate([request], **options)[0].text)
    return answers


@pytest.mark.parametrize("classes", ["0.7", "0.6"], indirect=True)
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("name", ["llava_fast", "llava_fast_chat"])
def test_generate_until(name, batch_size, loaded):
    evaluated = loaded(name, batch_size=batch_size, device="cpu", max_batch_size=None)
    assert evaluated.named == evaluated.pretrained
    assert evaluated.is_simple == (name == "llava_fast")
    settings = [{"max_new_tokens": 9, "until": ["q"]}, {"max_new_tokens": 5}, {"max_new_tokens": 9, "until": ["q"]}]
    settings += [{"max_new_tokens": 9, "do_sample": True, "temperature": 0.7, "seed": 3}]
    given = [dict(each) for each in settings]
    requests = instances(not evaluated.is_simple, given)
    found = texts(evaluated.generate_until(requests))
    options = [
        {"max_new_tokens": 9, "stop": ["q"]},
        {"max_new_tokens": 5},
        {"max_new_tokens": 9, "stop": ["q"]},
        {"max_new_tokens": 9, "temperature": 0.7, "seed": 3},
    ]
    assert found == expected_answers(evaluated.model, not evaluated.is_simple, options)
    assert len(set(found)) > 2
    assert given == settings  # a task's settings are its own
    seen = {request[0]: answer for _, request, answer in json.loads(json.dumps(evaluated.cache_hook.seen))}
    assert seen == {doc["question"]: answer for doc, answer in zip(DOCS, found, strict=True)}


@pytest.mark.parametrize("classes", ["0.7", "0.6"], indirect=True)
@pytest.mark.parametrize("batch_size", [1, 2])
def test_loglikelihood(batch_size, loaded, classes):
    evaluated = loaded(batch_size=batch_size)
    model = evaluated.model
    targets = [" hello", lambda doc: doc["choices"][1]]
    requests = [Instance(DOCS[0]["question"], target, pictures, 0, TASK, SPLIT) for target in targets]
    requests.append(Instance(DOCS[2]["question"], "yes", pictures, 2, TASK, SPLIT))
    results = evaluated.loglikelihood(requests)
    found = texts(results)
    for (loss, greedy), (doc, answer) in zip(
        found, ((DOCS[0], "hello"), (DOCS[0], "a longer answer"), (DOCS[2], "yes")), strict=True
    ):
        items = [{"type": "image"}] * len(doc["pictures"]) + [{"type": "text", "text": doc["question"]}]
        turns = [{"role": "user", "content": items}, {"role": "assistant", "content": answer}]
        batch = model.prepare([{"messages": turns, "images": pictures(doc)}], labels=True)
        with torch.no_grad():
            assert loss == pytest.approx(model(batch).loss.item(), rel=1e-5)
            assert greedy is False
    assert all(isinstance(each, tuple) == (classes.module.GenerationResult is None) for each in results)


def test_targets_of_one_question_are_ranked_together(loaded, classes, monkeypatch):
    """And each gets its own candidate's figures (tests/generation/test_ranking.py has which are greedy)."""
    evaluated, asked = loaded(batch_size=2), []
    real = classes.module.score_candidates

    def watched(model, requests, texts, end_of_turn):
        asked.append(texts)
        found = real(model, requests, texts, end_of_turn)
        return [[dataclasses.replace(each, is_greedy=each.text == "hello") for each in of] for of in found]

    monkeypatch.setattr(classes.module, "score_candidates", watched)
    requests = [Instance(DOCS[0]["question"], target, pictures, 0, TASK, SPLIT) for target in ("hello", "a", "the")]
    requests.insert(1, Instance(DOCS[2]["question"], "yes", pictures, 2, TASK, SPLIT))
    assert [greedy for _, greedy in texts(evaluated.loglikelihood(requests))] == [True, False, False, False]
    assert [list(each) for each in asked] == [[["hello", "a", "the"], ["yes"]]]


def test_videos_by_their_path(classes):
    made = classes.module._request([{"role": "user", "content": "what?"}], [["a.PNG"], ["clip.mp4"]], (4, TASK, SPLIT))
    assert made["images"] == ["a.PNG"]
    assert made["video"] == "clip.mp4"
    assert made["id"] == "toy/test/4"
    assert [item["type"] for item in made["messages"][0]["content"]] == ["image", "video", "text"]
    with pytest.raises(RequestError, match="toy/test/4: 2 videos"):
        classes.module._request([{"role": "user", "content": "what?"}], ["a.mp4", "b.mp4"], (4, TASK, SPLIT))


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({}, {"max_new_tokens": 1024, "temperature": 0.0, "stop": None}),
        ({"temperature": 0, "top_p": None, "num_beams": 1}, {"max_new_tokens": 1024, "temperature": 0.0, "stop": None}),
        ({"do_sample": False, "temperature": 0.9}, {"max_new_tokens": 1024, "temperature": 0.0, "stop": None}),
        ({"do_sample": True, "top_k": 3}, {"max_new_tokens": 1024, "temperature": 1.0, "stop": None, "top_k": 3}),
        ({"max_gen_toks": 4, "until": ["", "x"]}, {"max_new_tokens": 4, "temperature": 0.0, "stop": ["x"]}),
        ({"max_gen_toks": 4, "until": ""}, {"max_new_tokens": 4, "temperature": 0.0, "stop": None}),
        ({"max_gen_toks": 4, "until": "x"}, {"max_new_tokens": 4, "temperature": 0.0, "stop": "x"}),
    ],
)
def test_options(settings, options, classes):
    assert classes.module._options(settings) == options


def test_what_is_not_served_says_so(loaded, classes, checkpoint, monkeypatch, caplog):
    evaluated = loaded()
    with pytest.raises(RequestError, match="num_beams=3"):
        evaluated.generate_until(instances(False, [{"num_beams": 3}] * 4))
    classes.module._options({"length_penalty": 2})
    assert "['length_penalty'] have no effect" in caplog.text
    with pytest.raises(RequestError, match="acc_mutual_info"):
        evaluated.loglikelihood([Instance("", "a choice")])
    with pytest.raises(RequestError, match="not 'audio'"):
        classes.module._item({"type": "audio", "url": "a.wav"})
    with pytest.raises(NotImplementedError):
        evaluated.generate_until_multi_round([])
    evaluated.task_dict = {TASK: {SPLIT: [*DOCS[:3], {"question": "<image> <image>", "pictures": []}]}}
    with pytest.raises(RequestError, match="toy/test/3"):
        evaluated.generate_until([Instance("<image> <image>", {}, pictures, 3, TASK, SPLIT)])
    with pytest.raises(RequestError, match="batch_size is a whole number"):
        loaded(batch_size="auto")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RequestError, match="one process"):
        loaded()


def test_the_entry_point_names_classes_that_are_there(classes):
    text = (Path(llava_fast.__file__).parents[1] / "pyproject.toml").read_text()
    assert (
        '[project.entry-points."lmms_eval.models"]\nllava_fast = "llava_fast.integrations.lmms_eval:manifest"' in text
    )
    name, simple, chat = classes.module.manifest()
    assert name == "llava_fast"
    for path, is_simple in ((simple, True), (chat, False)):
        kind = getattr(classes.module, path.rsplit(".", 1)[1])
        assert path.startswith("llava_fast.integrations.lmms_eval.")
        assert kind.is_simple is is_simple
        assert issubclass(kind, classes.base)
