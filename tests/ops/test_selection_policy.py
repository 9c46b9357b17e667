"""When a call is tested, when it follows a verdict, and when it uses its op's default."""

import contextlib
import json
import time

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from llava_fast.errors import BackendError
from llava_fast.ops import backend, rms_norm, token_pack, use_backend
from llava_fast.ops.selection import policy, proof, store, tables
from llava_fast.ops.selection.verdict import Verdict

CLASS = "token_pack source=i32[4] row=i32[4] embedding=fp32[8,8]~ visual=fp32[2,8]~ constant=fp32[1,8]~"


def pack(rows: int = 3, width: int = 8, dtype: torch.dtype = torch.float32, **options):
    source, row = (torch.zeros(rows, dtype=torch.int32) for _ in range(2))
    return token_pack(source, row, *(torch.ones(size, width, dtype=dtype, **options) for size in (5, 2, 1)))


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """The forms that ops chose, outside of proofs."""
    found, choose = [], backend.choose

    def spy(*given):
        form = choose(*given)
        if not getattr(policy.current(), "is_trial", False):
            found.append(form)
        return form

    monkeypatch.setattr(backend, "choose", spy)
    return found


@pytest.fixture
def proven(monkeypatch) -> list[str]:
    """The forms that proofs found, in turn; no clock decides: whatever is right is faster."""
    found, prove = [], proof.prove

    def spy(*given):
        verdict = prove(*given)
        found.append(verdict.backend)
        return verdict

    monkeypatch.setattr(proof, "prove", spy)
    monkeypatch.setattr(proof, "FORMS", ("native",))
    monkeypatch.setattr(proof.Clock, "in_turn", lambda *_: proof.Times(1.0, 2.0, 0.1))
    return found


def test_a_plain_cpu_pays_nothing(select, monkeypatch, ran, proven):
    monkeypatch.setattr(tables, "machine_of", None)
    monkeypatch.setattr(policy, "signature", None)
    settings = select()
    pack()
    assert ran == ["native"]
    assert not proven
    assert settings.table(torch.device("cpu")).is_idle


def test_a_class_is_proven_once_and_kept_for_other_processes(select, ran, proven):
    settings = select(LLAVA_FAST_SELECT="first-use")
    for rows in (3, 4, 3):
        pack(rows)
    assert proven == ["native"]
    assert ran == ["native"] * 3
    assert {*settings.table(torch.device("cpu")).verdicts} == {CLASS}
    pack(5)
    assert proven == ["native"] * 2
    assert 0 < settings.spent < 5
    again = select(LLAVA_FAST_SELECT="cached")
    pack(5)
    pack(50)
    assert len(proven) == 2
    assert len(again.table(torch.device("cpu")).verdicts) == 2


def test_a_cached_verdict_is_the_default_of_the_cpu(select, ran, proven):
    select(LLAVA_FAST_SELECT="first-use")
    pack()
    device = tables.settings().table(torch.device("cpu"))
    store.keep(device.machine, {CLASS: Verdict(backend="reference")})
    select(LLAVA_FAST_SELECT="")
    pack()
    pack(50)
    assert ran == ["native", "reference", "native"]
    assert len(proven) == 1


def test_off_leaves_the_defaults(select, ran, proven):
    select(LLAVA_FAST_SELECT="first-use")
    pack()
    device = tables.settings().table(torch.device("cpu"))
    store.keep(device.machine, {CLASS: Verdict(backend="reference")})
    select(LLAVA_FAST_SELECT="off")
    pack()
    assert ran == ["native", "native"]


def pinned(tmp_path, **verdicts: str) -> str:
    path = tmp_path / "pinned.json"
    path.write_text(json.dumps({"verdicts": {name: {"backend": form} for name, form in verdicts.items()}}))
    return str(path)


def test_a_pinned_table_decides_by_class_then_by_op(select, tmp_path, ran, proven):
    table = pinned(tmp_path, token_pack="native", **{CLASS: "reference"})
    select(LLAVA_FAST_SELECT="first-use", LLAVA_FAST_SELECTION=table)
    pack()
    pack(50)
    assert ran == ["reference", "native"]
    assert not proven
    assert backend.default("token_pack", "cuda") == "native"
    assert backend.default("rope", "cuda") == "reference"
    with use_backend("reference"):
        pack(50)
    assert ran[-1] == "reference"


def test_a_pinned_form_that_the_op_has_not_is_an_error(select, tmp_path):
    select(LLAVA_FAST_SELECTION=pinned(tmp_path, rms_norm="native"))
    with pytest.raises(BackendError, match="'native' does not serve the op 'rms_norm'"):
        rms_norm(torch.ones(2, 8), torch.ones(8), 1e-5)


@pytest.mark.parametrize("name", ["LLAVA_FAST_SELECT", "LLAVA_FAST_SELECT_BUDGET"])
def test_a_wrong_setting_is_an_error(select, name):
    with pytest.raises(BackendError, match=f"{name}=perhaps: "):
        select(**{name: "perhaps"})


