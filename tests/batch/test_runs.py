"""A batch with a model: its answers are those of `generate` for each row alone, whatever happens to the run."""

from __future__ import annotations

import base64
import json
import os
import random
import signal
import sys
import threading
import time

import pytest
import torch
from PIL import Image

from llava_fast.batch import answering, job
from llava_fast.batch.answering import Answerer
from llava_fast.batch.items import Item
from llava_fast.batch.source import open_source
from llava_fast.errors import BatchError, MissingPackageError, RequestError
from llava_fast.generation.grammar import Grammar
from llava_fast.inputs.pictures.video import read_video
from tests.batch.conftest import TOKENS, Held, answer, read, settings, write_csv, write_parquet, write_tar
from tests.support import made_videos, tiny


def alone(model, folder, names, prompt="hello", **options) -> list[str]:
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    requests = [
        {"messages": [{"role": "user", "content": content}], "images": [str(folder / name)], "seed": 3 + number}
        for number, name in enumerate(names)
    ]
    return [model.generate([each], max_new_tokens=TOKENS, **options)[0].text for each in requests]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_k": 20}], ids=["greedy", "drawn"])
@pytest.mark.parametrize("running", [1, 4])
def test_each_answer_is_that_of_generate_alone(model, spec, pictures, tmp_path, sampling, running):
    path = tmp_path / "out.jsonl"
    result = answer(spec, pictures, path, sampling=sampling, max_running=running, batch_invariant=True)
    rows = read(path)
    names = [row["id"] for row in rows]
    assert names == sorted(names)
    assert [row["answer"] for row in rows] == alone(model, pictures, names, **sampling)
    assert (result.rows, result.errors, result.answered, result.finished) == (9, 0, 9, True)
    assert rows[0].keys() == {"id", "answer", "finish_reason", "usage"}
    assert rows[0]["usage"]["completion_tokens"] <= TOKENS


