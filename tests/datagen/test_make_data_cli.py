"""`llava-fast make-data` as a user types it; the data is what `llava-fast data check` accepts."""

import errno
import functools
import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from llava_fast.cli import endpoint as options
from llava_fast.cli.main import app
from llava_fast.datagen.ocr import Word
from llava_fast.datagen.wording import FOLDER
from llava_fast.errors import DataError, LlavaFastError
from llava_fast.train.data.samples import Source, read_sources
from tests.support.scripted_endpoint import REPLIES, scripted

FAULTY = ("500", "429", "truncate", "not json", "list")


def run(*arguments):
    result = CliRunner().invoke(app, ["make-data", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, (SystemExit, LlavaFastError)):
        raise result.exception
    return result


def one_word(path):
    return [Word(f"Open every day {path[-5:]}", (0, 0, 9, 9), 1.0)]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(options, "Endpoint", functools.partial(options.Endpoint, backoff=0.001))


@pytest.fixture
def coco(tmp_path):
    """COCO files of twelve pictures; returns (captions, instances)."""
    images = [{"id": n, "file_name": f"{n:012}.jpg", "width": 40, "height": 30} for n in range(12)]
    (tmp_path / "train2017").mkdir()
    for each in images:
        Image.new("RGB", (40, 30)).save(tmp_path / "train2017" / each["file_name"])
    texts = [{"image_id": n, "caption": f"Cat {n} sits on a red chair."} for n in range(12)]
    boxes = [{"image_id": n, "category_id": 3, "bbox": [10, 10, 10, 10]} for n in range(12)]
    files = tmp_path / "captions.json", tmp_path / "instances.json"
    files[0].write_text(json.dumps({"images": images, "annotations": texts}))
    categories = [{"id": 3, "name": "cat"}]
    files[1].write_text(json.dumps({"images": images, "annotations": boxes, "categories": categories}))
    return files


def writes(body):
    """What a language model would write."""
    about, system = body["messages"][-1]["content"], body["messages"][0]["content"]
    cat = about.split()[2] + about.split()[3]
    if "detailed descriptions" in system:
        return f"This is {cat} at length."
    if "need reasoning" in system:
        return f"Question: Why does {cat} sit?\nAnswer: {cat} is tired."
    return f"Question: What sits?\nAnswer: {cat}.\nQuestion: Where?\nAnswer: On a red chair."


def checked(path):
    table = read_sources([Source(path=str(path))])
    return [table[number] for number in range(len(table))]


def test_from_cocos_files_to_data_that_trains(coco, tmp_path):
    out = tmp_path / "data.json"
    files = ("--coco-captions", coco[0], "--coco-instances", coco[1], "--prefix", "train2017/", "-o", out)
    fault = lambda body, number: (FAULTY + REPLIES)[number % 8] if number < 8 else None  # noqa: E731
    with scripted(writes, fault) as server:
        ask = ("--endpoint", server.url, "--endpoint-model", "scripted", "--concurrency", 2)
        result = run("instruct", *files, *ask, "--dry-run")
        assert "Objects (left, top, right, bottom):\ncat: 0.250, 0.333, 0.500, 0.667" in result.output
        assert not out.exists()
        result = run("instruct", *files, *ask)
        assert result.exit_code == 0, result.output
        assert "9 samples: " in result.output
        assert "left out: " in result.output
        again = run("instruct", *files, *ask)
        assert "all 12 replies are there already" in again.output
    samples = checked(out)
    assert len(samples) == 9
    assert all(sample.request["images"][0].endswith(".jpg") for sample in samples)
    report = json.loads((tmp_path / "data.report.json").read_text())
    assert report["left_out"] == {"empty": 1, "refusal": 1, "cut short": 1}
    assert sum(report["made"].values()) == 9


def test_pairs_of_pretraining(coco, tmp_path):
    result = run(
        "pretrain", "--coco-captions", coco[0], "--prefix", "train2017/", "--most", 4, "-o", tmp_path / "p.jsonl"
    )
    assert result.exit_code == 0, result.output
    samples = checked(tmp_path / "p.jsonl")
    assert 4 <= len(samples) <= 8
    assert f"{12 - len(samples)} not needed for coverage" in result.output


def test_text_in_pictures_and_conversations_about_it(coco, tmp_path):
    words = tmp_path / "words.jsonl"
    engine = ("--engine", f"{__name__}:one_word")
    result = run("ocr", tmp_path / "train2017", "-o", tmp_path / "train2017.json", "--records", words, *engine)
    assert result.exit_code == 0, result.output
    values = [json.loads(line) for line in words.read_text().splitlines()]
    assert values[0] == {"id": "000000000000.jpg", "image": "000000000000.jpg", "words": ["Open every day 0.jpg"]}
    with scripted(lambda body: f"Question: When?\nAnswer: {body['messages'][-1]['content'].splitlines()[1]}") as server:
        out = ("-o", tmp_path / "t.json", "--endpoint", server.url, "--count", 3)
        result = run("instruct", words, "--mix", "text=1", *out)
    assert "3 samples: 3 text" in result.output


def test_texts_are_copied_out(tmp_path):
    assert "conversation.yaml" in run("texts", tmp_path / "texts").output
    assert run("texts", tmp_path / "texts").output == ""


def test_a_full_disk_leaves_no_text_cut_short(tmp_path, monkeypatch):
    write, left = Path.write_bytes, [2]

    def until_full(path, data):
        left[0] -= 1
        write(path, data if left[0] >= 0 else data[:20])
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", until_full)
        assert "cannot be copied to the folder" in str(run("texts", tmp_path / "texts").exception)
    run("texts", tmp_path / "texts")
    assert {path.name: path.read_bytes() for path in (tmp_path / "texts").iterdir()} == {
        path.name: path.read_bytes() for path in FOLDER.iterdir()
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("instruct", "-o", "x.json"), "give either files of records or --coco-captions"),
        (("instruct", "r.jsonl", "-o", "x.txt"), "must be a .json or .jsonl"),
        (("instruct", "none.jsonl", "-o", "x.json"), "there is no data file none.jsonl"),
        (("instruct", "r.jsonl", "--mix", "conversation", "-o", "x.json"), "is not a kind and its share"),
        (("pretrain", "r.jsonl", "--tagger", "x", "-o", "x.json"), "the tagger 'x'"),
        (("ocr", "none", "-o", "x.json"), "no folder of pictures"),
        (("core-set", "d.json", "--cap", "gqa", "-o", "x.json"), "is not a source and a number"),
        (("core-set", "d.json", "--cap", "gqa=inf", "-o", "x.json"), "is not a source and a number"),
        (("core-set", "d.json", "--cap", "gqa=1.5", "-o", "x.json"), "is not a source and a number"),
        (("core-set", "d.json", "--cap", "=5", "-o", "x.json"), "is not a source and a number"),
        (("instruct", "r.jsonl", "--mix", "conversation=-1", "-o", "x.json"), "is not a kind and its share"),
        (("texts", "d.json"), "cannot be copied to the folder d.json"),
        (("chains", "d.json", "--related", "image", "-o", "x.json"), "give --model"),
        (("preferences", "d.json", "-m", "m", "--score", "reference", "--dry-run", "-o", "x.jsonl"), "asks none"),
        (("preferences", "d.json", "-m", "m", "--ray", "1", "--processes", "2", "-o", "x.jsonl"), "exclude each other"),
        (("preferences", "d.json", "-o", "x.jsonl"), "give either --model, or --answer-endpoint"),
        (("preferences", "d.json", "--answer-endpoint", "http://x", "-o", "x.jsonl"), "give either --model"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.jsonl").write_text('{"image": "a.jpg", "caption": "A cat."}')
    (tmp_path / "d.json").write_text(json.dumps(DATA))
    assert words in str(run(*arguments).exception)


DATA = [
    {"id": n, "image": f"{n}.jpg", "conversations": [{"from": "human", "value": f"<image>\nIs cat {n} red?"}, answer]}
    for n in range(4)
    for answer in [{"from": "gpt", "value": f"{('No', 'Yes')[n % 2]}, cat {n} is on the left."}]
]


def test_data_from_data(tmp_path):
    data, records = tmp_path / "d.json", tmp_path / "r.jsonl"
    data.write_text(json.dumps(DATA))
    records.write_text("\n".join(json.dumps({"image": f"{n}.jpg", "caption": f"Red cat {n % 2}."}) for n in range(4)))
    assert "2 core set" in run("core-set", data, "--count", 2, "--least", 1, "-o", tmp_path / "core.json").output
    assert "4 2 in context" in run("chains", data, "--context", 2, "-o", tmp_path / "chains.json").output
    assert {len(sample.request["images"]) for sample in checked(tmp_path / "chains.json")} == {3}
    with scripted(lambda body: f"Question: Which?\nAnswer: {len(server.bodies)}.") as server:
        result = run("compare", records, "-o", tmp_path / "compare.json", "--endpoint", server.url)
        assert "2 samples: 2 difference" in result.output
        assert "First picture\nCaptions:" in server.texts()[0]
    assert {len(sample.request["images"]) for sample in checked(tmp_path / "compare.json")} == {2}


def test_preferences_of_answers_from_one_endpoint_and_scores_from_another(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "key-of-scores")
    monkeypatch.setenv("ANSWER_API_KEY", "key-of-answers")
    data, out = tmp_path / "d.json", tmp_path / "pairs.jsonl"
    data.write_text(json.dumps(DATA))
    for n in range(4):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{n}.jpg")
    with (
        scripted(lambda body: f"answer {body['seed']}") as answers,
        scripted(lambda body: f"Score: {5 if 'answer 0' in body['messages'][-1]['content'] else 1}") as scores,
    ):
        common = ("preferences", data, "--images", tmp_path, "--answers", 2, "-o", out, "--endpoint", scores.url)
        result = run(*common, "--answer-endpoint", answers.url, "--answer-model", "mine")
        assert result.exit_code == 0, result.output
        assert (len(answers.bodies), len(scores.bodies), answers.bodies[0]["model"]) == (8, 8, "mine")
        # Each endpoint gets its own key, and never the other's.
        assert {each["authorization"] for each in answers.headers} == {"Bearer key-of-answers"}
        assert {each["authorization"] for each in scores.headers} == {"Bearer key-of-scores"}
        assert "A right answer" in run(*common, "--model", "none", "--dry-run").output
    pairs = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [("answer 0", "answer 1")] * 4


def test_nothing_made_is_an_error(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"image": "a.jpg", "caption": "A cat."}')
    with scripted(lambda body: "No.") as server:
        result = run("instruct", tmp_path / "r.jsonl", "-o", tmp_path / "x.json", "--endpoint", server.url)
    assert isinstance(result.exception, DataError)
    assert "left out: 1 no questions and answers" in result.output


@pytest.mark.parametrize(
    "kind", ["instruct", "pretrain", "ocr", "texts", "chains", "compare", "core-set", "preferences"]
)
def test_help_has_an_example(kind):
    assert f"llava-fast make-data {kind}" in run(kind, "--help").output
