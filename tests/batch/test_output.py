"""The output file: killed in the middle of any write it goes on, and another batch's is left alone."""

from __future__ import annotations

import os
import resource
import signal

import pytest

from llava_fast.batch.output import Output
from llava_fast.errors import BatchError
from tests.batch.conftest import Held, answer, made_up, read

ABOUT = {"INPUT": "a", "--prompt": "hello", "--stop": ("x",)}
ROWS = [{"id": number, "answer": "a\nb"} for number in range(6)]


def write(path, numbers, about=ABOUT, **options) -> Output:
    output = Output(path, about, **options)
    for number in numbers:
        output.add(number, ROWS[number])
    return output


def test_rows_are_in_the_inputs_order_whenever_they_come(tmp_path):
    path = tmp_path / "out.jsonl"
    output = write(path, [3, 1])
    assert path.read_bytes() == b""
    assert (output.rows, output.done, output.waiting) == (0, 2, {1, 3})
    output.add(0, ROWS[0])
    assert read(path) == ROWS[:2]
    output.add(1, {"id": 1, "answer": "another"})
    output.add(0, {"id": 0, "answer": "another"})
    for number in (5, 2, 4):
        output.add(number, ROWS[number])
    output.close()
    assert read(path) == ROWS
    assert sorted(each.name for each in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.run.json"]


def test_what_waits_is_kept_for_the_next_run(tmp_path):
    path = tmp_path / "out.jsonl"
    write(path, [0, 3, 2]).close()
    output = write(path, [])
    assert (output.rows, output.waiting) == (1, {2, 3})
    output.add(1, ROWS[1])
    output.close()
    assert read(path) == ROWS[:4]


def test_a_torn_end_is_mended_at_every_byte(tmp_path):
    """Whatever part of the files' last line is there: the whole lines stay, and a row that lacks only its end too."""
    path = tmp_path / "out.jsonl"
    write(path, [0, 1, 2, 4]).close()
    whole, ahead = path.read_bytes(), (tmp_path / "out.jsonl.ahead").read_bytes()
    second = whole.index(b"\n", whole.index(b"\n") + 1) + 1
    for cut in range(second, len(whole) + 1):
        for kept in (ahead, ahead[: cut % len(ahead)]):
            path.write_bytes(whole[:cut])
            (tmp_path / "out.jsonl.ahead").write_bytes(kept)
            output = write(path, [])
            assert output.rows == 2 + (cut >= len(whole) - 1)
            assert output.waiting == ({4} if len(kept) >= len(ahead) - 1 else set())
            for number in range(6):
                output.add(number, ROWS[number])
            output.close()
            assert read(path) == ROWS


def test_killed_between_its_two_files(tmp_path):
    """A row that waited is in both, or its predecessor came and it did not follow."""
    path = tmp_path / "out.jsonl"
    write(path, [1, 2]).close()
    write(tmp_path / "other.jsonl", [0]).close()
    path.write_bytes((tmp_path / "other.jsonl").read_bytes())
    output = write(path, [])
    assert (output.rows, output.waiting) == (3, set())
    assert read(path) == ROWS[:3]
    assert output.last == ROWS[2]


def test_kills_in_the_middle_of_each_write(pictures, tmp_path, monkeypatch):
    """SIGKILL with a part of the bytes written, in the first write, the second, ...: the next run makes the rows that
    the files lack, each once, and the output is that of a run that was let alone."""
    whole = tmp_path / "whole.jsonl"
    answer(Held(), pictures, whole, runs=made_up)
    kills = 0
    for writes in range(1, 40):
        path, log = tmp_path / f"{writes}.jsonl", tmp_path / f"{writes}.log"
        if (child := os.fork()) == 0:
            _dies(writes, path, log, pictures)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            assert os.waitstatus_to_exitcode(status) == 0
            break
        kills += 1
        held = path.read_bytes() + (tmp_path / f"{writes}.jsonl.ahead").read_bytes()
        made = set(log.read_text().split()) if log.exists() else set()
        answer(Held(), pictures, path, runs=logged(log))
        assert path.read_bytes() == whole.read_bytes()
        again = [name for name in log.read_text().split()[len(made) :] if name in made]
        assert len(again) <= 1  # the one whose row was torn
        assert all(f'"id": "{name}", "answer": "of {name}: ünïcode "'.encode() not in held for name in again)
    assert kills >= 9


def logged(log):
    def runs(*given):
        for rows in made_up(*given):
            with open(log, "a") as file:
                file.writelines(f"{row['id']}\n" for _, row in rows)
            yield rows

    return runs


def _dies(writes, path, log, pictures):
    count, real = 0, os.write

    def torn(file, data):
        nonlocal count
        count += 1
        if count == writes:
            real(file, data[: len(data) * (count % 4) // 4])
            os.kill(os.getpid(), signal.SIGKILL)
        return real(file, data)

    try:
        os.write = torn
        answer(Held(), pictures, path, runs=logged(log))
        os._exit(0)
    finally:
        os._exit(1)


def test_another_batch_is_refused_by_what_differs(tmp_path):
    path = tmp_path / "out.jsonl"
    write(path, [0]).close()
    before = path.read_bytes()
    with pytest.raises(BatchError, match=r'another --prompt \("hello" then, "bye" now\): give the same'):
        write(path, [], {**ABOUT, "--prompt": "bye"})
    with pytest.raises(BatchError, match=r"another INPUT \(its files have changed\)"):
        write(path, [], {**ABOUT, "INPUT": "b"})
    assert path.read_bytes() == before
    write(path, [], ABOUT).close()
    write(path, [0, 1], {**ABOUT, "--prompt": "bye"}, overwrite=True).close()
    assert read(path) == ROWS[:2]


def test_files_that_no_batch_wrote(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("mine\n")
    with pytest.raises(BatchError, match="no batch of llava-fast wrote it"):
        write(path, [])
    assert path.read_text() == "mine\n"
    (tmp_path / "empty.jsonl").touch()
    write(tmp_path / "empty.jsonl", [0]).close()

    path = tmp_path / "out.jsonl"
    write(path, [0, 1, 2]).close()
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\0\0\n" + lines[2])
    with pytest.raises(BatchError, match=r"line 2 of .*out\.jsonl is damaged"):
        write(path, [])
    (tmp_path / "out.jsonl.run.json").write_text("{")
    with pytest.raises(BatchError, match="is damaged"):
        write(path, [])


def test_places_that_cannot_be_written(tmp_path):
    with pytest.raises(BatchError, match="there is no folder"):
        write(tmp_path / "missing" / "out.jsonl", [])
    for path in (tmp_path, "/dev/full"):
        with pytest.raises(BatchError, match="no regular file"):
            write(path, [])


def test_one_process_writes_at_a_time(tmp_path):
    output = write(tmp_path / "out.jsonl", [0])
    with pytest.raises(BatchError, match="another process writes"):
        write(tmp_path / "out.jsonl", [])
    output.close()
    write(tmp_path / "out.jsonl", [1]).close()
    assert read(tmp_path / "out.jsonl") == ROWS[:2]


def test_a_full_disk(tmp_path):
    """The process's limit on file sizes stands for one: a write is cut off in the middle, the file is not."""
    path = tmp_path / "out.jsonl"
    if (child := os.fork()) == 0:
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            output = write(path, [])
            resource.setrlimit(resource.RLIMIT_FSIZE, (40, resource.RLIM_INFINITY))
            output.add(0, ROWS[0])
            with pytest.raises(BatchError, match=r"cannot be written \(File too large\): mend that"):
                output.add(1, ROWS[1])
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert read(path) == ROWS[:1]
    output = write(path, range(6))
    output.close()
    assert read(path) == ROWS


def test_no_output_without_a_row(tmp_path):
    write(tmp_path / "out.jsonl", []).close()
    assert not list(tmp_path.iterdir())


def test_names_that_are_no_text(tmp_path):
    """A file name may hold bytes that are no UTF-8."""
    path = tmp_path / "out.jsonl"
    row = {"id": os.fsdecode(b"caf\xe9.png"), "answer": "é"}
    output = Output(path, ABOUT)
    output.add(0, row)
    output.close()
    assert read(path) == [row]
    assert Output(path, ABOUT).last == row


def test_what_waits_for_long_is_forgotten_once_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("llava_fast.batch.output.MOST_STALE", 50)
    path = tmp_path / "out.jsonl"
    output = write(path, [1, 2, 3, 0])
    assert (tmp_path / "out.jsonl.ahead").read_bytes() == b""
    output.add(5, ROWS[5])
    os.close(output._file)  # as a kill does
    os.close(output._ahead)
    output = write(path, [4])
    output.close()
    assert read(path) == ROWS
