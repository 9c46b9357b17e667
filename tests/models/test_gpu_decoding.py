"""What only a GPU shows of decoding: replayed graphs and device sampling beside the modules and the host's choice,
attention of all sequences at once beside the loop, and what a capture that fails leaves behind."""

import copy

import pytest
import torch

from llava_fast.generation import llava
from llava_fast.models import cuda_graphs
from llava_fast.models.blocks import varlen
from llava_fast.models.blocks.attention import Spans, attend
from llava_fast.models.paged_cache import BlockTable, PagedCache
from llava_fast.models.quantised import quantise_model
from llava_fast.ops import use_backend
from llava_fast.ops.packed_attention import forms
from llava_fast.ops.selection.store import Table
from llava_fast.ops.selection.verdict import Verdict
from tests.support import tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
DEVICE = torch.device("cuda", 0)
REQUESTS = [
    {"prompt": "<image>hello there", "images": [tiny.picture(60, 90)]},
    {"prompt": "a text that is longer than one block of rows, which has sixteen"},
    {"prompt": "x"},
]
DRAWN = {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.1, "seed": 3}


@pytest.mark.parametrize("options", [{}, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize(
    ("name", "scheme"),
    [("next", None), ("next_mistral_window", None), ("next_qwen3", None), ("next", "int8"), ("next", "int4")],
)
def test_answers_from_graphs_are_the_modules(name, scheme, options):
    model = copy.deepcopy(tiny.pair(name).ours)
    if scheme is not None:
        quantise_model(model, scheme)
    model = model.to(DEVICE)
    options = {"max_new_tokens": 40, "ignore_eos": True, **options}
    with use_backend("triton"):
        model.cuda_graphs = False
        expected = model.generate(REQUESTS, **options)
        model.cuda_graphs = True
        for _ in range(3):  # encoding replays from the second call on
            assert model.generate(REQUESTS, **options) == expected
    idle = llava._idle[model]
    graphs = idle.device.graphs
    for each in (graphs, idle.encoder):
        assert (each.unfit, each.failed) == (None, {})
        assert each.graphs.keys


def rows(count, heads, dtype):
    return torch.randn(count, heads, 64, dtype=torch.float64, device=DEVICE).to(dtype)


def distance(found, exact) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("form", [None, "padded"])
def test_all_sequences_at_once_are_the_loop(dtype, window, heads, cached, form, monkeypatch, select):
    """In the form that runs without a verdict, and padded as a verdict."""
    if form is not None:
        select().pinned = Table(verdicts={"packed_attention": Verdict(backend=form)})
    torch.manual_seed(0)
    lengths, before = (40, 1, 77), (0, 5, 33)
    given = [rows(sum(lengths), number, dtype) for number in (heads[0], heads[1], heads[1])]
    if (reason := varlen.unfit(given[0], None)) is not None:
        pytest.skip(reason)
    earlier = [[rows(at, heads[1], dtype).transpose(0, 1) for _ in ("keys", "values")] for at in before]
    weight = rows(sum(lengths), heads[0], torch.float64).flatten(1)

    def run(dtype):
        """The result, and its gradients without a cache."""
        inputs = [each.detach().to(dtype).requires_grad_(not cached) for each in given]
        if not cached:
            out = attend(*inputs, Spans((0, 40, 41), lengths), 0, None, window)
            return [out.detach(), *torch.autograd.grad((out * weight.to(dtype)).sum(), inputs)]
        cache = PagedCache(1, heads[1], 64, dtype, DEVICE, max_bytes=1 << 24, block_rows=16)
        tables = tuple(BlockTable(cache) for _ in lengths)
        for table, at, length, kept in zip(tables, before, lengths, earlier, strict=True):
            table.reserve(at + length)
            cache.append(0, table, 0, *(each.to(dtype) for each in kept))
        return [attend(*inputs, Spans((0, 40, 41), lengths, tables, before), 0, cache, window)]

    calls, at_once = [], varlen.attend_ragged
    monkeypatch.setattr(varlen, "attend_ragged", lambda *args: calls.append(1) or at_once(*args))
    found = run(dtype)
    assert calls == [1]
    monkeypatch.setattr(varlen, "unfit", lambda query, slopes: "the loop is asked for")
    for mine, exact in zip(found, run(torch.float64), strict=True):
        assert distance(mine, exact) < 2e-2
    assert calls == [1]
    assert not forms.refused


def test_a_capture_that_waits_for_the_gpu_leaves_the_stream_as_it_was():
    given, before = torch.ones(3, device=DEVICE), torch.cuda.current_stream(DEVICE)

    def waiting():
        return given * given.sum().item()

    with torch.cuda.device(DEVICE):
        with pytest.raises(RuntimeError):
            cuda_graphs.capture(waiting)
        assert torch.cuda.current_stream(DEVICE) == before
        assert not torch.cuda.is_current_stream_capturing()
        assert waiting().tolist() == [3, 3, 3]
        graph, out = cuda_graphs.capture(lambda: given * 2)
    given.fill_(4)
    graph.replay()
    assert out.tolist() == [8, 8, 8]
