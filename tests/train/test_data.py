"""Reading LLaVA-format files: every supported format, and one sentence for every error."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from llava_fast.errors import DataError
from llava_fast.train.data.samples import Source, read_sources


def turns(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def sample(name="a", image="a.jpg", **others):
    placeholders = "<image>\n" * (len(image) if isinstance(image, list) else image is not None)
    return {"id": name, "image": image, "conversations": turns(f"{placeholders}What is it?", "A cat."), **others}


def write(path, values, lines=False, **options):
    text = "\n".join(map(json.dumps, values)) if lines else json.dumps(values, **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def ids(table):
    return [table[i].name.split("(id ")[1][:-1] for i in range(len(table))]


def table_of(folder, value, **options):
    return read_sources([Source(path=write(folder / "data.json", [value]))], **options)


# ---------------------------------------------------------------- what is read


def test_a_sample_becomes_a_request(tmp_path):
    path = write(tmp_path / "data.json", [sample("000123"), sample("000124", ["b.jpg", "c/d.png"], bbox=[1])])
    table = read_sources([Source(path=path, images=str(tmp_path / "pictures"))])
    first, second = table
    assert first.name == "data.json[0] (id 000123)" == first.request["id"]
    assert first.source == 0
    assert first.request["messages"] == [
        {"role": "user", "content": "<image>\nWhat is it?"},
        {"role": "assistant", "content": "A cat."},
    ]
    assert first.request["images"] == [f"{tmp_path}/pictures/a.jpg"]
    assert "video" not in first.request
    assert second.request["images"] == [f"{tmp_path}/pictures/b.jpg", f"{tmp_path}/pictures/c/d.png"]
    assert table.unread == {"bbox": 1}


def test_images_are_relative_to_the_data_file_unless_told_otherwise(tmp_path):
    values = [sample(), sample(image="/elsewhere/a.jpg"), sample(image="data:image/png;base64,AA")]
    table = read_sources([Source(path=write(tmp_path / "deep" / "data.json", values))])
    assert [each.request["images"] for each in table] == [
        [f"{tmp_path}/deep/a.jpg"],
        ["/elsewhere/a.jpg"],
        ["data:image/png;base64,AA"],
    ]


@pytest.mark.parametrize("absent", [{}, {"image": None}, {"image": ""}, {"image": []}])
def test_text_only(tmp_path, absent):
    value = {"conversations": turns("Hello", "Hi"), **absent}
    (only,) = table_of(tmp_path, value)
    assert only.name == "data.json[0]"
    assert only.request["images"] == []


def test_an_image_mark_moves_to_the_front_as_in_training(tmp_path):
    value = {"image": "a.jpg", "conversations": turns("What is it?\n<image>", "A cat.")}
    assert table_of(tmp_path, value)[0].request["messages"][0]["content"] == "<image>\nWhat is it?"
    kept = table_of(tmp_path, value, image_first=False)[0]
    assert kept.request["messages"][0]["content"] == "What is it?\n<image>"


def test_a_video_is_marked_by_image_or_video(tmp_path):
    for placeholder in ("<image>", "<video>"):
        (only,) = table_of(tmp_path, {"video": "a.mp4", "conversations": turns(f"{placeholder}\nWhat?", "A cat.")})
        assert only.request["messages"][0]["content"] == "<video>\nWhat?"
        assert only.request["video"] == f"{tmp_path}/a.mp4"
        assert only.request["images"] == []
    both = {"video": ["a.mp4"], "image": "a.jpg", "conversations": turns("<image>\n<video>\nWhat?", "A cat.")}
    request = table_of(tmp_path, both)[0].request
    assert request["messages"][0]["content"] == "<image>\n<video>\nWhat?"
    assert len(request["images"]) == 1


def test_messages_are_read_too(tmp_path):
    plain = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}], "id": 7}
    (only,) = table_of(tmp_path, plain)
    assert only.request["messages"] == plain["messages"]
    assert only.name == "data.json[0] (id 7)"
    items = [
        {"type": "text", "text": "<image> and"},
        {"type": "image_url", "image_url": {"url": "b.jpg"}},
        {"type": "image"},
    ]
    value = {
        "images": ["a.jpg", "c.jpg"],
        "messages": [{"role": "user", "content": items}, {"role": "assistant", "content": "Hi"}],
    }
    (only,) = table_of(tmp_path, value)
    content = only.request["messages"][0]["content"]
    assert content[1] == {"type": "image", "image": f"{tmp_path}/b.jpg"}
    assert content[2] == {"type": "image"}
    assert only.request["images"] == [f"{tmp_path}/a.jpg", f"{tmp_path}/c.jpg"]


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("ending", [".json", ".jsonl"])
def test_lists_and_lines_whatever_the_name(tmp_path, lines, ending):
    path = write(tmp_path / f"data{ending}", [sample("a"), sample("b")], lines)
    assert ids(read_sources([Source(path=path)])) == ["a", "b"]


def test_indented_files_and_byte_order_marks(tmp_path):
    path = write(tmp_path / "data.json", [sample("ä"), sample("b")], indent=2, ensure_ascii=False)
    (tmp_path / "data.json").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "data.json").read_bytes() + b"\n\n")
    assert ids(read_sources([Source(path=path)])) == ["ä", "b"]


def test_globs_and_braces(tmp_path):
    for name in "cab":
        write(tmp_path / f"{name}.json", [sample(name)])
    assert ids(read_sources([Source(path=f"{tmp_path}/*.json")])) == ["a", "b", "c"]
    assert ids(read_sources([Source(path=f"{tmp_path}/{{c,a}}.json")])) == ["c", "a"]
    write(tmp_path / "data[1].json", [sample("literal")])
    assert ids(read_sources([Source(path=f"{tmp_path}/data[1].json")])) == ["literal"]


def test_samplings(tmp_path):
    path = write(tmp_path / "data.json", [sample(str(i)) for i in range(11)])

    def taken(sampling, seed=0):
        return ids(read_sources([Source(path=path, sampling=sampling, seed=seed)]))

    assert taken("first:10%") == ["0", "1"]  # a share is rounded up
    assert taken("end:2") == ["9", "10"]
    assert taken("end:100") == taken("all")
    drawn = taken("random:4")
    assert len(set(drawn)) == 4
    assert drawn == taken("random:4") != taken("random:4", seed=1)
    assert drawn != taken("first:4")
    assert taken("first:0.5%") == ["0"]


@pytest.mark.parametrize("wrong", ["first", "first:", "half:3", "first:1.5", "first:-1", "10%"])
def test_a_wrong_sampling_is_refused(wrong):
    with pytest.raises(ValidationError, match=r"unknown sampling .*: use all, first:100"):
        Source(path="a.json", sampling=wrong)


def test_a_mixture(tmp_path):
    write(tmp_path / "a.json", [sample(f"a{i}") for i in range(4)])
    write(tmp_path / "b.jsonl", [sample(f"b{i}") for i in range(4)], lines=True)
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text(
        "datasets:\n"
        f"  - json_path: {tmp_path}/a.json\n    sampling_strategy: 'end:25%'\n"
        "  - json_path: b.jsonl\n    sampling_strategy: first:2\n"
    )
    assert ids(read_sources([Source(path=str(mixture))])) == ["a3", "b0", "b1"]
    assert ids(read_sources([Source(path=str(mixture), sampling="first:2")])) == ["a3", "b0"]


def test_parts_of_a_mixture_are_drawn_apart(tmp_path):
    path = write(tmp_path / "data.json", [sample(str(i)) for i in range(40)])
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text("datasets:" + f"\n- {{json_path: {path}, sampling_strategy: 'random:50%'}}" * 2)
    drawn = ids(read_sources([Source(path=str(mixture))]))
    assert len(drawn) == 40
    assert drawn[:20] != drawn[20:]
    assert drawn != ids(read_sources([Source(path=str(mixture), seed=1)]))


def test_sources_are_told_apart_and_files_of_one_name_too(tmp_path):
    paths = [write(tmp_path / folder / "data.json", [sample(), sample()]) for folder in ("one", "two")]
    table = read_sources([Source(path=paths[0]), Source(path=paths[1], sampling="first:1")])
    assert table.source_of.tolist() == [0, 0, 1]
    assert table[2].source == 1
    assert table.name(2) == f"{paths[1]}[0] (id a)"


def test_a_table_goes_to_another_process_and_has_a_fingerprint(tmp_path):
    table = table_of(tmp_path, sample())
    again = pickle.loads(pickle.dumps(table))
    assert again[0] == table[0]
    assert again.fingerprint() == table.fingerprint()
    assert table_of(tmp_path, sample("b")).fingerprint() != table.fingerprint()
    moved = read_sources([Source(path=str(tmp_path / "data.json"), images="/elsewhere")])
    assert moved.fingerprint() != table_of(tmp_path, sample("b")).fingerprint()


def test_the_documented_sources_are_valid():
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    (data,) = [yaml.safe_load(each)["data"] for each in re.findall(r"```yaml\n(data:.*?)```", text, re.DOTALL)]
    assert len([Source(**each) for each in data["sources"]]) == 4


# ---------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no samples"),
        ("[]", "has no samples"),
        ('[{"id": "a"}, {"id": ', "line 1, column 22: invalid JSON"),
        ('[{"id": "a"},\n {"id": "b"}', "line 2, column 13: invalid JSON: expected ',' or ']'"),
        ('[{"id": "a"},', "column 14: invalid JSON"),
        ('[{"id": "a"}] x', "column 15: invalid JSON: unexpected text after the list"),
        ('{"id": "a"}\n{"id": "b', "line 2, column 8: invalid JSON"),
        ("id,image\n1,a.jpg", "line 1, column 1: invalid JSON"),
        ("[" * 200_000, "cannot be read as JSON"),
        ("[" + "1" * 10_000 + "]", "cannot be read as JSON"),
    ],
)
def test_a_file_that_is_no_json(tmp_path, text, says):
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(DataError, match=r"data.json") as caught:
        read_sources([Source(path=f"{tmp_path}/data.json")])
    assert says in str(caught.value)


def test_a_file_that_is_not_utf8_or_not_there(tmp_path):
    (tmp_path / "data.json").write_bytes(b'[{"id": "\xe4"}]')
    with pytest.raises(DataError, match=r"data.json is not UTF-8: byte 9 is 0xe4"):
        read_sources([Source(path=f"{tmp_path}/data.json")])
    with pytest.raises(DataError, match=r"there is no data file .*missing.json"):
        read_sources([Source(path=f"{tmp_path}/missing.json")])
    with pytest.raises(DataError, match="there is no data file"):
        read_sources([Source(path=f"{tmp_path}/*.jsonl")])
    (tmp_path / "data.csv").write_text("id")
    with pytest.raises(DataError, match=r"neither .json nor .jsonl"):
        read_sources([Source(path=f"{tmp_path}/data.csv")])
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(DataError, match=r"folder.json cannot be read: Is a directory"):
        read_sources([Source(path=f"{tmp_path}/folder.json")])
    with pytest.raises(DataError, match="nothing to train on"):
        read_sources([])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("datasets: [", "is not YAML"),
        ("", "is not a mixture"),
        ("datasets: []", "datasets: List should have at least 1 item"),
        ("datasets: [{json_path: a.json, repeat: 2}]", "datasets.0.repeat: Extra inputs"),
        ("datasets: [{json_path: a.json, sampling_strategy: half}]", "unknown sampling 'half'"),
        ("datasets: [{json_path: a.json}]", "there is no data file a.json"),
    ],
)
def test_a_wrong_mixture(tmp_path, text, says):
    (tmp_path / "mixture.yaml").write_text(text)
    with pytest.raises(DataError) as caught:
        read_sources([Source(path=f"{tmp_path}/mixture.yaml")])
    assert says in str(caught.value)


BAD_SAMPLES = {
    "no object": ("text", "malformed", 'must be an object with conversations, not "text"'),
    "null": (None, "malformed", "not null"),
    "no turns": ({"id": 1}, "malformed", "no conversations and no messages"),
    "null turns": ({"conversations": None}, "malformed", "no conversations and no messages"),
    "turns of another kind": ({"conversations": {"a": 1}}, "malformed", '{"a": 1} as its conversations'),
    "empty turns": ({"conversations": []}, "malformed", "[] as its conversations"),
    "turn of another kind": ({"conversations": ["Hello"]}, "malformed", 'conversations[0] is "Hello"'),
    "null text": ({"conversations": turns("Hello", None)}, "roles and turns", "conversations[1] (gpt) has no text"),
    "no role": ({"conversations": [{"value": "Hello"}]}, "roles and turns", "conversations[0] is from None"),
    "role unknown": ({"conversations": [{"from": "bot", "value": "A"}]}, "roles and turns", "is from 'bot'"),
    "twice the same": (
        {"conversations": [*turns("A", "B"), {"from": "gpt", "value": "C"}]},
        "roles and turns",
        "conversations[2] and the turn before it are both from 'gpt'",
    ),
    "only an answer": ({"conversations": [{"from": "gpt", "value": "A"}]}, "roles and turns", "no turn from 'human'"),
    "empty question": ({"conversations": turns("", "B")}, "roles and turns", "message 0 (user) is empty"),
    "late system": (
        {"conversations": [*turns("A", "B"), {"from": "system", "value": "C"}]},
        "roles and turns",
        "a system message can only be the first",
    ),
    "two images, one placeholder": (
        {"image": ["a.jpg", "b.jpg"], "conversations": turns("<image>A", "B")},
        "placeholders",
        "its text has 1 <image> placeholder and it has 2 images",
    ),
    "image without placeholder": (
        {"image": "a.jpg", "conversations": turns("A", "B")},
        "placeholders",
        "no <image> placeholders",
    ),
    "placeholder without image": ({"conversations": turns("<image>\nA", "B")}, "placeholders", "and it has no images"),
    "placeholder in the answer": (
        {"image": "a.jpg", "conversations": turns("A", "<image>B")},
        "placeholders",
        "message 1 (assistant) has <image>: only a question can",
    ),
    "video without placeholder": (
        {"video": "a.mp4", "conversations": turns("A", "B")},
        "placeholders",
        "a video and no placeholders for it",
    ),
    "video marked in the answer": (
        {"video": "a.mp4", "conversations": turns("A", "<image>B")},
        "placeholders",
        "message 1 (assistant) has <video>",
    ),
    "two videos": (
        {"video": ["a.mp4", "b.mp4"], "conversations": turns("<image><image>A", "B")},
        "malformed",
        "2 videos",
    ),
    "image of another kind": ({"image": 7, "conversations": turns("A", "B")}, "malformed", "but has 7"),
    "null among images": ({"image": [None], "conversations": turns("A", "B")}, "malformed", "but has null"),
}


@pytest.mark.parametrize("name", BAD_SAMPLES)
def test_a_bad_sample_is_named_when_it_is_asked_for(tmp_path, name):
    value, kind, says = BAD_SAMPLES[name]
    path = write(tmp_path / "data.json", [sample(), value])
    table = read_sources([Source(path=path)])
    assert table[0].request["images"]
    with pytest.raises(DataError) as caught:
        table[1]
    assert str(caught.value).startswith("data.json[1]")
    assert says in str(caught.value)
    assert caught.value.kind == kind


def test_half_a_surrogate_pair_survives_to_be_refused_later(tmp_path):
    (tmp_path / "data.json").write_text('[{"conversations": [{"from": "human", "value": "\\ud800"}]}]')
    (only,) = read_sources([Source(path=f"{tmp_path}/data.json")])
    assert only.request["messages"][0]["content"] == "\ud800"
