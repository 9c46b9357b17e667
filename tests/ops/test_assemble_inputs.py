"""assemble_inputs: every backend against plain autograd in float64, padding, frozen parts, torch.library's checks."""

import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from llava_fast.inputs.plan.plan import TextPiece, VisualPiece, build_plan
from llava_fast.inputs.tiling.rows import FEATURE, NEWLINE, VisualRows
from llava_fast.ops import assemble_inputs, token_pack, triton_support, use_backend
from llava_fast.ops.activations import activate
from llava_fast.ops.backend import BackendError
from llava_fast.ops.token_pack import InversePlacement
from tests.support.kernel_checks import DEVICE, DTYPES, check_op

BACKENDS = ("reference", "triton")
USES = ("text_row", "text_token", "text_segment", "visual_place", "constant_row", "constant_segment")
VOCABULARY = 50
KERNELS = ("gemm_kernel", "gemm_kernel_fp32", "weight_gradient_kernel", "weight_gradient_kernel_fp32")
SMALL = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "GROUP": 2}


class Case:
    """A plan's indices and random tables. `kept` of `rows` feature rows, some padding (kept and place -1)."""

    def __init__(self, rows, kept, text, newlines, widths, dtype=torch.float32, padding=0, bias=True, constants=1):
        rng = np.random.default_rng(rows + kept + text)
        pieces = [[TextPiece(rng.integers(0, VOCABULARY, text))], [TextPiece(rng.integers(0, VOCABULARY, 3))]]
        if kept:
            index = np.concatenate([rng.permutation(rows)[:kept], np.zeros(newlines)]).astype(np.int32)
            kind = np.repeat(np.array([FEATURE, NEWLINE], np.int8), [kept, newlines])
            pieces[0].append(VisualPiece(VisualRows(kind=kind, index=index, tiles=1)))
        plan = build_plan(pieces, max(rows, 1), "padded")
        column = {n: torch.from_numpy(plan.column(n).copy()).to(DEVICE) for n in (*USES, "kept", "source", "row")}
        padded = torch.full((padding,), -1, dtype=torch.int32, device=DEVICE)
        column["visual_place"] = torch.cat([column["visual_place"], padded])
        self.kept = torch.cat([column["kept"], padded])
        self.source, self.row = column["source"], column["row"]
        self.inverse = InversePlacement(*(column[name] for name in USES))
        self.layers = len(widths) - 1
        self.has_bias = bias
        self.count = None
        made = [torch.randn(rows, widths[0])]
        made += [torch.randn(out, width) / width**0.5 for width, out in itertools.pairwise(widths)]
        made += [torch.randn(out) for out in widths[1:]] if bias else []
        made += [torch.randn(VOCABULARY, widths[-1]), torch.randn(constants, widths[-1])]
        self.tensors = [tensor.to(DEVICE, dtype) for tensor in made]

    def op(self, *tensors, activation="gelu"):
        features, *rest, embedding, constant = tensors
        weights, biases = list(rest[: self.layers]), list(rest[self.layers :])
        given = (features, self.kept, weights, biases, self.source, self.row, embedding, constant, self.inverse)
        return assemble_inputs(*given, activation, self.count)

    def exact(self, *tensors, activation="gelu"):
        """The same through plain autograd: index, linear, activation, and token_pack of what came out."""
        features, *rest, embedding, constant = tensors
        index = self.kept.cpu()
        x = features[index.clamp(0).long()]
        for number in range(self.layers):
            bias = rest[self.layers + number] if self.has_bias else None
            x = F.linear(activate(activation, x) if number else x, rest[number], bias)
        return token_pack(self.source.cpu(), self.row.cpu(), embedding, x, constant)

    def check(self, backend, trained):
        check_op(self.op, self.tensors, trained, backend, self.exact)


