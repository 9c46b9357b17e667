"""rope: every backend against float64, transformers' function, torch.library's own checks."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from llava_fast.models.fused.rotary import rotate
from llava_fast.ops import rope, use_backend
from llava_fast.ops.backend import BackendError
from llava_fast.ops.triton_support import forced
from tests.support.kernel_checks import DEVICE, DTYPES, check_op, relative

on_backends = pytest.mark.parametrize("backend", ["reference", "triton"])


def arguments(batch, heads, key_heads, rows, size, dtype=torch.float32, tables=None):
    """query, key as a decoder has them (views of [B, S, H, D]), and tables whose halves differ, as no real ones do."""
    query, key = (torch.randn(batch, rows, n, size, device=DEVICE, dtype=dtype) for n in (heads, key_heads))
    cos, sin = (torch.randn(tables or batch, rows, size, device=DEVICE, dtype=dtype) for _ in "ab")
    return [query.transpose(1, 2), key.transpose(1, 2), cos, sin]


def joined(*args):
    """Both results as one tensor: a gradient then flows to both."""
    return torch.cat([turned.flatten() for turned in rope(*args)])


def of_query(*args):
    return rope(*args)[0]


def of_key(*args):
    return rope(*args)[1]


def test_the_reference_is_transformers_function():
    args = [t.double() for t in arguments(2, 4, 2, 5, 6)]
    for x in args[:2]:
        x.requires_grad_()
    found, expected = rope(*args), apply_rotary_pos_emb(*args)
    grads = [torch.randn_like(each) for each in expected]
    for mine, theirs in zip(
        (*found, *torch.autograd.grad(found, args[:2], grads)),
        (*expected, *torch.autograd.grad(expected, args[:2], grads)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=1e-13)
    assert torch.autograd.gradcheck(joined, args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_half_precision_rounds_as_transformers_function_does(dtype):
    args = arguments(2, 4, 2, 9, 32, dtype)
    for found, expected in zip(rope(*args), apply_rotary_pos_emb(*args), strict=True):
        assert found.dtype == expected.dtype
        assert found.stride() == expected.stride()
        if dtype == torch.float32:
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(found, expected)


@on_backends
@pytest.mark.parametrize("trained", [[], [0], [1], [0, 1]], ids=str)
def test_every_choice_of_what_is_trained(backend, trained, poisoned):
    check_op(joined, arguments(2, 4, 2, 5, 8), trained, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_backends
def test_dtypes(backend, dtype, poisoned):
    check_op(joined, arguments(2, 3, 1, 9, 24, dtype), [0, 1], backend)


@on_backends
@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 1, 1, 2), (2, 3, 3, 0, 8), (0, 3, 3, 5, 8), (1, 2, 1, 57, 6), (1, 9, 3, 4, 128), (2, 17, 1, 2, 62)],
    ids=str,
)
def test_ragged_shapes(backend, sizes, poisoned):
    check_op(joined, arguments(*sizes), [0, 1], backend)
    check_op(joined, arguments(*sizes, tables=1), [0, 1], backend)  # one table for all sequences


@on_backends
def test_layouts(backend, poisoned):
    """However heads and rows lie, and slices of one wider product."""
    query, key, cos, sin = arguments(2, 4, 2, 5, 8)
    wide = torch.randn(2, 5, 8 * 8, device=DEVICE)
    sliced = [part.unflatten(-1, (-1, 8)).transpose(1, 2) for part in wide.split([32, 16, 16], dim=-1)[:2]]
    apart = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (query, key)]
    assert apart[0].stride(-1) != 1
    for pair in ([query.contiguous(), key.contiguous()], sliced, apart, [query[:, :1].expand(2, 4, 5, 8), key]):
        check_op(joined, [*pair, cos, sin], [0, 1], backend)
    check_op(joined, [query, key, cos.expand(2, 5, 8), sin.mT.contiguous().mT], [0, 1], backend)
    with use_backend(backend):
        assert rope(query, key, cos, sin)[0].stride() == query.stride()
    expanded = [x.clone().requires_grad_() for x in (query, key)]
    with use_backend(backend):
        found = torch.autograd.grad(sum(x.sum() for x in rope(*expanded, cos, sin)), expanded)  # an expanded gradient
    exact = torch.autograd.grad(sum(x.sum() for x in apply_rotary_pos_emb(*expanded, cos, sin)), expanded)
    for mine, theirs in zip(found, exact, strict=True):
        assert relative(mine, theirs) < 1e-6


@on_backends
def test_packed_rows_and_a_signed_table(backend, poisoned):
    """[R, H, D] as the decoder of this package has them, cos and sin [R, 1, D], the sign folded into sin."""
    query, key = torch.randn(13, 4, 8, device=DEVICE), torch.randn(13, 2, 8, device=DEVICE)
    cos, sin = (torch.randn(13, 1, 8, device=DEVICE) for _ in "ab")
    check_op(joined, [query, key, cos, sin, True], [0, 1], backend)
    with use_backend(backend):
        for found, x in zip(rope(query, key, cos, sin, True), (query, key), strict=True):
            torch.testing.assert_close(found, rotate(x, cos, sin), rtol=1e-6, atol=1e-6)
            assert found.is_contiguous()
        flat = rope(query, key, cos.squeeze(1), sin.squeeze(1))
        dense = rope(query.transpose(0, 1)[None], key.transpose(0, 1)[None], cos.mT[None, ..., 0], sin.mT[None, ..., 0])
    for found, expected in zip(flat, dense, strict=True):
        assert torch.equal(found, expected[0].transpose(0, 1))


@on_backends
def test_turning_back_is_the_gradient(backend):
    query, key, *_ = arguments(1, 4, 2, 7, 16)
    angle = torch.randn(1, 7, 8, device=DEVICE).repeat(1, 1, 2)
    query.requires_grad_()
    with use_backend(backend):
        turned = rope(query, key, angle.cos(), angle.sin())[0]
        assert relative(torch.autograd.grad(turned, query, turned)[0], query) < 1e-6


@on_backends
@pytest.mark.parametrize("heads", [1, 4])
def test_blocks_of_heads(backend, heads, poisoned):
    with forced({"rope_kernel": {"HEADS": heads, "num_warps": 4}}):
        check_op(joined, arguments(1, 7, 3, 4, 8), [0, 1], backend)


@on_backends
def test_a_result_that_nothing_uses_costs_no_gradient(backend):
    args = arguments(1, 4, 2, 7, 16)
    check_op(of_query, args, [0], backend)
    check_op(of_key, args, [1], backend)
    query, key = (x.clone().requires_grad_() for x in args[:2])
    with use_backend(backend):
        turned = rope(query, key, *args[2:])[0]
        assert torch.autograd.grad(turned.sum(), key, allow_unused=True)[0] is None


@on_backends
def test_tables_of_another_dtype_promote(backend):
    """As under autocast, where queries are half precision and the tables are not; gradients come in the query's."""
    query, key, cos, sin = arguments(1, 4, 2, 7, 16)
    args = [query.half(), key.half(), cos, sin]
    check_op(joined, args, [0, 1], backend, tolerance=1e-3)
    with use_backend(backend):
        assert rope(*args)[0].dtype == apply_rotary_pos_emb(*args)[0].dtype == torch.float32


