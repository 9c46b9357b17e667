"""The ops' references against plain PyTorch, their gradients against finite differences, and their refusals."""

import pytest
import torch

from llava_fast.ops import mix_rows, token_pack, use_backend
from llava_fast.ops.backend import BackendError


@pytest.fixture(autouse=True)
def on_reference():
    """On a CPU "auto" is not always the reference."""
    with use_backend("reference"):
        yield


def test_token_pack_gathers_from_its_tables():
    embedding, visual, constant = torch.randn(6, 4), torch.randn(5, 4), torch.randn(1, 4)
    source = torch.tensor([0, 1, 2, -1, 0, 1, 1], dtype=torch.int32)
    row = torch.tensor([5, 4, 0, -1, 5, 0, 4], dtype=torch.int32)
    tables = {0: embedding, 1: visual, 2: constant}
    places = zip(source.tolist(), row.tolist(), strict=True)
    expected = torch.stack([tables[s][r] if s >= 0 else torch.zeros(4) for s, r in places])
    assert torch.equal(token_pack(source, row, embedding, visual, constant), expected)
    none = torch.zeros(0, dtype=torch.int32)
    assert token_pack(none, none, embedding, visual[:0], constant[:0]).shape == (0, 4)


def test_token_pack_gradients():
    source = torch.tensor([0, 1, 2, -1, 0, 2], dtype=torch.int32)
    row = torch.tensor([1, 1, 0, -1, 1, 0], dtype=torch.int32)
    tables = [torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (3, 2, 1)]
    assert torch.autograd.gradcheck(lambda *t: token_pack(source, row, *t), tables)


def test_mix_rows_sums_and_maxima():
    rows = torch.randn(6, 3)
    index, weight = torch.tensor([[0, 1], [5, 5], [2, 3]], dtype=torch.int32), torch.rand(3, 2)
    picked = rows[index.long()]
    torch.testing.assert_close(mix_rows(rows, index, weight), (picked * weight[..., None]).sum(1))
    assert torch.equal(mix_rows(rows, index, weight, "max"), picked.amax(1))
    assert mix_rows(rows.bfloat16(), index, weight).dtype == torch.bfloat16
    half = mix_rows(rows.bfloat16(), index, weight)
    wide = (rows.bfloat16().float()[index.long()] * weight[..., None]).sum(1).bfloat16()
    assert torch.equal(half, wide)  # summed in float32


@pytest.mark.parametrize("reduce", ["sum", "max"])
def test_mix_rows_gradients(reduce):
    rows = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    index, weight = torch.tensor([[0, 1, 2], [5, 4, 2]], dtype=torch.int32), torch.rand(2, 3)
    assert torch.autograd.gradcheck(lambda r: mix_rows(r, index, weight, reduce), rows)


def test_arguments_that_do_not_fit_are_refused():
    ids = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="differ in width"):
        token_pack(ids, ids, torch.zeros(3, 4), torch.zeros(3, 5), torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"must both be \[rows\]"):
        token_pack(ids, ids[:1], torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="'sum' or 'max'"):
        mix_rows(torch.zeros(3, 4), ids[None], torch.zeros(1, 2), "mean")
    with pytest.raises(ValueError, match=r"\[pooled, K\]"):
        mix_rows(torch.zeros(3, 4), ids[None], torch.zeros(1, 3))


def test_a_backend_that_cannot_serve_says_so():
    rows, index, weight = torch.zeros(3, 4), torch.zeros(1, 2, dtype=torch.int32), torch.ones(1, 2)
    with use_backend("reference"):
        mix_rows(rows, index, weight)
    with use_backend("native"), pytest.raises(BackendError, match="'native' does not serve the op 'mix_rows'"):
        mix_rows(rows, index, weight)
    with pytest.raises(BackendError, match="unknown backend"), use_backend("fast"):
        pass