# features 0, weights 1 and 2, biases 3 and 4, embedding 5, constant 6
@pytest.mark.parametrize("trained", [[], [0], [1], [2], [3], [4], [5], [6], [1, 2, 3, 4], [0, 2, 5], range(7)], ids=str)
@pytest.mark.parametrize("backend", [*BACKENDS, "cublas"])
def test_each_subset_that_trains(backend, trained, poisoned):
    Case(40, 25, 12, 4, (24, 40, 32), padding=3).check(backend, list(trained))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", [*BACKENDS, "cublas"])
def test_dtypes(backend, dtype, poisoned):
    Case(70, 50, 12, 4, (32, 48, 32), dtype, padding=5).check(backend, list(range(7)))


@pytest.mark.parametrize("trained", [[], [0], range(5)], ids=str)
@pytest.mark.parametrize(
    ("kept", "widths"), [(45, (24, 32, 40)), (45, (24, 32)), (1, (8, 16, 8)), (0, (8, 16, 8))], ids=str
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_after_a_count(backend, kept, widths, trained, poisoned):
    """As a bucket has them: blocks of padding alone, and one with both."""
    case = Case(60, kept, 20, 3, widths, padding=64)
    case.count = torch.tensor([kept], dtype=torch.int32, device=DEVICE)
    with triton_support.forced(dict.fromkeys(KERNELS, SMALL)):
        case.check(backend, list(trained))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("widths", [(24, 32), (24, 31, 33), (31, 24, 40, 33)], ids=str)
def test_depths_and_odd_widths_in_several_tiles(backend, widths, bias, poisoned):
    case = Case(60, 45, 20, 3, widths, bias=bias, padding=2)
    with triton_support.forced(dict.fromkeys(KERNELS, SMALL)):
        case.check(backend, list(range(len(case.tensors))))


@pytest.mark.parametrize("backend", [*BACKENDS, "cublas"])
@pytest.mark.parametrize(
    ("rows", "kept", "text", "newlines"), [(1, 1, 0, 0), (5, 0, 7, 0), (0, 0, 3, 0), (577, 577, 3, 24), (9, 1, 0, 9)]
)
def test_ragged_rows(backend, rows, kept, text, newlines, poisoned):
    case = Case(rows, kept, text, newlines, (16, 24, 20), padding=1 if rows else 0)
    case.check(backend, list(range(len(case.tensors))))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_at_all(backend, poisoned):
    case = Case(0, 0, 0, 0, (8, 8), constants=0)
    empty = torch.zeros(0, dtype=torch.int32, device=DEVICE)
    segment = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    case.source = case.row = empty
    case.inverse = InversePlacement(empty, empty, segment, empty, empty, segment)
    case.check(backend, list(range(len(case.tensors))))


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_are_handled(backend, poisoned):
    case = Case(30, 20, 5, 2, (24, 32, 16))
    case.tensors = [t.T.contiguous().T if t.dim() == 2 else t.repeat_interleave(2)[::2] for t in case.tensors]
    indices = (case.kept, case.source, case.row, *case.inverse)
    case.kept, case.source, case.row, *inverse = (t.repeat_interleave(2)[::2] for t in indices)
    case.inverse = InversePlacement(*inverse)
    assert not any(t.is_contiguous() for t in (*case.tensors[:4], case.kept, case.source, case.row, *case.inverse[:4]))
    case.check(backend, list(range(7)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_are_not_kept_get_no_gradient(backend, poisoned):
    case = Case(40, 15, 4, 2, (16, 24, 20))
    case.tensors[0].requires_grad_()
    with use_backend(backend):
        (grad,) = torch.autograd.grad(case.op(*case.tensors).square().sum(), case.tensors[0])
    kept = torch.zeros(40, dtype=torch.bool, device=DEVICE)
    kept[case.kept.long()] = True
    assert not grad[~kept].any()
    assert grad[kept].any(dim=1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_training_needs_is_kept(backend):
    """Elements kept beside indices and weights: features for the first weight alone, hidden rows from there on."""
    case = Case(30, 20, 5, 2, (16, 24, 12, 8))
    features, hidden = 30 * 16, (20 * 24, 20 * 12)
    expected = {0: sum(hidden), 1: features + sum(hidden), 2: sum(hidden), 3: hidden[1], 4: sum(hidden), 5: hidden[1]}
    expected |= {6: 0, 7: 0, 8: 0}  # the last bias, the embedding, the newline
    for index, elements in expected.items():
        for number, tensor in enumerate(case.tensors):
            tensor.requires_grad_(number == index)
        with use_backend(backend):
            out = case.op(*case.tensors)
        saved = out.grad_fn.saved_tensors
        own = [t for t in saved if t.is_floating_point() and not any(t is w for w in case.tensors[1:4])]
        assert sum(t.numel() for t in own) == elements, index


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_twice(backend):
    case = Case(100, 90, 30, 24, (16, 24, 20))
    for tensor in case.tensors:
        tensor.requires_grad_()
    with use_backend(backend):
        runs = [torch.autograd.grad(case.op(*case.tensors).square().sum(), case.tensors) for _ in "ab"]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("counted", [False, True])
def test_torch_library_contract(backend, counted):
    case = Case(12, 9, 5, 2, (8, 12, 8), padding=1)
    case.count = torch.tensor([9], dtype=torch.int32, device=DEVICE) if counted else None
    tensors = [tensor.requires_grad_() for tensor in case.tensors]
    features, w0, w1, b0, b1, embedding, constant = tensors
    given = (features, case.kept, [w0, w1], [b0, b1], case.source, case.row, embedding, constant, list(case.inverse))
    with use_backend(backend):
        torch.library.opcheck(torch.ops.llava_fast.assemble_inputs.default, (*given, "gelu", 0, case.count))
        out = torch.compile(case.op, fullgraph=True, backend="aot_eager")(*tensors)
        found = torch.autograd.grad(out.square().sum(), tensors)
        expected = torch.autograd.grad(case.op(*tensors).square().sum(), tensors)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_backwards_contract(backend):
    case = Case(12, 9, 5, 2, (8, 12, 8), padding=1)
    features, *layers = case.tensors[:5]
    grad = torch.randn(len(case.source), 8, device=DEVICE)
    pres = [torch.randn(len(case.kept), 12, device=DEVICE)]
    backward = torch.ops.llava_fast.assemble_inputs_backward.default
    with use_backend(backend):
        for wanted in (range(5), [0], [1], [2], [3], [4], []):
            given = (grad, features, case.kept, layers[:2], pres, case.source, case.row, list(case.inverse), "gelu", 12)
            needed = [i in wanted for i in range(5)]
            torch.library.opcheck(backward, (*given, needed), test_utils=("test_schema", "test_faketensor"))


def test_arguments_are_checked():
    case = Case(12, 9, 5, 2, (8, 12, 8))
    features, w0, w1, b0, b1, embedding, constant = case.tensors
    with pytest.raises(ValueError, match="2 weights and 1 biases"):
        assemble_inputs(features, case.kept, [w0, w1], [b0], case.source, case.row, embedding, constant, case.inverse)
    with pytest.raises(ValueError, match=r"weight 0 is .8, 12., but its input has 8 features"):
        assemble_inputs(features, case.kept, [w1, w1], [], case.source, case.row, embedding, constant, case.inverse)
    kept = case.kept[:8]
    with pytest.raises(ValueError, match="9 visual and 1 constant rows, but 8 rows are kept"):
        assemble_inputs(features, kept, [w0, w1], [b0, b1], case.source, case.row, embedding, constant, case.inverse)
    with pytest.raises(ValueError, match="projector 12, embedding 8"):
        assemble_inputs(features, case.kept, [w0], [b0], case.source, case.row, embedding, constant, case.inverse)
    with use_backend("triton"), pytest.raises(BackendError, match="dtypes differ"):
        case.op(features.half(), w0, w1, b0, b1, embedding, constant)
