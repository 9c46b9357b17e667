"""No speed-up for a result that fails its check: in rows, in the table, in the exit code, in the plot."""

from __future__ import annotations

import dataclasses
import json
import time

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import machine, report
from benchmarks.case import Provider, Row, Settings, measure
from benchmarks.plot import plot
from benchmarks.run import app
from tests.support.benchmark_case import CEILINGS, case

SETTINGS = Settings(iters=3, warmup=0.0)


def complete(rows: list[Row]) -> list[Row]:
    about = {**machine.describe("cpu", 1), "ceilings": machine.as_dict(CEILINGS)}
    return [
        dataclasses.replace(row, machine=about, versions=machine.versions(), commit="abc", date="2030-01-01")
        for row in rows
    ]


def test_a_result_that_agrees_gets_a_speed_up():
    ours, theirs = measure(case(1.00001), SETTINGS, CEILINGS)
    assert ours.check["passed"]
    assert ours.check["value"] == pytest.approx(1e-5, rel=0.1)
    assert ours.ratio == pytest.approx(theirs.median / ours.median)
    assert (theirs.ratio, theirs.check) == (None, None)
    assert ours.rate == pytest.approx(2 / ours.median)
    assert ours.p20 <= ours.median <= ours.p80
    assert ours.samples == 3


@pytest.mark.parametrize("value", [1.001, float("nan"), float("inf")])
def test_a_result_that_disagrees_gets_none(value):
    ours, theirs = measure(case(value), SETTINGS, CEILINGS)
    assert not ours.check["passed"]
    assert ours.ratio is None
    text = report.table([ours, theirs])
    assert "FAILED" in text
    assert "no speed-up is given" in text
    assert "x\n" not in text  # no "1.23x" at a line's end


def test_without_a_reference_there_is_nothing_to_compare_with():
    settings = dataclasses.replace(SETTINGS, backends=("llava_fast",))
    (row,) = measure(case(1.0, backends=("llava_fast",)), settings, CEILINGS)
    assert (row.check, row.ratio, row.reference) == (None, None, None)
    assert "not checked" in report.table([row])


@pytest.mark.parametrize(("value", "code"), [(1.0, 0), (1.5, 1)])
def test_exit_code_and_json(tmp_path, monkeypatch, value, code):
    from benchmarks import suites

    class Suite:
        @staticmethod
        def cases(subject, settings):
            yield case(value)

    monkeypatch.setitem(suites.SUITES, "encode", Suite)
    monkeypatch.setattr(machine, "measure_ceilings", lambda *_: CEILINGS)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    output = tmp_path / "deep" / "out.json"
    command = ["encode", "--iters", "2", "--warmup", "0", "--output-json", str(output)]
    result = CliRunner().invoke(app, command)
    torch.set_num_threads(threads)
    assert result.exit_code == code, result.output
    content = json.loads(output.read_text())
    assert content["schema"] == report.SCHEMA
    ours, theirs = content["rows"]
    assert (ours["ratio"] is None) == bool(code)
    for row in (ours, theirs):
        assert set(row) == {field.name for field in dataclasses.fields(Row)}
        assert {"kind", "cpu", "cores", "threads", "ceilings", "load_before"} <= set(row["machine"])
        assert {"python", "torch", "transformers", "llava_fast"} <= set(row["versions"])
        assert row["commit"]
        assert row["date"]
        assert row["floor_share"] == pytest.approx(row["floor_seconds"] / row["median"])
    assert [dataclasses.asdict(row) for row in report.read_json(output)] == content["rows"]


def test_a_disturbed_measurement_says_so():
    waits = dataclasses.replace(
        case(1.0),
        providers=[Provider("hf-eager", lambda i: (time.sleep(0.02), torch.ones(4))[1]), case(1.0).providers[0]],
    )
    reference, ours = measure(waits, SETTINGS, CEILINGS)
    assert reference.disturbed
    assert ours.disturbed
    assert "(disturbed)" in report.table([reference, ours])
    two_threads = dataclasses.replace(SETTINGS, threads=2)
    assert not any(row.disturbed for row in measure(waits, two_threads, CEILINGS))


def test_plot_draws_only_what_passed(tmp_path):
    passed, reference = complete(measure(case(1.0), SETTINGS, CEILINGS))
    wrong, _ = complete(measure(case(2.0), SETTINGS, CEILINGS))
    plot([passed, reference, wrong], tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no row has a speed-up"):
        plot([wrong, reference], tmp_path / "none.png")


def test_only_result_files_are_read(tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"rows": []}')
    with pytest.raises(ValueError, match="no benchmark result"):
        report.read_json(path)