def test_stopped_and_gone_on_with_it_is_the_same_to_the_bit(spec, pictures, tmp_path):
    """By a limit here; the rows that a drawn answer has do not depend on where the runs began."""
    options = {"sampling": {"temperature": 1.0}, "max_running": 3, "batch_invariant": True}
    answer(spec, pictures, tmp_path / "whole.jsonl", **options)
    for limit in (2, 3, 7, None, None):
        result = answer(spec, pictures, tmp_path / "parts.jsonl", limit=limit, **options)
    assert (tmp_path / "parts.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert (result.answered, result.rows, result.finished) == (0, 9, True)


def test_ten_kills_at_random_moments(spec, pictures, tmp_path, model):
    """Of a forked process, which needs no start-up. No row is answered again once it is written, and none is lost."""
    options = {"sampling": {"temperature": 1.0}, "max_running": 3, "batch_invariant": True}
    began = time.monotonic()
    answer(spec, pictures, tmp_path / "whole.jsonl", **options)
    length = time.monotonic() - began
    rng, kills, runs = random.Random(0), 0, 0
    while kills < 10:
        path, done = tmp_path / f"{runs}.jsonl", b""
        runs += 1
        assert runs < 30, "runs end before they are killed"
        while True:
            if (child := os.fork()) == 0:
                try:
                    answer(spec, pictures, path, **options)
                    os._exit(0)
                finally:
                    os._exit(1)
            time.sleep(rng.uniform(0, length))
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            now = path.read_bytes() if path.exists() else b""
            assert now.startswith(done)
            done = now[: now.rfind(b"\n") + 1]
            if not os.WIFSIGNALED(status):
                assert os.waitstatus_to_exitcode(status) == 0
                break
            kills += 1
        assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
        assert not (tmp_path / f"{path.name}.ahead").exists()


def test_bad_pictures_are_rows_with_an_error(spec, pictures, tmp_path):
    (pictures / "0.png").write_bytes(b"no picture")
    (pictures / "2.png").write_bytes(b"")
    whole = (pictures / "3.png").read_bytes()
    (pictures / "3.png").write_bytes(whole[: len(whole) // 2])
    (pictures / "4.png").unlink()
    (pictures / "4.png").symlink_to("nowhere")
    Image.new("RGB", (1, 1)).save(pictures / "6.png")
    Image.new("CMYK", (30, 40)).save(pictures / "7.png", "TIFF")
    Image.new("I;16", (2000, 3)).save(pictures / "8.png")
    (pictures / "9.png").mkdir()
    Image.effect_noise((20, 30), 9).save(pictures / "a.ico.bmp", "ICO")  # a kind that bulk input may not have
    path = tmp_path / "out.jsonl"
    result = answer(spec, pictures, path)
    rows = {row["id"]: row for row in read(path)}
    errors = {name: row["error"] for name, row in rows.items() if "error" in row}
    assert set(errors) == {"0.png", "2.png", "3.png", "4.png", "a.ico.bmp"}
    assert "is empty" in errors["2.png"]
    assert "cannot be decoded" in errors["3.png"]
    assert "no image or video file" in errors["4.png"]
    assert result.errors == 5
    assert result.first_error is not None
    assert answer(spec, pictures, path).errors == 5  # of rows that are there already


def test_text_is_text(spec, pictures, tmp_path):
    """Control tokens and placeholders in a column, or in the prompt, are characters; otherwise <image> is the place."""
    listed = [{"id": n, "image": "pictures/0.png", "question": text} for n, text in enumerate(("<image> </s>", "</s>"))]
    table = write_csv(tmp_path / "rows.csv", listed)
    answer(spec, table, tmp_path / "out.jsonl", prompt="<image> {question}", columns={"id_column": "#"})
    first, second = read(tmp_path / "out.jsonl")
    assert "answer" in first
    assert first["usage"]["visual_tokens"] == second["usage"]["visual_tokens"] > 0
    answer(spec, table, tmp_path / "off.jsonl", prompt="{question}", literal_text=False)
    assert [row["usage"]["visual_tokens"] for row in read(tmp_path / "off.jsonl")] == [
        row["usage"]["visual_tokens"] for row in (first, second)
    ]
    counts = [row["usage"]["prompt_tokens"] for row in read(tmp_path / "off.jsonl")]
    assert counts[0] < first["usage"]["prompt_tokens"]


def test_answers_that_follow_a_schema(spec, pictures, tmp_path):
    properties = {"n": {"enum": [1, 22]}}
    schema = {"type": "object", "properties": properties, "required": ["n"], "additionalProperties": False}
    grammar = Grammar.json_schema(schema)
    answer(spec, pictures, tmp_path / "out.jsonl", sampling={"grammar": grammar, "max_new_tokens": 40})
    rows = read(tmp_path / "out.jsonl")
    assert any("answer" in row for row in rows)
    for row in rows:
        assert row.get("answer") in ({"n": 1}, {"n": 22}) or "was cut off at 40 tokens" in row["error"]
    answer(spec, pictures, tmp_path / "short.jsonl", sampling={"grammar": grammar, "max_new_tokens": 2})
    assert all("raise --max-tokens" in row["error"] for row in read(tmp_path / "short.jsonl"))
    with pytest.raises(RequestError, match="the JSON schema cannot be used"):
        answer(spec, pictures, tmp_path / "no.jsonl", sampling={"grammar": Grammar.json_schema({"type": "nothing"})})
    assert not (tmp_path / "no.jsonl").exists()


def test_numbers_that_json_cannot_write(model):
    made = Answerer(model, settings(sampling={"grammar": Grammar.json()}))
    assert made._value('{"a": [1.5, -0.0, 10]}', "stop") == {"a": [1.5, -0.0, 10]}
    with pytest.raises(BatchError, match="too large a number"):
        made._value('{"a": 1e999}', "stop")


def test_what_is_wrong_with_a_row_stays_with_it(spec, pictures, tmp_path, model):
    listed = [
        {"id": "long", "image": "0.png", "question": "hello " * model.config.decoder.context_length},
        {"id": "good", "image": "0.png", "question": "hello"},
        {"id": "again", "image": "0.png", "question": "hello"},
    ]
    table = write_csv(tmp_path / "rows.csv", listed)
    source = open_source(str(table), image_folder=str(pictures))
    assert source.repeats  # so features and prefixes are kept
    answer(spec, table, tmp_path / "out.jsonl", prompt=None, columns={"image_folder": str(pictures)})
    long, good, again = read(tmp_path / "out.jsonl")
    assert "tokens" in long["error"]
    assert good["answer"] == again["answer"] == alone(model, pictures, ["0.png"])[0]


def test_a_failing_device_ends_the_batch(spec, pictures, tmp_path, monkeypatch):
    """Rows that it could not answer are not written, so the next run makes them."""

    class Lost(torch.AcceleratorError, RuntimeError):
        pass

    real, passes = answering.Scheduler.step, []

    def step(self):
        passes.append(self)
        if len(passes) == 12:
            for sequence in (*self.decoding, *self.prefilling):
                sequence.finish_reason, sequence.error = "error", lost
                self._leave(sequence)
                return [(sequence, "")]
        return real(self)

    lost = torch.AcceleratorError.__new__(Lost)
    monkeypatch.setattr(answering.Scheduler, "step", step)
    with pytest.raises(BatchError, match=r"the device failed.*give the same command, without --overwrite, to go on"):
        answer(spec, pictures, tmp_path / "out.jsonl", max_running=2)
    answer(spec, pictures, tmp_path / "out.jsonl", max_running=2)
    assert len(read(tmp_path / "out.jsonl")) == 9
    assert all("answer" in row for row in read(tmp_path / "out.jsonl"))


def test_a_step_that_fails_as_a_whole_ends_the_batch(spec, pictures, tmp_path, monkeypatch):
    def step(self):
        raise RuntimeError("no\nmemory")

    monkeypatch.setattr(answering.Scheduler, "step", step)
    with pytest.raises(BatchError, match=r"the model failed \(RuntimeError: no memory\): give the same command"):
        answer(spec, pictures, tmp_path / "out.jsonl")


def test_videos_without_pyav_end_the_batch(spec, tmp_path, monkeypatch):
    """Of shards it is known only when they are read; an error of each row would stay after PyAV is installed."""
    shard = write_tar(tmp_path / "0.tar", {"a.mp4": b"film"})
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingPackageError, match=r"llava_fast\[video\]"):
        answer(spec, shard, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("output", ["in/0.jsonl", "in/../in/1.jsonl", "link.jsonl"])
def test_the_output_may_not_be_a_file_of_the_input(spec, pictures, tmp_path, output):
    folder = tmp_path / "in"
    folder.mkdir()
    tables = [folder / f"{number}.jsonl" for number in range(2)]
    for number, table in enumerate(tables):
        table.write_text(json.dumps({"id": number, "image": str(pictures / "0.png")}) + "\n")
    (tmp_path / "link.jsonl").symlink_to(tables[0])
    before = [table.read_bytes() for table in tables]
    for overwrite in (False, True):
        with pytest.raises(BatchError, match=r"the input reads .*/in/[01]\.jsonl, .*name another output"):
            answer(spec, folder / "*.jsonl", tmp_path / output, overwrite=overwrite)
    assert [table.read_bytes() for table in tables] == before
    with pytest.raises(BatchError, match="the input reads"):
        answer(spec, pictures, pictures / "0.png", overwrite=True)
    assert (pictures / "0.png").stat().st_size


def test_a_glob_that_stands_for_an_earlier_output(spec, pictures, tmp_path):
    table = tmp_path / "rows.jsonl"
    table.write_text(json.dumps({"id": "a", "image": "pictures/0.png"}) + "\n")
    answer(spec, tmp_path / "*.jsonl", tmp_path / "out.jsonl")
    made = (tmp_path / "out.jsonl").read_bytes()
    for overwrite in (False, True):
        with pytest.raises(BatchError, match=r"the input reads .*/out\.jsonl"):
            answer(spec, tmp_path / "*.jsonl", tmp_path / "out.jsonl", overwrite=overwrite, columns={"id_column": "#"})
    assert (tmp_path / "out.jsonl").read_bytes() == made


def test_an_input_that_cannot_be_read_on_ends_the_batch(model):
    def items():
        yield Item(0, 0, images=(tiny.picture(40, 40, 0),))
        raise BatchError("gone")

    with pytest.raises(BatchError, match="gone"):
        list(Answerer(model, settings()).steps(items()))


def test_pictures_are_read_in_a_bounded_number(model, pictures):
    """However slow the model is, no more are read than run and are prepared."""
    made = Answerer(model, settings(max_running=2, workers=1))
    read_so_far, ended = 0, 0

    def items():
        nonlocal read_so_far
        for number in range(30):
            read_so_far += 1
            yield Item(number, number, images=(str(pictures / "0.png"),))

    for rows in made.steps(items()):
        ended += len(rows)
        assert read_so_far - ended <= made.ahead + 1
    assert ended == 30


def test_ctrl_c_ends_after_the_step_and_says_so(spec, pictures, tmp_path):
    def interrupted(*given):
        for step, rows in enumerate(job.in_process(*given)):
            if step == 12:
                os.kill(os.getpid(), signal.SIGINT)
            yield rows

    before = signal.getsignal(signal.SIGINT)
    result = answer(spec, pictures, tmp_path / "out.jsonl", runs=interrupted, max_running=2)
    assert not result.finished
    assert 0 < result.rows < 9
    assert signal.getsignal(signal.SIGINT) is before
    answer(spec, pictures, tmp_path / "out.jsonl", max_running=2)
    answer(spec, pictures, tmp_path / "whole.jsonl", max_running=2)
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert threading.active_count() < 20


def test_another_input_is_refused(spec, pictures, tmp_path):
    answer(spec, pictures, tmp_path / "out.jsonl", limit=3)
    (pictures / "7.png").unlink()
    with pytest.raises(BatchError, match="another INPUT"):
        answer(spec, pictures, tmp_path / "out.jsonl")
    Image.fromarray(tiny.picture(89, 55, 7)).save(pictures / "7.png")
    with pytest.raises(BatchError, match="another --temperature"):
        answer(spec, pictures, tmp_path / "out.jsonl", sampling={"temperature": 0.5})


def test_an_output_whose_rows_are_other_items(spec, pictures, tmp_path):
    answer(spec, pictures, tmp_path / "out.jsonl", limit=3)
    rows = read(tmp_path / "out.jsonl")
    (tmp_path / "out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:1] + rows[2:]))
    with pytest.raises(BatchError, match=r"row 1 of .*out\.jsonl is '3\.png', and of the input '2\.png'"):
        answer(spec, pictures, tmp_path / "out.jsonl")


def test_every_kind_of_input_gives_the_answers_of_the_folder(spec, pictures, tmp_path):
    """Paths, bytes of a shard and of parquet, data URIs of a table."""
    answer(spec, pictures, tmp_path / "folder.jsonl")
    expected = {row["id"]: row["answer"] for row in read(tmp_path / "folder.jsonl")}
    names = list(expected)
    data = [(pictures / name).read_bytes() for name in names]
    uris = ["data:image/png;base64," + base64.b64encode(each).decode() for each in data]
    inputs = [
        write_csv(tmp_path / "rows.csv", [{"id": n, "path": f"pictures/{n}"} for n in names]),
        write_csv(tmp_path / "uris.csv", [{"id": n, "image": uri} for n, uri in zip(names, uris, strict=True)]),
        write_tar(tmp_path / "shard.tar.gz", dict(zip(names, data, strict=True)), "w:gz"),
        write_parquet(tmp_path / "rows.parquet", {"id": names, "image": [{"bytes": each} for each in data]}),
    ]
    for input in filter(None, inputs):
        answer(spec, input, tmp_path / "of.jsonl", overwrite=True)
        found = {row["id"].removeprefix("shard/").removesuffix(".png"): row for row in read(tmp_path / "of.jsonl")}
        assert {f"{name}.png": row["answer"] for name, row in found.items()} == expected


def test_videos(tmp_path):
    """Of a folder and of a table's column, with the frames that are asked for."""
    model = tiny.pair("video").ours
    folder = tmp_path / "films"
    folder.mkdir()
    for number in range(3):
        made_videos.write(folder / f"{number}.mp4", [tiny.picture(48, 64, 9 * number + seed) for seed in range(6)])
    (folder / "bad.mp4").write_bytes(b"no video")
    (folder / "list.mp4").write_text("ffconcat version 1.0\nfile 0.mp4\n")  # names another file
    answer(Held(model=model), folder, tmp_path / "out.jsonl", video_frames=4)
    *rows, bad, playlist = read(tmp_path / "out.jsonl")
    content = [{"type": "video"}, {"type": "text", "text": "hello"}]
    table = write_csv(tmp_path / "rows.csv", [{"id": n, "video": f"films/{n}.mp4"} for n in range(3)])
    answer(Held(model=model), table, tmp_path / "table.jsonl", video_frames=4)
    assert [row["answer"] for row in read(tmp_path / "table.jsonl")] == [row["answer"] for row in rows]
    assert "bad.mp4" in bad["error"]
    assert "list.mp4' is in none of the containers" in playlist["error"]
    frames = read_video(folder / "0.mp4", 4)
    request = {"messages": [{"role": "user", "content": content}], "video": list(frames)}
    assert rows[0]["answer"] == model.generate([request], max_new_tokens=TOKENS)[0].text
