"""All sequences of a pass in one call, in each form as its verdict, against the loop over them. varlen_attn and
xformers' attention need a GPU: here their documented meaning, written out, takes their place (tests/fake_gpu calls the
former for its shapes)."""

import importlib
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.attention import varlen as theirs

from llava_fast.generation.prompt import read_prompt
from llava_fast.generation.runner import Runner
from llava_fast.generation.sampling import Sampling
from llava_fast.generation.scheduler import Scheduler
from llava_fast.generation.sequence import new_sequence
from llava_fast.inputs.plan.plan import TextPiece
from llava_fast.models.batch import Batch
from llava_fast.models.blocks import varlen
from llava_fast.models.blocks.attention import Spans, attend
from llava_fast.models.paged_cache import BlockTable, PagedCache
from llava_fast.ops.packed_attention import forms
from llava_fast.ops.selection import samples, tables
from llava_fast.ops.selection.store import Table
from llava_fast.ops.selection.verdict import Verdict
from tests.support import tiny

op = importlib.import_module("llava_fast.ops.packed_attention")
calls: list[int] = []


def documented(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
    """torch.nn.attention.varlen.varlen_attn by its documentation, causality counted from the ends of both."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert key.stride(-1) == value.stride(-1) == query.stride(-1) == 1
    ends_q, ends_k = cu_seq_q.tolist(), cu_seq_k.tolist()
    assert (ends_q[-1], ends_k[-1]) == (len(query), len(key))
    lengths = [np.diff(ends).tolist() for ends in (ends_q, ends_k)]
    assert (max(lengths[0]), max(lengths[1])) == (max_q, max_k)
    left, right = window_size
    out = []
    for number, (count, total) in enumerate(zip(*lengths, strict=True)):
        q = query[ends_q[number] :][:count].transpose(0, 1)
        k, v = (each[ends_k[number] :][:total].transpose(0, 1) for each in (key, value))
        k, v = (each.repeat_interleave(len(q) // len(each), 0) for each in (k, v))
        distance = torch.arange(total) - torch.arange(total - count, total)[:, None]
        seen = distance <= right
        if left >= 0:
            seen &= distance >= -left
        scores = (q @ k.transpose(1, 2)).double() / q.shape[-1] ** 0.5
        out.append((scores.masked_fill(~seen, -torch.inf).softmax(-1).to(v) @ v).transpose(0, 1))
    return torch.cat(out)


class Bias:
    """xformers' BlockDiagonalCausalFromBottomRightMask and its local form, by their documentation."""

    def __init__(self, queries, keys, window=None):
        self.queries, self.keys, self.window = queries, keys, window

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen, *, device):
        assert device == torch.device("cpu")
        return cls(q_seqlen, kv_seqlen)

    def make_local_attention_from_bottomright(self, window_size):
        return Bias(self.queries, self.keys, window_size)

    @staticmethod
    def attention(query, key, value, attn_bias):
        """memory_efficient_attention: [1, rows, heads, size]."""
        assert query.shape[2] == key.shape[2]
        counts = [
            torch.tensor([0, *np.cumsum(each)], dtype=torch.int32) for each in (attn_bias.queries, attn_bias.keys)
        ]
        most = max(attn_bias.queries), max(attn_bias.keys)
        reach = (-1 if attn_bias.window is None else attn_bias.window - 1, 0)
        return documented(query[0], key[0], value[0], *counts, *most, window_size=reach)[None]


@pytest.fixture(params=["varlen", "xformers", "padded", "reference"])
def at_once(request, monkeypatch, select):
    """A form as the verdict for all calls; `calls` grows by the number of sequences of each call."""
    select().pinned = Table(verdicts={op.OP: Verdict(backend=request.param)})
    monkeypatch.setattr(varlen, "unfit", lambda query, slopes: "ALiBi" if slopes is not None else None)
    monkeypatch.setattr(op, "_unfit", lambda *args: {})
    documented_forms(monkeypatch)
    run = op._form
    monkeypatch.setattr(op, "_form", lambda name, args: calls.append(len(args[5])) or run(name, args))
    calls.clear()
    return request.param


