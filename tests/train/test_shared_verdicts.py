"""Processes of one run have one table of verdicts."""

import multiprocessing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from llava_fast.errors import BackendError
from llava_fast.ops.selection import sharing, tables
from llava_fast.ops.selection.store import Table
from llava_fast.ops.selection.verdict import Verdict
from llava_fast.train import parallel
from llava_fast.train.recipe import parse_recipe
from tests.fake_gpu.programs import RECIPE

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
BOTH = {"a": "native", "b": "triton"}, {"a": "reference", "c": "reference"}


def in_two_processes(work, tmp_path: Path) -> list:
    """What `work(rank)` gives in each of two processes of one gloo group; an error as its text."""
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return pool.starmap(joined, [(work, rank, str(tmp_path / "group")) for rank in range(2)], chunksize=1)


def joined(work, rank: int, group: str):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{group}", rank=rank, world_size=2)
    try:
        return work(rank)
    except BackendError as error:
        return str(error)
    finally:
        dist.destroy_process_group()


def settings_of(device: torch.device, name: str, verdicts: dict[str, str], mode: str = "first-use") -> tables.Settings:
    """This process's, with a table for a device of that name."""
    settings = tables.settings()
    settings.mode, settings.pinned = mode, None
    found = {each: Verdict(backend=form) for each, form in verdicts.items()}
    settings._tables[device] = tables.InUse({"device": name, "multiprocessors": "108"}, found, may_grow=True)
    return settings


def forms(settings: tables.Settings, device: torch.device) -> dict[str, str]:
    return {name: each.backend for name, each in sorted(settings.table(device).verdicts.items())}


def of_both(rank: int) -> dict[str, str]:
    settings = settings_of(CUDA, "NVIDIA A100", BOTH[rank])
    sharing.share(CUDA)
    assert settings.table(CUDA).may_grow
    sharing.share(CUDA, is_last=True)
    assert not settings.table(CUDA).may_grow
    return forms(settings, CUDA)


def through_parallelize(rank: int) -> dict[str, str]:
    settings = settings_of(CPU, "CPU", BOTH[rank])
    recipe = parse_recipe({**RECIPE, "parallel": {"kind": "none"}})
    model = SimpleNamespace(decoder=SimpleNamespace(layer_groups=()))
    parallel.parallelize(model, recipe, parallel.World(rank, 2, CPU))
    return forms(settings, CPU)


@pytest.mark.parametrize("work", [of_both, through_parallelize])
def test_the_first_ranks_verdicts_are_everybodys(select, tmp_path, work):
    select()
    assert in_two_processes(work, tmp_path) == [{"a": "native", "b": "triton", "c": "reference"}] * 2


def of_two_kinds(rank: int, mode: str = "first-use", pinned: bool = False) -> dict[str, str]:
    settings = settings_of(CUDA, ("NVIDIA A100", "NVIDIA H200")[rank], BOTH[rank], mode)
    settings.pinned = Table() if pinned else None
    sharing.share(CUDA)
    return forms(settings, CUDA)


def of_two_kinds_pinned(rank: int) -> dict[str, str]:
    return of_two_kinds(rank, pinned=True)


def pinned_differently(rank: int) -> None:
    settings_of(CPU, "CPU", {}).pinned = Table(verdicts={"rope": Verdict(backend=("reference", "triton")[rank])})
    sharing.share(CPU)


def test_processes_that_pin_different_tables_are_refused(select, tmp_path):
    select()
    expected = "the processes of this run pin different tables (LLAVA_FAST_SELECTION): give all of them the same"
    assert in_two_processes(pinned_differently, tmp_path) == [expected] * 2


def told_different_things(rank: int) -> dict[str, str]:
    return of_two_kinds(rank, ("cached", "off")[rank])


def test_two_kinds_of_gpu_are_refused_by_every_process(select, tmp_path):
    select()
    for said in in_two_processes(of_two_kinds, tmp_path):
        assert said.startswith("this run has several kinds of GPU (NVIDIA A100 of 108 multiprocessors, NVIDIA H200 of")
        assert "LLAVA_FAST_SELECTION=FILE" in said


def test_two_kinds_of_gpu_with_a_pinned_table_are_not(select, tmp_path):
    select()
    assert in_two_processes(of_two_kinds_pinned, tmp_path) == list(BOTH)


def test_processes_that_select_in_different_ways_are_refused(select, tmp_path):
    select()
    said = in_two_processes(told_different_things, tmp_path)
    expected = (
        "the processes of this run select differently (cached, off): give all of them the same LLAVA_FAST_SELECT and "
        "LLAVA_FAST_SELECTION"
    )
    assert said == [expected] * 2


def test_a_process_alone_shares_nothing(select):
    select()
    sharing.share(CPU)
    assert not tables.settings()._tables
