"""token_pack: every backend against the reference in float64, gradients, torch.library's own checks."""

import numpy as np
import pytest
import torch

from llava_fast import _C
from llava_fast.inputs.plan.plan import TextPiece, VisualPiece, build_plan
from llava_fast.inputs.tiling.rows import FEATURE, NEWLINE, VisualRows
from llava_fast.ops import token_pack, use_backend
from llava_fast.ops.backend import BackendError
from llava_fast.ops.token_pack import InversePlacement
from tests.support.kernel_checks import DEVICE, DTYPES, check_op

BACKENDS = ("reference", "triton", "native") if DEVICE == "cpu" or _C.has_cuda() else ("reference", "triton")
VOCABULARY = 50


def planned(text: int, visual: int, newlines: int, layout="packed"):
    """(source, row, inverse) of two sequences, the second with text alone, as the model gets them."""
    rng = np.random.default_rng(text + visual)
    pieces = [[TextPiece(rng.integers(0, VOCABULARY, text))], [TextPiece(rng.integers(0, VOCABULARY, 3))]]
    if visual:
        kind = np.repeat(np.array([FEATURE, NEWLINE], np.int8), [visual, newlines])
        index = np.concatenate([rng.permutation(visual), np.zeros(newlines)]).astype(np.int32)
        pieces[0].append(VisualPiece(VisualRows(kind=kind, index=index, tiles=1)))
    plan = build_plan(pieces, max(visual, 1), layout)
    column = {
        name: torch.from_numpy(plan.column(name).copy()).to(DEVICE)
        for name in (*InversePlacement._fields, "source", "row")
    }
    return column["source"], column["row"], InversePlacement(*(column[name] for name in InversePlacement._fields))


@pytest.mark.parametrize("trained", [[], [2], [3], [4], [2, 3, 4]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_and_gradients(backend, dtype, trained, poisoned):
    if backend == "native" and DEVICE == "cpu" and dtype != torch.float32:
        dtype = torch.float64  # csrc sums no 16-bit type on a CPU
    source, row, inverse = planned(text=40, visual=20, newlines=5, layout="padded")
    tables = [torch.randn(n, 72, dtype=dtype, device=DEVICE) for n in (VOCABULARY, 20, 1)]
    check_op(token_pack, [source, row, *tables, inverse], trained, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("text", "visual", "newlines", "width"),
    [(0, 1, 0, 8), (1, 0, 0, 8), (5, 0, 0, 31), (577, 577, 24, 40), (3, 70, 200, 1), (9, 9, 1, 4100)],
)
def test_ragged_shapes(backend, text, visual, newlines, width, poisoned):
    source, row, inverse = planned(text, visual, newlines)
    tables = [torch.randn(n, width, device=DEVICE) for n in (VOCABULARY, visual, 1)]
    check_op(token_pack, [source, row, *tables, inverse], [2, 3, 4], backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_and_no_constants(backend, poisoned):
    source = row = torch.zeros(0, dtype=torch.int32, device=DEVICE)
    tables = [torch.randn(n, 4, device=DEVICE, requires_grad=True) for n in (5, 0, 0)]
    places = torch.zeros(0, dtype=torch.int32, device=DEVICE)
    segment = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    with use_backend(backend):
        out = token_pack(source, row, *tables, InversePlacement(places, places, segment, places, places, segment))
        gradients = torch.autograd.grad(out.sum(), tables)
    assert out.shape == (0, 4)
    assert [tuple(g.shape) for g in gradients] == [(5, 4), (0, 4), (0, 4)]
    assert not gradients[0].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_tables_that_are_views_are_handled(backend, poisoned):
    source, row, inverse = planned(10, 6, 2)
    tables = [torch.randn(16, n, device=DEVICE).T for n in (VOCABULARY, 6, 1)]
    assert not tables[0].is_contiguous()
    check_op(token_pack, [source, row, *tables, inverse], [2, 3, 4], backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_indices_that_are_views_are_handled(backend, poisoned):
    """As columns of a table [rows, 2] are."""
    source, row, inverse = planned(10, 6, 2)
    columns = [torch.stack([column, torch.zeros_like(column)], dim=1)[:, 0] for column in (source, row, *inverse)]
    assert not any(column.is_contiguous() for column in columns)
    tables = [torch.randn(n, 16, device=DEVICE) for n in (VOCABULARY, 6, 1)]
    check_op(token_pack, [*columns[:2], *tables, InversePlacement(*columns[2:])], [2, 3, 4], backend)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_the_order_of_a_long_sum_is_fixed(backend):
    """A thousand newlines: float32 sums within a few roundings, and the same bits again."""
    source, row, inverse = planned(2, 3, 1000)
    tables = [torch.randn(n, 16, device=DEVICE) for n in (VOCABULARY, 3, 1)]
    check_op(token_pack, [source, row, *tables, inverse], [4], backend)
    tables[2].requires_grad_()
    with use_backend(backend):
        grads = [
            torch.autograd.grad(token_pack(source, row, *tables, inverse).square().sum(), tables[2])[0] for _ in "ab"
        ]
    assert torch.equal(*grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_library_contract(backend):
    source, row, inverse = planned(6, 4, 2)
    tables = [torch.randn(n, 8, device=DEVICE, requires_grad=True) for n in (VOCABULARY, 4, 1)]
    with use_backend(backend):
        torch.library.opcheck(torch.ops.llava_fast.token_pack.default, (source, row, *tables, list(inverse)))
        compiled = torch.compile(token_pack, fullgraph=True, backend="aot_eager")
        out = compiled(source, row, *tables, inverse)
        found = torch.autograd.grad(out.square().sum(), tables)
        expected = torch.autograd.grad(token_pack(source, row, *tables, inverse).square().sum(), tables)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_backwards_contract(backend):
    source, row, inverse = planned(6, 4, 2)
    grad = torch.randn(len(source), 8, device=DEVICE)
    backward = torch.ops.llava_fast.token_pack_backward.default
    with use_backend(backend):
        for needed in ([True, True, True], [True, False, False], [False, True, False], [False, False, True]):
            given = (grad, source, row, [VOCABULARY, 4, 1], needed, list(inverse))
            torch.library.opcheck(backward, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_what_a_kernel_cannot_do_is_refused(backend):
    source, row, inverse = planned(6, 4, 2)
    tables = [torch.randn(n, 8, device=DEVICE, requires_grad=True) for n in (VOCABULARY, 4, 1)]
    with use_backend(backend):
        out = token_pack(source, row, *tables)
        with pytest.raises(BackendError, match="no `inverse` was given"):
            out.sum().backward()
        with pytest.raises(BackendError, match="dtypes differ"):
            token_pack(source, row, tables[0], tables[1].half(), tables[2], inverse)
    if backend == "native":
        with use_backend(backend), pytest.raises(BackendError, match="takes int32"):
            token_pack(source.long(), row.long(), *tables, inverse)
    with pytest.raises(ValueError, match="inverse covers 4 visual"):
        token_pack(source, row, tables[0], tables[1][:3], tables[2], inverse)
