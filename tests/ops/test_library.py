"""What holds for every op, on any backend: threads, devices, second derivatives, autocast."""

import contextlib
import os
import shutil
import threading
from types import SimpleNamespace

import pytest
import torch
from torch._inductor import config as inductor
from torch.nn import functional as F

from llava_fast.ops import (
    assemble_inputs,
    backend,
    layer_norm,
    library,
    linear_act,
    linear_cross_entropy,
    token_pack,
    use_backend,
)
from llava_fast.ops.token_pack import InversePlacement
from tests.support.kernel_checks import DEVICE


def normed():
    x, weight, bias = (torch.randn(size, device=DEVICE, requires_grad=True) for size in ((4, 8), 8, 8))
    return layer_norm(x, weight, bias, 1e-5), (x, weight, bias)


def test_a_backward_pass_on_another_thread_follows_the_block(monkeypatch):
    """As every CUDA backward pass does: autograd runs it on threads of its own."""
    chosen = []
    choose = backend.choose
    monkeypatch.setattr(backend, "choose", lambda *given: chosen.append(choose(*given)) or chosen[-1])
    with use_backend("triton"):
        y, leaves = normed()
        thread = threading.Thread(target=lambda: torch.autograd.grad(y.sum(), leaves))
        thread.start()
        thread.join()
        with use_backend("reference"):
            assert backend.requested() == "reference"
        assert backend.requested() == "triton"
    assert chosen == ["triton", "triton"]
    assert not backend._open


def test_another_gpu_is_made_the_current_one(monkeypatch):
    entered = []

    @contextlib.contextmanager
    def device(which):
        entered.append(which)
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    run = library.on_its_device("op", lambda first, second: second)
    for name in ("cpu", "cuda:0", "cuda:1"):
        assert run(SimpleNamespace(device=torch.device(name)), 7) == 7
    assert entered == [torch.device("cuda:1")]


@pytest.mark.parametrize("name", ["reference", "triton"])
def test_a_second_derivative_is_refused_and_a_first_one_is_not(name):
    with use_backend(name):
        y, leaves = normed()
        (expected,) = torch.autograd.grad(y.square().sum(), leaves[:1], retain_graph=True)
        (found,) = torch.autograd.grad(y.square().sum(), leaves[:1], create_graph=True)
        assert torch.equal(found, expected)
        with pytest.raises(RuntimeError, match="layer_norm has no second derivative"):
            found.sum().backward()


def test_linear_act_under_autocast_is_nn_linear_under_autocast():
    x, weight, bias = (torch.randn(size, device=DEVICE, requires_grad=True) for size in ((4, 8), (6, 8), 6))
    with torch.autocast(DEVICE, torch.bfloat16):
        found, expected = linear_act(x, weight, bias, "gelu"), F.gelu(F.linear(x, weight, bias))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)
    mine, theirs = (torch.autograd.grad(y.float().sum(), (x, weight, bias)) for y in (found, expected))
    for a, b in zip(mine, theirs, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", ["reference", "native"])
def test_linear_cross_entropy_under_autocast_is_the_usual_loss(name):
    hidden, weight = (torch.randn(size, device=DEVICE, requires_grad=True) for size in ((9, 8), (30, 8)))
    target = torch.randint(0, 30, (9,), device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16), use_backend(name):
        found = linear_cross_entropy(hidden, weight, target).mean()
        mine = torch.autograd.grad(found, (hidden, weight))
    with torch.autocast(DEVICE, torch.bfloat16):
        expected = F.cross_entropy(F.linear(hidden, weight).float(), target)
    theirs = torch.autograd.grad(expected, (hidden, weight))
    torch.testing.assert_close(found, expected)
    for a, b in zip(mine, theirs, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-3)


def test_assemble_inputs_under_autocast_projects_in_its_dtype():
    def integers(*values):
        return torch.tensor(values, dtype=torch.int32, device=DEVICE)

    tables = [torch.randn(size, device=DEVICE, requires_grad=True) for size in ((5, 8), (6, 8), (4, 6), (7, 4), (1, 4))]
    features, w0, w1, embedding, constant = tables
    kept, source, row = integers(3, 1), integers(0, 1, 1), integers(6, 0, 1)
    inverse = InversePlacement(integers(0), integers(6), integers(0, 1), integers(1, 2), integers(), integers(0, 0))
    with torch.autocast(DEVICE, torch.bfloat16):
        found = assemble_inputs(features, kept, [w0, w1], [], source, row, embedding, constant, inverse)
        projected = F.linear(F.gelu(F.linear(features[kept.long()], w0)), w1)
    expected = torch.cat([embedding[6:], projected.float()])
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    mine, theirs = (torch.autograd.grad(y.sum(), tables[:4]) for y in (found, expected))
    for a, b in zip(mine, theirs, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_tensors_on_different_devices_are_refused():
    run = library.on_its_device("op", lambda *given: len(given))
    here, elsewhere = torch.zeros(2), torch.zeros(2, device="meta")
    assert run(here, here, [here], None, 3) == 5
    for given in ([elsewhere], [here, [here, elsewhere]]):
        with pytest.raises(ValueError, match="op: its tensors are on cpu and meta"):
            run(here, *given)


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler")
def test_inductor_compiles_around_the_ops():
    """torch.compile's own backend: the ops stay as they are, what lies between them becomes C++."""

    def chain(x, weight, bias, embedding, constant):
        y = layer_norm(x * 2 + 1, bias, bias, 1e-5)
        visual = linear_act(y, weight, bias, "gelu").tanh() + x
        return token_pack(source, row, embedding, visual, constant, inverse).square() * 0.5

    def integers(*values):
        return torch.tensor(values, dtype=torch.int32, device=DEVICE)

    source, row = integers(0, 1, 1, 2, -1), integers(2, 1, 0, 0, 0)
    inverse = InversePlacement(integers(0), integers(2), integers(0, 1), integers(2, 1), integers(3), integers(0, 1))
    tables = [torch.randn(size, device=DEVICE, requires_grad=True) for size in ((2, 8), (8, 8), 8, (4, 8), (1, 8))]
    # No graph of an earlier run, whose fake kernels may have been others; no pool of processes for a handful of loops.
    with inductor.patch(force_disable_caches=True, compile_threads=1):
        out = torch.compile(chain, fullgraph=True)(*tables)
        found = torch.autograd.grad(out.sum(), tables)
    expected = chain(*tables)
    torch.testing.assert_close(out, expected)
    for mine, theirs in zip(found, torch.autograd.grad(expected.sum(), tables), strict=True):
        torch.testing.assert_close(mine, theirs)
