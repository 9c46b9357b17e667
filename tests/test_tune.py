"""`llava-fast tune` on a CPU: it writes verdicts, shows them, and finds them again."""

import json
import subprocess
import sys

import pytest
import torch

from llava_fast import doctor, tune
from llava_fast.demo.run import model_path
from llava_fast.errors import BackendError
from llava_fast.generation.llava import Llava
from llava_fast.generation.runner import Runner
from llava_fast.models import eight_bit
from llava_fast.ops import backend
from llava_fast.ops.selection import proof
from tests.support.played import PlayedEncoding


def test_verdicts_are_found_shown_and_reused(select, monkeypatch, tmp_path, capsys):
    prove, proven = proof.prove, []
    monkeypatch.setattr(proof, "prove", lambda *given: proven.append(given) or prove(*given))
    monkeypatch.setattr(proof, "FORMS", ("native",))  # the interpreter is tried elsewhere
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(tune, "SIZES", ((40, 40),))
    select()
    tune.tune(None, training=True, budget=100)
    (path,) = (tmp_path / "selection").glob("*.json")
    verdicts = json.loads(path.read_text())["verdicts"]
    assert {name.split()[0] for name in verdicts} >= {"patch_embed", "token_pack", "token_pack_backward"}
    assert len(proven) == len(verdicts)
    assert all(verdict["by"] == "tune" for verdict in verdicts.values())
    said = capsys.readouterr().out
    assert f"{len(verdicts)} found in " in said
    assert str(path) in said.replace("\n", "")
    assert " native " in said

    select()
    tune.tune(model_path(), training=True, budget=100)
    assert len(proven) == len(verdicts)
    assert f"0 found in 0.0 s, {len(verdicts)} known before" in capsys.readouterr().out

    verdicts = {name: {**verdict, "backend": "reference"} for name, verdict in verdicts.items()}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"verdicts": verdicts}))
    select()
    shown = doctor.report()
    assert f"cpu: cached, {len(verdicts)} verdicts in {path}" in shown
    assert all(name in shown for name in verdicts)
    assert ", error " in shown
    chosen, choose = [], backend.choose
    monkeypatch.setattr(backend, "choose", lambda *given: chosen.append(choose(*given)) or chosen[-1])
    tune.workload(tune.load(model_path()), training=False)
    assert set(chosen) == {"reference", "native"}  # native: the decoder's step, which is not selected


def test_the_budget_is_kept(select, monkeypatch, capsys):
    """Without a second, every class is left."""
    monkeypatch.setattr(tune, "SIZES", ((40, 40),))
    select()
    tune.tune(None, training=False, budget=0)
    said = capsys.readouterr().out
    assert "0 found in" in said
    assert " not tested: the budget of 0 s is spent" in said


def verdicts_of(op, settings, **rounding) -> list:
    """Those that `tune` finds for an op of the demo's model."""
    tune.tune(None, training=False, budget=100, **rounding)
    verdicts = settings.table(torch.device("cpu")).verdicts
    return [each for name, each in verdicts.items() if name.split()[0] == op]


def test_products_in_8_bits_are_tested_for_a_precision(select, monkeypatch):
    monkeypatch.setattr(proof, "FORMS", ("eight_bit",))
    monkeypatch.setattr(tune, "SIZES", ((40, 40),))
    monkeypatch.setattr(eight_bit, "FEW_ROWS", 8)
    found = verdicts_of("scaled_linear", select(), precision="int8")
    assert found
    assert {each.by for each in found} == {"tune"}


def test_native_products_of_quantised_weights_are_not_refused_for_rounding_their_inputs(select, monkeypatch):
    monkeypatch.setattr(proof, "FORMS", ("native",))
    monkeypatch.setattr(proof.Clock, "in_turn", lambda *_: proof.Times(1.0, 2.0, 0.0))  # the faster
    monkeypatch.setattr(tune, "SIZES", ((40, 40),))
    found = verdicts_of("quantised_linear", select(), quantize="int4")
    assert found
    assert {each.backend for each in found} == {"native"}


def test_graphs_are_captured_after_the_modules_calls_are_proven(select, monkeypatch):
    """None while classes are collected: it would hold the reference. Padded calls are proven at first use."""
    monkeypatch.setattr(proof, "FORMS", ("native",))
    monkeypatch.setattr(tune, "SIZES", ((40, 40),))
    monkeypatch.setattr(tune, "GRAPHS_ON", ("cpu",))
    settings, passes, captures, modules = select(), [], [], []
    generate = Llava.generate

    class Noted(PlayedEncoding):
        def capture(self, run):
            captures.append(settings.met)
            return super().capture(run)

    def noted(model, *args, **options):
        passes.append((settings.met is None, model.cuda_graphs))
        if model.cuda_graphs and not modules:
            modules.append(set(settings.table(torch.device("cpu")).classes.values()))
        return generate(model, *args, **options)

    def prepared(runner, model, *args, **options):
        begin(runner, model, *args, **options)
        if model.cuda_graphs and runner.encoder is None:
            runner.encoder = Noted(model)

    begin = Runner.__init__
    monkeypatch.setattr(Runner, "__init__", prepared)
    monkeypatch.setattr(Llava, "generate", noted)
    tune.tune(None, training=False, budget=100)
    assert passes == [(False, False)] * 2 + [(True, False)] * 2 + [(True, True)] * 4
    assert captures == [None]
    table = settings.table(torch.device("cpu"))
    padded = set(table.classes.values()) - modules[0]
    assert padded
    assert all(table.verdicts[name].by == "tune" for name in padded)


@pytest.mark.parametrize("name", ["LLAVA_FAST_SELECT", "LLAVA_FAST_SELECTION"])
def test_where_verdicts_are_not_wanted_it_says_so(select, tmp_path, name):
    (tmp_path / "table.json").write_text("{}")
    select(**{name: {"LLAVA_FAST_SELECT": "off"}.get(name, str(tmp_path / "table.json"))})
    with pytest.raises(BackendError, match="unset LLAVA_FAST_SELECTION"):
        tune.tune(None, training=False, budget=1)


def test_doctor_without_verdicts(select):
    select()
    assert "  cpu: cached, 0 verdicts\n" in doctor.report()


def test_importing_the_package_reads_no_verdicts():
    code = "import llava_fast; from llava_fast.ops.selection import tables; assert not tables.settings.cache_info()[3]"
    subprocess.run([sys.executable, "-c", code], check=True)
