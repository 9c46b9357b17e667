"""Files of verdicts: found again by the same machine, readable, whole under two writers, harmless when damaged."""

import json
import multiprocessing
import os

import pytest
import torch

from llava_fast.errors import BackendError
from llava_fast.ops.selection import machine, store
from llava_fast.ops.selection.verdict import Verdict

MACHINE = {"device": "NVIDIA A100-SXM4-80GB", "multiprocessors": "108", "driver": "550.54", "kernels": "0123"}
VERDICT = Verdict(backend="triton", configs={"k": {"BLOCK": 64}}, error=1e-3, ms=0.1, reference_ms=0.2, by="tune")


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("LLAVA_FAST_CACHE", str(tmp_path))
    return tmp_path / "selection"


def keep(name, verdict=VERDICT, seconds=5.0):
    with store.locked(MACHINE, seconds) as state:
        if state == "held":
            store.keep(MACHINE, {name: verdict})
    return state


def test_what_is_kept_is_found_again_and_can_be_read(folder):
    assert keep("rms_norm x=bf16[8,64]") == "held" == keep("b")
    assert store.cached(MACHINE).verdicts == {"b": VERDICT, "rms_norm x=bf16[8,64]": VERDICT}
    (path,) = folder.glob("*.json")
    assert path.name.startswith("nvidia-a100-sxm4-80gb-")
    written = json.loads(path.read_text())
    assert written["machine"] == MACHINE
    assert '"rms_norm x=bf16[8,64]": {\n' in path.read_text()
    assert written["verdicts"]["b"]["reference_ms"] == 0.2


@pytest.mark.parametrize("name", sorted(MACHINE))
def test_another_machine_has_another_file(name):
    keep("a")
    assert store.cached(MACHINE).verdicts
    assert not store.cached(MACHINE | {name: "other"}).verdicts


def test_the_key_names_machine_versions_and_sources():
    found = machine.machine_of(torch.device("cpu"))
    assert {*found} == {"device", "instructions", "threads", "torch", "triton", "llava_fast", "kernels"}
    assert all(found.values())


def test_a_changed_kernel_changes_the_hash(monkeypatch, tmp_path):
    before = machine.kernels_hash()
    source = tmp_path / "ops" / "selection" / "machine.py"
    source.parent.mkdir(parents=True)
    source.write_text("")
    monkeypatch.setattr(machine, "__file__", str(source))
    hashes = [before]
    for text in ("a", "b"):
        (tmp_path / "ops" / "triton_kernels.py").write_text(text)
        hashes.append(machine.kernels_hash.__wrapped__())
    assert len({*hashes}) == 3


@pytest.mark.parametrize(
    "text", ["", "{", '{"verdicts": {"a": {"backend": "fast"}}}', '{"verdicts": {"a": {}}}', "\xff"]
)
def test_a_damaged_file_is_left_aside_with_a_warning_and_replaced(folder, text):
    folder.mkdir()
    path = store.path_of(MACHINE)
    path.write_text(text, encoding="latin-1")
    with pytest.warns(UserWarning, match=r"verdicts.*are measured again"):
        assert not store.cached(MACHINE).verdicts
    with pytest.warns(UserWarning, match="measured again"):
        keep("a")
    assert store.cached(MACHINE).verdicts == {"a": VERDICT}


def test_a_pinned_file_that_is_damaged_is_an_error(tmp_path):
    with pytest.raises(BackendError, match="cannot be read"):
        store.read_table(tmp_path / "none.json")
    (tmp_path / "t.json").write_text('{"verdicts": {"rope": {"backend": "fast"}}}')
    with pytest.raises(BackendError, match=r"t.json: not a table of verdicts: verdicts.rope: .*unknown backend 'fast'"):
        store.read_table(tmp_path / "t.json")


def test_a_file_cut_off_while_written_leaves_the_old_one(monkeypatch, folder):
    keep("a")
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        keep("b")
    assert store.cached(MACHINE).verdicts == {"a": VERDICT}
    assert [path.suffix for path in folder.iterdir() if path.suffix != ".lock"] == [".json"]


def test_another_process_waits_and_then_gives_up():
    with store.locked(MACHINE, 1) as state, multiprocessing.get_context("fork").Pool(1) as pool:
        assert state == "held"
        assert pool.apply(keep, ("a", VERDICT, 0.05)) == "busy"
    assert keep("a") == "held"


def test_many_writers_lose_nothing():
    names = [f"class {number}" for number in range(12)]
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert set(pool.map(keep, names)) == {"held"}
    assert {*store.cached(MACHINE).verdicts} == {*names}


def test_a_folder_that_cannot_be_written_is_said(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLAVA_FAST_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="verdicts cannot be kept .*set LLAVA_FAST_CACHE"):
        assert keep("a") == "nowhere"