def test_a_named_backend_is_never_overruled(select, ran, proven):
    select(LLAVA_FAST_SELECT="first-use")
    with use_backend("reference"):
        pack()
    assert ran == ["reference"]
    assert not proven


def test_the_budget_ends_proofs(select, ran, proven):
    settings = select(LLAVA_FAST_SELECT="first-use", LLAVA_FAST_SELECT_BUDGET="0.000001")
    pack()
    pack(50)
    assert len(proven) == 1
    assert ran == ["native", "native"]
    assert not settings.table(torch.device("cpu")).may_grow


def test_tensors_that_hold_nothing_prove_nothing(select, proven):
    select(LLAVA_FAST_SELECT="first-use")
    with FakeTensorMode():
        pack()
    torch.compile(pack, backend="aot_eager", fullgraph=True)(6)  # traced with fakes, then run
    assert len(proven) == 1
    pack(0)
    pack(dtype=torch.float64)
    assert len(proven) == 1


def test_a_graph_that_is_captured_or_traced_is_seen(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert policy.is_recorded(torch.device("cuda"))
    assert not policy.is_recorded(torch.device("cpu"))
    monkeypatch.setattr(torch.jit, "is_tracing", lambda: True)
    assert policy.is_recorded(torch.device("cpu"))


def test_a_captured_call_is_not_proven(select, monkeypatch, proven):
    select(LLAVA_FAST_SELECT="first-use")
    monkeypatch.setattr(policy, "is_recorded", lambda device: True)
    pack()
    assert not proven


def test_training_proves_in_its_first_step_alone(select, proven):
    settings = select(LLAVA_FAST_SELECT="first-use")
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))])
    for rows in (3, 50):  # a step may have several micro-batches
        pack(rows, requires_grad=True).sum().backward()
    assert len(proven) == 4  # both passes
    optimizer.step()
    assert settings.stepped
    pack(500, requires_grad=True).sum().backward()
    pack(500)  # nor without gradients, as a frozen tower runs
    assert len(proven) == 4


def test_a_verdict_found_by_another_process_meanwhile_is_taken(select, ran, proven):
    settings = select(LLAVA_FAST_SELECT="first-use")
    machine = settings.table(torch.device("cpu")).machine
    with store.locked(machine, 1):
        store.keep(machine, {CLASS: Verdict(backend="reference", by="first use")})
    pack()
    assert ran == ["reference"]
    assert not proven


def test_a_proof_leaves_verdicts_in_use_as_they_are(select, ran, proven):
    """They may be another machine's, shared by the run, while this machine's file says otherwise."""
    table = select(LLAVA_FAST_SELECT="first-use").table(torch.device("cpu"))
    table.verdicts[CLASS] = Verdict(backend="reference")
    with store.locked(table.machine, 1):
        store.keep(table.machine, {CLASS: Verdict(backend="native")})
    pack(50)
    pack()
    assert ran == ["native", "reference"]


def test_a_file_that_stays_locked_ends_in_the_default(select, monkeypatch, ran, proven):
    settings = select(LLAVA_FAST_SELECT="first-use", LLAVA_FAST_SELECT_BUDGET="0.05")
    with store.locked(settings.table(torch.device("cpu")).machine, 1):
        # A lock is its process's own: another one is played by its file, opened anew.
        monkeypatch.setattr(store.FileLock, "acquire", lambda self, **_: (_ for _ in ()).throw(store.Timeout("file")))
        pack()
    assert ran == ["native"]
    assert not proven


def test_waiting_for_the_file_is_not_spent_and_has_an_end(select, monkeypatch, proven):
    settings = select(LLAVA_FAST_SELECT="first-use", LLAVA_FAST_SELECT_BUDGET="inf")
    waits, acquire = [], store.FileLock.acquire

    def late(self, **given):
        waits.append(self.timeout)
        time.sleep(0.2)
        return acquire(self, **given)

    monkeypatch.setattr(store.FileLock, "acquire", late)
    monkeypatch.setattr(proof, "prove", lambda *_: Verdict(backend="native"))
    pack()
    pack(50)
    assert settings.spent < 0.2 <= settings.waited - 0.2
    assert waits[0] == store.WAIT > waits[1] + 0.19


def test_a_device_is_done_before_the_file_is_locked(select, monkeypatch):
    settings, done = select(LLAVA_FAST_SELECT="first-use"), []

    class OnGpu:
        is_cuda, device = True, torch.device("cuda", 0)

    def locked(*_):
        done.append("locked")
        return contextlib.nullcontext("busy")

    monkeypatch.setattr(torch.cuda, "synchronize", done.append)
    monkeypatch.setattr(store, "locked", locked)
    policy._prove("rope x", "rope", None, [OnGpu()], tables.InUse({}, {}, True), settings)
    assert done == [OnGpu.device, "locked"]


def test_the_end_of_the_budget_changes_no_training_step(select, proven):
    settings = select(LLAVA_FAST_SELECT="first-use", LLAVA_FAST_SELECT_BUDGET="0.000001")
    table = settings.table(torch.device("cpu"))
    with torch.inference_mode():
        pack()
    assert not table.is_asked
    table = select(LLAVA_FAST_SELECT="first-use").table(torch.device("cpu"))
    pack()
    assert table.is_asked
    torch.optim.SGD([nn.Parameter(torch.ones(2))]).step()
    assert not table.is_asked


