"""A batch on Ray: two workers on this machine, one of which is killed, give the file of one process. Skipped without
Ray, which the `test` extra brings."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from llava_fast.batch import job
from llava_fast.batch.cluster import Cluster, _Reading, polled
from llava_fast.batch.items import Item
from llava_fast.batch.source import open_source
from tests.batch.conftest import answer, write_csv
from tests.support import tiny


def test_chunks_are_of_bounded_rows_and_bytes(pictures, monkeypatch):
    monkeypatch.setattr("llava_fast.batch.cluster.CHUNK_ITEMS", 3)
    source = open_source(str(pictures))
    reading = _Reading(source, 1, 8, frozenset({2, 5}))
    chunks = [[item.number for item in chunk] for chunk in reading.chunks()]
    assert chunks == [[1, 3, 4], [6, 7]]

    class Large:
        def items(self, first):
            return (Item(number, number, images=(b"x" * 400,)) for number in range(first, 5))

    monkeypatch.setattr("llava_fast.batch.cluster.CHUNK_BYTES", 700)
    assert [len(chunk) for chunk in _Reading(Large(), 0, None, frozenset()).chunks()] == [2, 2, 1]


def test_waiting_for_rows_can_be_interrupted():
    def slow():
        yield 1
        time.sleep(0.05)
        yield 2
        raise KeyError("gone")

    rows = polled(slow(), 0.01)
    assert [each for each in itertools.takewhile(lambda each: each != 2, rows) if each is not None] == [1]
    with pytest.raises(KeyError, match="gone"):
        next(rows)
    assert None in itertools.islice(polled(slow(), 0.01), 2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> job.ModelSpec:
    folder = tmp_path_factory.mktemp("model")
    tiny.save(tiny.CASES["next"], tiny.hf_model(tiny.CASES["next"]), folder)
    return job.ModelSpec(str(folder), {"device": "cpu"})


@pytest.fixture(scope="module")
def ray():
    """Ray on this machine, for all tests of this file: it takes seconds to start."""
    ray = pytest.importorskip("ray", reason="Ray is not installed (pip install 'llava_fast[ray]')")
    pytest.importorskip("ray.data")
    environment = {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    os.environ.update(environment)
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()
    for name in environment:
        del os.environ[name]


@pytest.mark.timeout(600)
def test_two_workers_one_of_them_killed(ray, saved, pictures, tmp_path):
    """The rows of a stopped run stay, a worker that dies is started anew, and the file is that of one process."""
    listed = [{"id": n, "image": f"pictures/{n % 9}.png", "question": f"hello {n}"} for n in range(60)]
    for row in listed:
        if int(row["image"][9]) % 4 == 1:
            row["image"] = row["image"].replace("pictures/", "pictures/below/")
    listed[7]["image"] = "pictures/missing.png"
    table = write_csv(tmp_path / "rows.csv", listed)
    options = {"prompt": "{question}", "batch_invariant": True, "sampling": {"temperature": 1.0}}
    whole = tmp_path / "whole.jsonl"
    assert answer(saved, table, whole, **options).errors == 1

    killed: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llava_fast.batch.cluster.CHUNK_ITEMS", 5)
        path = tmp_path / "ray.jsonl"
        answer(saved, table, path, limit=4, **options)
        killer = threading.Thread(target=_kill_a_worker, args=(killed,), daemon=True)
        killer.start()
        result = answer(saved, table, path, runs=Cluster(workers=2), **options)
    assert killed, "no worker was seen"
    assert path.read_bytes() == whole.read_bytes()
    assert (result.rows, result.errors, result.answered) == (60, 1, 56)


def _kill_a_worker(killed: list[int]) -> None:
    """SIGKILL for the first actor that answers."""
    deadline = time.monotonic() + 300
    while not killed and time.monotonic() < deadline:
        for process in Path("/proc").iterdir():
            try:
                name = (process / "cmdline").read_bytes()
                if process.name.isdigit() and b"MapWorker" in name and _is_ours(int(process.name)):
                    time.sleep(2.0)
                    os.kill(int(process.name), signal.SIGKILL)
                    killed.append(int(process.name))
                    return
            except OSError:
                continue
        time.sleep(0.05)


def _is_ours(process: int) -> bool:
    """Whether it descends from this process."""
    while process > 1:
        if process == os.getpid():
            return True
        process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    return False