def test_nothing_but_tables_is_kept():
    query, key, cos, sin = arguments(2, 4, 2, 7, 16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rope(query.requires_grad_(), key, cos, sin)
    assert {t.data_ptr() for t in kept} == {cos.data_ptr(), sin.data_ptr()}


@on_backends
def test_torch_library_contract(backend):
    query, key, cos, sin = arguments(2, 4, 2, 5, 8)
    ops, trained = torch.ops.llava_fast, [x.detach().requires_grad_() for x in (query, key)]
    with use_backend(backend):
        for is_signed in (False, True):
            torch.library.opcheck(ops.rope.default, (*trained, cos, sin, is_signed))
        given = (query, key[:, :0], cos, sin, False, torch.float32, torch.float16)
        torch.library.opcheck(ops.rope_backward.default, given, test_utils=("test_schema", "test_faketensor"))
        compiled = torch.compile(joined, fullgraph=True, backend="aot_eager")
        found = torch.autograd.grad(compiled(*trained, cos, sin).square().sum(), trained)
        expected = torch.autograd.grad(joined(*trained, cos, sin).square().sum(), trained)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


def test_a_second_derivative_is_refused():
    query, key, cos, sin = arguments(1, 4, 2, 7, 16)
    query.requires_grad_()
    first = torch.autograd.grad(of_query(query, key, cos, sin).square().sum(), query, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="rope has no second derivative"):
        first.sum().backward()


def test_what_does_not_fit_is_refused():
    query, key, cos, sin = arguments(2, 4, 2, 5, 8)
    bad = "query and key must be"
    for args in (
        (query, key[:, :, 1:], cos, sin),
        (query, key[..., 2:], cos, sin),
        (query, key[0], cos, sin),
        (query[0, 0], key[0, 0], cos, sin),
        (query[..., :7], key[..., :7], cos[..., :7], sin[..., :7]),
    ):
        with pytest.raises(ValueError, match=bad):
            rope(*args)
    for tables in ((cos[:, 1:], sin[:, 1:]), (cos, sin[:1]), (cos[..., :4], sin[..., :4]), (cos[0], sin[0])):
        with pytest.raises(ValueError, match=r"cos and sin must be \(2, 5, 8\) or \(1, 5, 8\)"):
            rope(query, key, *tables)
    with pytest.raises(ValueError, match=r"cos and sin must be \(5, 4, 8\)|must be \(5, 8\)"):
        rope(query[0].transpose(0, 1), key[0].transpose(0, 1), cos, sin)
    with pytest.raises(ValueError, match="all must be floating"):
        rope(query.int(), key.int(), cos, sin)
    with use_backend("triton"), pytest.raises(BackendError, match=r"torch.float64 is not one of"):
        rope(query.double(), key.double(), cos, sin)