def test_a_verdict_that_cannot_be_kept_is_a_warning(select, monkeypatch, ran, proven):
    select(LLAVA_FAST_SELECT="first-use")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "replace", full)
    with pytest.warns(UserWarning, match=r"\.json: a verdict cannot be kept \(.*No space left"):
        pack()
    pack()
    assert ran == ["native"] * 2
    assert len(proven) == 1


def test_classes_worked_out_are_bounded(select, monkeypatch, proven):
    monkeypatch.setattr(tables, "MOST_CLASSES", 3)
    table = select(LLAVA_FAST_SELECT="first-use").table(torch.device("cpu"))
    for rows in range(1, 10):
        pack(rows)
    assert len(table.classes) <= 3


def test_a_cached_form_that_the_op_has_not_is_left_out(select, ran):
    settings = select(LLAVA_FAST_SELECT="first-use")
    machine = settings.table(torch.device("cpu")).machine
    with store.locked(machine, 1):
        store.keep(machine, {CLASS: Verdict(backend="cublas"), "rope x": Verdict(backend="triton")})
    settings = select(LLAVA_FAST_SELECT="cached")
    with pytest.warns(
        UserWarning, match=r"\.json: the op 'token_pack' has no backend 'cublas'; ignoring: token_pack source"
    ):
        pack()
    assert ran == ["native"]
    assert {*settings.table(torch.device("cpu")).verdicts} == {"rope x"}


def test_configurations_of_all_calls_are_refused(select, tmp_path):
    path = tmp_path / "pinned.json"
    verdict = {"backend": "triton", "configs": {"rms_norm_kernel": {"num_warps": 4}}}
    path.write_text(json.dumps({"verdicts": {"rms_norm": verdict}}))
    with pytest.raises(BackendError, match=r"pinned\.json: verdicts\.rms_norm\.configs: only a class"):
        select(LLAVA_FAST_SELECTION=str(path))


def test_a_proof_that_fails_is_said_and_the_call_is_served(select, monkeypatch, ran):
    select(LLAVA_FAST_SELECT="first-use")
    monkeypatch.setattr(proof, "prove", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match=r"token_pack: no form could be proven \(ZeroDivisionError"):
        assert pack().shape == (3, 8)
    pack()  # and not tried again
    assert ran == ["native"] * 2


def test_a_proof_leaves_the_random_numbers_alone(select, proven):
    select(LLAVA_FAST_SELECT="first-use")
    torch.manual_seed(3)
    pack()
    found = torch.rand(2)
    torch.manual_seed(3)
    assert proven
    assert torch.equal(found, torch.rand(2))


def test_two_kinds_of_gpu_need_a_pinned_table(select, monkeypatch, tmp_path):
    names = {0: "NVIDIA A100", 1: "NVIDIA A100", 2: "NVIDIA H200"}
    monkeypatch.setattr(tables, "machine_of", lambda device: {"device": names[device.index], "multiprocessors": "108"})
    settings = select()
    first = settings.table(torch.device("cuda", 0))
    assert first.may_grow
    assert settings.table(torch.device("cuda", 1)) is first
    with pytest.raises(
        BackendError, match=r"several kinds of GPU \(NVIDIA A100 of 108 multiprocessors, NVIDIA H200 of"
    ):
        settings.table(torch.device("cuda", 2))
    settings = select(LLAVA_FAST_SELECTION=pinned(tmp_path, rope="triton"))
    assert all(settings.table(torch.device("cuda", number)).verdicts for number in names)


def test_modules_leave_their_place_to_an_op_that_may_win(select, monkeypatch):
    """What `gate.takes` asks: on CUDA, where kernels may be found at first use, until all is known."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tables, "machine_of", lambda device: {"device": "NVIDIA A100"})
    settings = select()
    assert backend.serves("rms_norm", "cuda")
    assert backend.serves("rope", "cuda")
    table = settings.table_on("cuda")
    table.may_grow = False  # the budget is spent, perhaps between a layer and its run for the gradients
    assert backend.serves("rms_norm", "cuda")
    settings.end_step()
    assert not backend.serves("rms_norm", "cuda")
    table.verdicts["add_rms_norm x"] = Verdict(backend="triton", op="rms_norm")
    table.verdicts["rope query"] = Verdict(backend="reference", op="rope")
    assert backend.serves("rms_norm", "cuda")
    assert not backend.serves("rope", "cuda")
    select(LLAVA_FAST_SELECT="off")
    assert not backend.serves("rms_norm", "cuda")
    assert backend.serves("token_pack", "cpu")


def test_the_interpreter_is_right_and_slow(select):
    settings = select(LLAVA_FAST_SELECT="first-use")
    rms_norm(torch.randn(4, 16), torch.ones(16), 1e-5)
    (verdict,) = settings.table(torch.device("cpu")).verdicts.values()
    assert verdict.backend == "reference"
    assert verdict.op == "rms_norm"
    assert " ms, the reference 0." in verdict.refused["triton"]
