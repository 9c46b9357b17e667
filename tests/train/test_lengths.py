"""Measuring samples: their exact numbers of rows, every kind of invalid file, and a cache that is invalidated."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from llava_fast.inputs.chat.rendering import Segment, builtin_template
from llava_fast.train.data.lengths import measure
from llava_fast.train.data.samples import Source, read_sources
from tests.support import tiny


@pytest.fixture(scope="module")
def processor():
    return dataclasses.replace(tiny.pair("next").ours.processor, template=builtin_template("vicuna_v1"))


@pytest.fixture
def folder(tmp_path):
    """Pictures of every kind, good and bad."""
    for name, size in {"a.jpg": (80, 120), "b.png": (60, 60)}.items():
        Image.fromarray(tiny.picture(*size)).save(tmp_path / name)
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    (tmp_path / "folder.jpg").mkdir()
    return tmp_path


def sample(image="a.jpg", question="What?", answer="A cat.", **others):
    placeholders = "<image>\n" * (len(image) if isinstance(image, list) else image is not None)
    turns = [{"from": "human", "value": placeholders + question}, {"from": "gpt", "value": answer}]
    return {"image": image, "conversations": turns, **others}


def table_of(folder, *values):
    (folder / "data.json").write_text(json.dumps(values))
    return read_sources([Source(path=f"{folder}/data.json")])


GOOD = [sample(), sample(["a.jpg", "b.png"]), sample(None), sample(answer="A long answer " * 20)]


@pytest.mark.parametrize("workers", [0, 2])
def test_lengths_are_the_plans(folder, processor, workers):
    table = table_of(folder, *GOOD * 10)
    found = measure(table, processor, "answers", workers, progress=False)
    assert not found.problems
    assert found.text.dtype == np.int32
    for number in range(4):
        plan = processor.prepare([table[number].request], labels=True).plan
        assert found.text[number] + found.visual[number] == plan.lengths[0]
        assert found.text[number] > 0
        assert found.supervised[number] == len(plan.column("supervised_row")) > 0
        assert (found.visual[number] > 0) == (number != 2)
    for rows in (found.text, found.visual, found.supervised):
        assert (rows.reshape(10, 4) == rows[:4]).all()


def test_a_video_is_a_file_or_a_folder_of_frames(folder):
    processor = dataclasses.replace(tiny.pair("video").ours.processor, template=builtin_template("vicuna_v1"))
    (folder / "frames").mkdir()
    for number in range(20):
        Image.fromarray(tiny.picture(50, 60, number)).save(folder / "frames" / f"{number:02d}.png")
    values = [sample(None, "<image>\nWhat?", video="frames"), sample(None, "<video>\nWhat?", video="frames")]
    for decode in (False, True):
        found = measure(table_of(folder, *values), processor, "answers", 0, decode=decode, progress=False)
        assert not found.problems
        assert found.visual.tolist() == [16 * 3 * 3] * 2


def test_the_context_length_plays_no_part(folder, processor):
    short = dataclasses.replace(processor, max_rows=8)
    found = measure(table_of(folder, *GOOD), short, "answers", 0, progress=False)
    assert not found.problems
    assert (found.text + found.visual > 8).all()


BAD = {
    "missing image": (sample("no.jpg"), "missing file", "no image or video file"),
    "zero-size file": (sample("empty.jpg"), "unreadable file", "is empty (0 bytes)"),
    "not an image": (sample("page.jpg"), "unreadable file", "is not an image"),
    "a folder": (sample("folder.jpg"), "unreadable file", "is a folder"),
    "web address": (sample("http://a.b/c.jpg"), "unreadable file", "is a web address"),
    "second image missing": (sample(["a.jpg", "no.jpg"]), "missing file", "no.jpg"),
    "video missing": (sample(None, "<video>\nWhat?", video="no.mp4"), "missing file", "no.mp4"),
    "wrong order": (
        {"conversations": [{"from": "gpt", "value": "A"}, {"from": "gpt", "value": "B"}]},
        "roles and turns",
        "no turn from 'human'",
    ),
    "empty answer": (sample(answer=""), "cannot be masked", "nothing to learn from"),
    "no answer": ({"conversations": [{"from": "human", "value": "A"}]}, "cannot be masked", "nothing to learn from"),
    "half a surrogate": (sample(question="\ud800"), "cannot be masked", "half a surrogate pair"),
    "placeholders": (sample(None, "<image>What?"), "placeholders", "1 <image> placeholder and it has no images"),
    "malformed": ("text", "malformed", "must be an object"),
}


def test_every_bad_sample_is_found_and_none_hides_the_others(folder, processor):
    values = [value for value, _, _ in BAD.values()]
    found = measure(table_of(folder, *values, sample()), processor, "answers", 0, progress=False)
    assert list(found.problems) == list(range(len(BAD)))
    for number, (name, (_, kind, says)) in enumerate(BAD.items()):
        problem = found.problems[number]
        assert problem.startswith(f"data.json[{number}]: "), name
        assert says in problem, name
        assert problem.count("data.json") == 1, name
        assert found.kinds[number] == kind, name
    assert (found.text[:-1] == 0).all()
    assert (found.visual[:-1] == 0).all()
    assert found.text[-1] > 0


def test_a_truncated_file_is_found_when_pixels_are_read(folder, processor):
    (folder / "film.mp4").write_bytes(b"no film")
    values = [sample("cut.jpg"), sample(None, "<video>\nWhat?", video="film.mp4"), sample()]
    found = measure(table_of(folder, *values), processor, "answers", 0, decode=True, progress=False)
    assert found.kinds == {0: "unreadable file", 1: "unreadable file"}
    assert "cannot be decoded" in found.problems[0]
    assert "cannot be read as a video" in found.problems[1]
    for reader in (processor, None):  # the header is whole, and says all that a length needs
        found = measure(table_of(folder, *values), reader, "answers", 0, progress=False)
        assert list(found.problems) == [1]
        assert reader is None or found.visual[0] == found.visual[2] > 0


def test_labels_of_the_original_trainers(folder, processor):
    qwen = dataclasses.replace(processor, template=builtin_template("qwen_1_5"))
    table = table_of(folder, *GOOD)
    ours, originals = (measure(table, qwen, labels, 0, progress=False) for labels in ("answers", "original"))
    assert (originals.supervised > ours.supervised).all()
    assert (originals.text == ours.text).all()


def test_without_a_model_files_and_turns_are_looked_at(folder):
    values = [sample("no.jpg"), sample("cut.jpg"), sample(None, "<image>"), sample()]
    found = measure(table_of(folder, *values), None, "answers", 0, decode=True, progress=False)
    assert list(found.kinds.values()) == ["missing file", "unreadable file", "placeholders"]
    assert not found.text.any()


def test_a_template_that_marks_no_answer_is_a_problem(folder, processor):
    class Unmarked:
        def without_videos(self):
            return self

        def segments(self, messages, add_generation_prompt):
            return [Segment("hello")]

    found = measure(
        table_of(folder, sample(None)),
        dataclasses.replace(processor, template=Unmarked()),
        "answers",
        0,
        progress=False,
    )
    assert found.kinds == {0: "cannot be masked"}
    assert found.text[0] == 0


def test_an_error_nobody_thought_of_is_a_problem_of_its_sample(folder, processor, monkeypatch):
    def refuse(source, exif):
        raise ZeroDivisionError("by zero") if source.endswith("b.png") else MemoryError

    monkeypatch.setattr("llava_fast.train.data.lengths.open_image", refuse)
    found = measure(
        table_of(folder, sample("b.png"), sample(None)), processor, "answers", 0, decode=True, progress=False
    )
    assert found.kinds == {0: "unexpected"}
    assert found.problems[0] == "data.json[0]: ZeroDivisionError: by zero"
    with pytest.raises(MemoryError):  # is the machine's fault, not the sample's
        measure(table_of(folder, sample("a.jpg")), processor, "answers", 0, decode=True, progress=False)


@pytest.fixture
def looked_at(monkeypatch):
    """Numbers of the samples that are measured, not taken from the cache."""
    from llava_fast.train.data import lengths

    seen = []
    measured = lengths._Chunks._measured
    monkeypatch.setattr(
        lengths._Chunks, "_measured", lambda self, number: seen.append(number) or measured(self, number)
    )
    return seen


def same(one, other):
    rows = all((getattr(one, name) == getattr(other, name)).all() for name in ("text", "visual", "supervised"))
    return rows and one.problems == other.problems and one.kinds == other.kinds


def test_what_was_found_is_kept_and_problems_are_looked_at_again(folder, processor, looked_at):
    table, cache = table_of(folder, sample(), sample("late.png"), sample(None)), folder / "lengths"
    first = measure(table, processor, "answers", 0, cache, progress=False)
    assert looked_at == [0, 1, 2]
    assert list(first.problems) == [1]
    looked_at.clear()
    assert same(measure(table, processor, "answers", 0, cache, again=False, progress=False), first)
    assert not looked_at
    Image.fromarray(tiny.picture(60, 60)).save(folder / "late.png")
    second = measure(table, processor, "answers", 0, cache, progress=False)
    assert looked_at == [1]
    assert not second.problems
    assert not second.kinds
    assert second.visual[1] > 0
    looked_at.clear()
    assert same(measure(table, processor, "answers", 0, cache, progress=False), second)
    assert not looked_at
    assert len(list(cache.iterdir())) == 1


def test_what_was_kept_serves_nothing_else(folder, processor, looked_at):
    table, cache = table_of(folder, sample()), folder / "lengths"
    measure(table, processor, "answers", 0, cache, progress=False)
    others = [
        (table, dataclasses.replace(processor, template=builtin_template("mistral_instruct")), "answers"),
        (table, dataclasses.replace(processor, geometry=tiny.pair("llava15").ours.processor.geometry), "answers"),
        (table, dataclasses.replace(processor, tokenizer=tiny.tokenizer(bos=False)), "answers"),
        (table, processor, "original"),
        (table, None, "answers"),
        (table_of(folder, sample(question="Why?")), processor, "answers"),
    ]
    for number, (data, reader, labels) in enumerate(others):
        looked_at.clear()
        measure(data, reader, labels, 0, cache, progress=False)
        assert looked_at == [0], f"other {number} was served by the first one's file"
    looked_at.clear()
    measure(table, dataclasses.replace(processor, max_rows=7, threads=3), "answers", 0, cache, progress=False)
    assert looked_at == []


def test_a_full_look_serves_a_quick_one_but_not_the_other_way_round(folder, processor, looked_at):
    table, cache = table_of(folder, sample()), folder / "lengths"
    measure(table, processor, "answers", 0, cache, progress=False)
    measure(table, processor, "answers", 0, cache, decode=True, progress=False)
    assert looked_at == [0, 0]
    measure(table, processor, "answers", 0, cache, progress=False)
    assert looked_at == [0, 0]


def test_a_broken_file_is_measured_anew(folder, processor, looked_at):
    table, cache = table_of(folder, sample()), folder / "lengths"
    first = measure(table, processor, "answers", 0, cache, progress=False)
    (file,) = cache.iterdir()
    for broken in (b"", file.read_bytes()[:100], b"no zip"):
        file.write_bytes(broken)
        assert same(measure(table, processor, "answers", 0, cache, progress=False), first)
    assert looked_at == [0] * 4