def documented_forms(monkeypatch):
    monkeypatch.setattr(theirs, "varlen_attn", documented)
    ops = SimpleNamespace(memory_efficient_attention=Bias.attention)
    monkeypatch.setitem(sys.modules, "xformers", SimpleNamespace(ops=ops))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    monkeypatch.setitem(sys.modules, "xformers.ops.fmha", SimpleNamespace())
    biases = SimpleNamespace(BlockDiagonalCausalFromBottomRightMask=Bias)
    monkeypatch.setitem(sys.modules, "xformers.ops.fmha.attn_bias", biases)


def rows(count, heads, size=8):
    return torch.randn(count, heads, size, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2)])
@pytest.mark.parametrize(
    ("lengths", "branches", "padding"),
    [
        ((5,), (), 0),
        ((1, 7, 3), (), 2),
        ((9, 4), ((2, 3), ()), 0),
        ((6, 10, 8), ((), (1, 4, 3), (3, 0)), 3),
    ],
)
def test_without_a_cache(lengths, branches, padding, heads, window, at_once, monkeypatch):
    starts = tuple(sum(lengths[:i]) for i in range(len(lengths)))
    spans = Spans(starts, lengths, branches=branches)
    given = [rows(sum(lengths) + padding, number) for number in (heads[0], heads[1], heads[1])]
    weight = torch.randn(sum(lengths) + padding, heads[0] * 8, dtype=torch.float64)

    def run():
        out = attend(*given, spans, 0, None, window)
        grads = torch.autograd.grad((out * weight).sum(), given)
        return [out, *grads]

    found = [*run(), *run()][4:]  # the second layer's
    further = sum(1 for each in branches for size in each[1:] if size)
    assert calls == [len(lengths) + further] * 2
    monkeypatch.undo()
    assert torch.allclose(found[0][sum(lengths) :], torch.zeros((), dtype=torch.float64))
    for mine, expected in zip(found, run(), strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("codes", [None, "int8"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("before", [(0, 0, 0), (0, 5, 9), (7, 1, 0)])
def test_with_a_cache(before, window, codes, at_once, monkeypatch):
    """Blocks lie in any order over several segments."""
    lengths = (4, 1, 6)

    def run():
        torch.manual_seed(2)
        given = {"max_bytes": 1 << 20, "block_rows": 4, "codes": codes}
        cache = PagedCache(2, 2, 8, torch.float64, torch.device("cpu"), **given)
        order, tables = random.Random(4), []
        for _ in range(3):
            cache._grow(5)
        free = list(range(15))
        order.shuffle(free)
        for at, length in zip(before, lengths, strict=True):
            table = BlockTable(cache)
            table._add([free.pop() for _ in range(cache.blocks_for(at + length))])
            tables.append(table)
        for segment in cache.segments:
            segment.zero_() if codes else segment.normal_()
        spans = Spans((0, 4, 5), lengths, tuple(tables), before)
        given = [torch.randn(11, heads, 8, dtype=torch.float64) for heads in (4, 2, 2)]
        return [attend(*given, spans, layer, cache, window) for layer in (1, 0)], cache.segments

    found = run()
    assert calls == [3, 3]
    monkeypatch.undo()
    for mine, expected in zip(found, run(), strict=True):
        for each, other in zip(mine, expected, strict=True):
            torch.testing.assert_close(each, other)


@pytest.mark.parametrize("name", ["next_qwen", "next_mistral_window"])
def test_chunked_prefill_gives_the_same_answers(name, at_once, monkeypatch):
    model = tiny.pair(name).ours
    requests = [{"prompt": "<image>hello", "images": [tiny.picture(60, 90)]}, {"prompt": "a text"}, {"prompt": "x"}]

    def run():
        scheduler = Scheduler(Runner(model, model.decoder.new_cache(block_rows=16)), chunk_rows=37)
        sampling = Sampling(max_new_tokens=5, ignore_eos=True)
        made = [new_sequence(model, read_prompt(model.processor, each), sampling) for each in requests]
        for sequence in made:
            scheduler.add(sequence)
        while not scheduler.is_idle:
            scheduler.step()
        return [sequence.result().token_ids for sequence in made]

    found = run()
    assert len(calls) >= 3 * model.config.decoder.num_layers
    monkeypatch.undo()
    assert found == run()


def test_packed_training_and_shared_prompts(at_once, monkeypatch):
    model = tiny.pair("next_qwen").ours
    prompt = TextPiece(20 + np.arange(9), None)
    answers = [TextPiece(60 + np.arange(count), np.arange(count) >= 0) for count in (4, 3, 2)]
    pieces = [[prompt, *answers], [prompt, answers[0]]]
    batch = Batch.from_prepared(model.processor.assemble(pieces, [], branches=[(4, 3, 2), ()]), "cpu")

    def run():
        model.zero_grad()
        out = model(batch, logits="none")
        out.loss.backward()
        return [out.losses.detach(), *(each.grad.clone() for each in model.decoder.parameters())]

    found = run()
    assert calls == [4] * model.config.decoder.num_layers
    monkeypatch.undo()
    for mine, expected in zip(found, run(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)
    model.zero_grad()


def test_xformers_own_masks_mean_what_is_assumed():
    attn_bias = pytest.importorskip("xformers.ops.fmha.attn_bias")
    at = varlen.Ragged.of([2, 3, 1], [5, 3, 4], torch.device("cpu"))
    whole = attn_bias.BlockDiagonalCausalFromBottomRightMask.from_seqlens(*at.lengths, device=torch.device("cpu"))
    for window in (None, 1, 2):
        bias = whole if window is None else whole.make_local_attention_from_bottomright(window)
        seen = bias.materialize((1, 6, 12))[0] == 0
        for (first, count), (start, total) in zip(((0, 2), (2, 3), (5, 1)), ((0, 5), (5, 3), (8, 4)), strict=True):
            distance = torch.arange(total - count, total)[:, None] - torch.arange(total)
            expected = (distance >= 0) & (distance < (window or 99))
            assert torch.equal(seen[first : first + count, start : start + total], expected)
            assert seen[first : first + count].sum() == expected.sum()  # nothing of other sequences


@pytest.mark.parametrize("error", [NotImplementedError("No operator found\n  for these"), ImportError("no kernels")])
@pytest.mark.parametrize("at_once", ["xformers"], indirect=True)
def test_where_xformers_refuses_the_loop_runs(error, at_once, monkeypatch, caplog):
    def refuse(*given, **options):
        calls.append(0)
        raise error

    monkeypatch.setattr(sys.modules["xformers.ops"], "memory_efficient_attention", refuse)
    monkeypatch.setattr(forms, "refused", {})
    monkeypatch.setattr(forms, "has_xformers", lambda: True)
    monkeypatch.setattr(varlen, "unfit", lambda query, slopes: forms.xformers_unfit(query))
    given = [rows(8, 2) for _ in range(3)]

    def run():
        cache = PagedCache(2, 2, 8, torch.float64, torch.device("cpu"), max_bytes=1 << 20, block_rows=4)
        tables = (BlockTable(cache), BlockTable(cache))
        for table in tables:
            table.reserve(5)
        spans = Spans((0, 5), (5, 3), tables, (0, 0))
        with torch.no_grad():
            return [attend(*given, spans, layer, cache, None) for layer in (0, 1)]

    found = [*run(), attend(*given, Spans((0, 5), (5, 3)), 0, None, None)]
    assert calls == [2, 0, 2]  # refused, then the loop in its place; the rest is not asked
    assert "".join(caplog.messages).count("xformers refused: " + " ".join(str(error).split())) == 1
    monkeypatch.undo()
    for mine, expected in zip(found, [*run(), attend(*given, Spans((0, 5), (5, 3)), 0, None, None)], strict=True):
        torch.testing.assert_close(mine, expected)


def test_where_the_loop_stays(monkeypatch):
    query = torch.zeros(3, 2, 8)
    assert varlen.unfit(query, None) == "it needs CUDA"
    meta = torch.zeros(3, 2, 8, device="meta", dtype=torch.bfloat16)
    monkeypatch.setattr(forms, "flash_unfit", lambda device: None)

    class Fake:
        """Says that it is on CUDA."""

        def __init__(self, dtype=torch.bfloat16, size=64):
            self.device, self.dtype, self.shape = torch.device("cuda"), dtype, (3, 2, size)

    assert varlen.unfit(Fake(), None) is None
    assert "not torch.float32" in varlen.unfit(Fake(torch.float32), None)
    assert "head size of 36" in varlen.unfit(Fake(size=36), None)
    assert "head size of 264" in varlen.unfit(Fake(size=264), None)
    assert "ALiBi" in varlen.unfit(Fake(), torch.ones(2))
    assert varlen.unfit(meta, None) == "it needs CUDA"
    monkeypatch.setattr(forms, "flash_unfit", lambda device: "torch is too old")
    monkeypatch.setattr(forms, "has_xformers", lambda: False)
    assert varlen.unfit(Fake(), None) == "torch is too old, and xformers is not installed"
    monkeypatch.setattr(forms, "has_xformers", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert varlen.unfit(Fake(torch.float16), None) is None
    assert varlen.unfit(Fake(), None) == "torch is too old, and xformers takes bfloat16 from compute capability 8.0 on"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert varlen.unfit(Fake(), None) is None
    assert Spans((0, 3), (3, 2)).are_adjacent
    assert not Spans((0, 4), (3, 2)).are_adjacent
    assert not Spans((), ()).are_adjacent


def call(lengths, before=(), heads=(4, 2), size=16, dtype=torch.float32, gradients=False):
    """Arguments of packed_attention."""
    totals = [own + at for own, at in zip(lengths, before or [0] * len(lengths), strict=True)]
    at = varlen.Ragged.of(lengths, totals, torch.device("cpu"))
    shapes = (sum(lengths), heads[0]), (sum(totals), heads[1]), (sum(totals), heads[1])
    given = [torch.randn(*shape, size, dtype=dtype, requires_grad=gradients) for shape in shapes]
    return [*given, at.queries, at.keys, *at.lengths]


@pytest.mark.parametrize(("lengths", "before"), [((7, 9, 8), (5, 0, 3)), ((7, 9, 8), ()), ((700, 1, 3, 1, 2), ())])
def test_selection_takes_a_form_that_is_right_and_faster(lengths, before, select, monkeypatch):
    """Padding, or the loop where padding would take too many rows; gradients are those of the form."""
    from llava_fast.ops.selection import proof

    select(LLAVA_FAST_SELECT="first-use")
    monkeypatch.setattr(proof.Times, "is_faster", True)
    args = call(lengths, before, gradients=True)
    out = op.packed_attention(*args, window=4)
    (name, verdict), *rest = tables.settings().table(out.device).verdicts.items()
    assert not rest
    assert name.startswith("packed_attention query=fp32[")
    assert verdict.backend == ("reference" if 700 in lengths else "padded")
    assert not verdict.refused
    found = torch.autograd.grad(out.square().sum(), args[:3])
    exact = [each.detach().double().requires_grad_() for each in args[:3]]
    expected = op.packed_attention(*exact, *args[3:], window=4)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    for mine, other in zip(found, torch.autograd.grad(expected.square().sum(), exact), strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=1e-4, atol=1e-4)


def test_a_wrong_form_is_refused(select, monkeypatch):
    from llava_fast.ops.selection import proof

    select(LLAVA_FAST_SELECT="first-use")
    monkeypatch.setattr(proof.Times, "is_faster", True)
    stays = forms.padded
    monkeypatch.setitem(op.FORMS, "padded", lambda q, k, v, *rest: stays(q, k, v.roll(1, 0), *rest))
    op.packed_attention(*call((7, 9, 8)))
    (verdict,) = tables.settings().table(torch.device("cpu")).verdicts.values()
    assert verdict.backend == "reference"
    assert "more than twice" in verdict.refused["padded"]


def test_samples_are_few_rows_of_the_first_sequences():
    args = call((300, 5, 9, 1, 2), (0, 2000, 1, 0, 4))
    names = ("query", "key", "value", "queries", "keys", "query_lengths", "key_lengths", "window")
    found = samples.sample_of("packed_attention", dict(zip(names, [*args, 0], strict=True)))
    assert found["query_lengths"] == [64, 5, 9, 1]
    assert found["key_lengths"] == [64, 69, 10, 1]
    assert found["queries"].tolist() == [0, 64, 69, 78, 79]
    assert len(found["key"]) == len(found["value"]) == found["keys"][-1] == 144
    assert tuple(found) == names
