"""Decoding steps over device tensors alone, and from graphs, which are played (tests/support/played.py)."""

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from llava_fast.generation.prompt import read_prompt
from llava_fast.generation.runner import Runner
from llava_fast.generation.sampling import Sampling
from llava_fast.generation.sequence import new_sequence
from llava_fast.models import cuda_graphs, decode_graphs
from llava_fast.models.decode_graphs import DecodeGraphs
from llava_fast.models.paged_cache import BlockTable
from llava_fast.models.quantised import quantise_model
from llava_fast.ops import use_backend
from llava_fast.ops.selection.verdict import Verdict
from llava_fast.ops.triton_support import forced
from tests.support import tiny
from tests.support.played import Played, scheduler_of

PICTURES = [tiny.picture(60, 90, seed) for seed in range(2)]
REQUESTS = [
    {"prompt": "<image>hello there", "images": PICTURES[:1]},
    {"prompt": "x"},
    {"prompt": "no picture, but a text that is longer than one block of rows"},
    {"prompt": "a <image> b <image>", "images": PICTURES},
]


def answers(model, requests, graphs=None, tokens=9, block_rows=16, blocks=None, **options):
    """Greedy tokens of requests that join one after the other, a step apart; the runner."""
    scheduler = scheduler_of(model, graphs, block_rows, blocks, **options)
    sampling = Sampling(max_new_tokens=tokens, ignore_eos=True)
    sequences = [new_sequence(model, read_prompt(model.processor, each), sampling, None, True, ()) for each in requests]
    with torch.inference_mode():
        for sequence in sequences:
            scheduler.add(sequence)
            scheduler.step()
        while not scheduler.is_idle:
            scheduler.step()
    for sequence in sequences:
        if sequence.error is not None:
            raise sequence.error
    return [sequence.token_ids for sequence in sequences], scheduler.runner


NAMES = ["next", "next_qwen", "next_mistral_window", "onevision_window", "next_qwen3"]


@pytest.fixture(scope="module")
def expected():
    with use_backend("reference"):
        return {name: answers(tiny.pair(name).ours, REQUESTS)[0] for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_steps_without_a_graph(name, expected, served):
    assert answers(tiny.pair(name).ours, REQUESTS)[0] == expected[name]


@pytest.mark.parametrize("name", NAMES)
def test_steps_from_graphs(name, expected, served):
    """Sequences join and leave, so buckets of 1, 2 and 4 are met, and blocks are added between replays."""
    found, runner = answers(tiny.pair(name).ours, REQUESTS, Played)
    assert found == expected[name]
    assert runner.device.graphs.captures == 3
    assert runner.device.graphs.replays > 5


WHOLE = {"BLOCK_N": 128, "RUNS": 8, "num_warps": 4}  # a tiny weight in one program


@pytest.mark.parametrize(("graphs", "scheme"), [(None, None), (Played, None), (Played, "int4")])
def test_every_op_in_triton(graphs, scheme):
    """In the interpreter, so one short request."""
    requests, options = [{"prompt": "hello"}], {"graphs": graphs, "tokens": 3}
    model = tiny.pair("next_qwen").ours
    if scheme is not None:
        model = quantise_model(copy.deepcopy(model), scheme)
    with use_backend("reference"):
        expected, _ = answers(model, requests, tokens=3)
    with use_backend("triton"), forced(dict.fromkeys(("quantised_row_kernel", "dequantise_kernel"), WHOLE)):
        found, runner = answers(model, requests, **options)
    assert found == expected
    assert graphs is None or runner.device.graphs.replays == 1


def test_a_cache_that_grows_and_one_that_preempts(expected, served):
    found, runner = answers(tiny.pair("next").ours, REQUESTS, Played, block_rows=2, blocks=450)
    assert found == expected["next"]
    assert len(runner.cache.segments) > 1
    found, runner = answers(tiny.pair("next").ours, REQUESTS[1:3], Played, block_rows=2, blocks=33)
    assert found == expected["next"][1:3]


def test_weights_and_hooks_that_change_are_followed(served):
    model = copy.deepcopy(tiny.pair("next").ours)
    cache = model.decoder.new_cache()
    graphs = Played(model.decoder, cache)

    def step():
        table = BlockTable(cache)
        with torch.inference_mode():
            found = graphs([5], [table], [0])
            found = None if found is None else found.clone()
        with torch.no_grad():
            runner = Runner(model, cache)
            expected = runner._logits(runner._step([SimpleNamespace(cached=table, token_ids=[5])]))
        table.release()
        return found, expected

    def check(captures):
        found, expected = step()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert graphs.captures == captures

    assert step()[0] is None  # the first step of a bucket
    check(1)
    check(1)
    layer = model.decoder.layers[1]
    with torch.no_grad():
        layer.mlp.up_proj.weight.mul_(2)  # in place: the graph sees it
    check(1)
    layer.mlp.up_proj.weight.data = layer.mlp.up_proj.weight.data * 2
    check(2)
    layer.mlp.down_proj.weight = torch.nn.Parameter(layer.mlp.down_proj.weight.detach() * 2)
    check(3)
    hook = layer.mlp.register_forward_hook(lambda module, args, out: out * 3)
    assert step()[0] is None
    assert "hook" in graphs.unfit
    hook.remove()
    check(4)
    for module in (model.decoder, model.decoder.embed_tokens, model.decoder.lm_head):
        hook = module.register_forward_hook(lambda module, args, out: out * 3)
        assert step()[0] is None
        hook.remove()
    check(5)

    class Adapted(torch.nn.Module):
        """As PEFT's: an attribute says whether it adds anything."""

        def __init__(self, base):
            super().__init__()
            self.base_layer, self.disable_adapters = base, False

        def forward(self, x):
            return self.base_layer(x) * (1 if self.disable_adapters else 2)

    layer.mlp.up_proj = Adapted(layer.mlp.up_proj)
    assert step()[0] is step()[0] is None
    assert "(Adapted)" in graphs.unfit


def test_a_capture_that_fails_leaves_it_to_the_modules(expected, served, caplog):
    class Failing(Played):
        def capture(self, step):
            self.captures += 1
            raise RuntimeError("no memory for a graph")

    found, runner = answers(tiny.pair("next").ours, REQUESTS, Failing)
    graphs = runner.device.graphs
    assert found == expected["next"]
    assert graphs.captures == 3 * 2  # of each bucket, that chooses tokens and that ends with logits; none again
    assert len(graphs.failed) == graphs.captures
    assert all("no memory for a graph" in why for why in graphs.failed.values())
    assert len([record.message for record in caplog.records if "capturing" in record.message]) == graphs.captures


class Noting(Played):
    """Notes the sizes of its buckets."""

    def __init__(self, *args):
        super().__init__(*args)
        self.sizes, self.refused = [], 0

    @classmethod
    def of(cls, model):
        return cls(model.decoder, model.decoder.new_cache())

    def step(self, count):
        """Whether a step of so many sequences runs from a graph."""
        tables = [BlockTable(self.cache) for _ in range(count)]
        with torch.inference_mode():
            found = self([5] * count, tables, [0] * count)
        for table in tables:
            table.release()
        return found is not None

    def capture(self, step):
        replay, out = super().capture(step)
        if len(out) == self.refused:
            raise RuntimeError("operation not permitted")
        self.sizes.append(len(out))
        return replay, out


def test_a_capture_that_fails_leaves_other_graphs(served):
    """Of two sequences; those of one run from graphs, captured before and after."""
    graphs = Noting.of(tiny.pair("next").ours)
    graphs.refused = 2
    from_graphs = [graphs.step(count) for count in (1, 1, 2, 2, 2, 1, 4, 4)]
    assert from_graphs == [False, True, False, False, False, True, False, True]
    assert graphs.sizes == [1, 4]
    assert [key[1] for key in graphs.failed] == [2]
    assert graphs.unfit is None


def test_graphs_are_captured_where_the_bucket_has_a_kernel(select):
    """Verdicts give paged_attention a kernel for one sequence, the reference for two and nothing for four."""

    class Asking(Noting):
        has_kernel = DecodeGraphs.has_kernel

    model = tiny.pair("next").ours
    table = select().table(torch.device("cpu"))
    verdict = Verdict(backend="reference", op="paged_attention")
    table.verdicts["paged_attention"] = Verdict(backend="triton", op="paged_attention")  # so calls are classed
    graphs = Asking.of(model)
    assert not graphs.step(2)
    assert not graphs.step(2)  # no verdict for the class
    for two in [name for name in table.classes.values() if name.startswith("paged_attention query=fp32[2,")]:
        table.verdicts[two] = verdict
        table.verdicts[two.replace("[2", "[1")] = Verdict(backend="triton", op="paged_attention")
    assert [graphs.step(count) for count in (1, 1, 2, 2, 4, 4, 1)] == [False, True, False, False, False, False, True]
    assert graphs.sizes == [1]
    assert {key[1] for key in graphs.failed} == {2, 4}
    assert all("reference" in why for why in graphs.failed.values())


def test_the_graph_used_longest_ago_is_dropped(served, monkeypatch):
    monkeypatch.setattr(decode_graphs, "MOST_GRAPHS", 2)
    graphs = Noting.of(tiny.pair("next").ours)
    for count in (1, 1, 2, 2, 1, 4, 4, 1, 2):
        graphs.step(count)
    assert graphs.sizes == [1, 2, 4, 2]
    assert [key[1] for key in graphs.graphs.keys] == [1, 2]


def test_graphs_share_a_pool_until_a_capture_fails(monkeypatch):
    model = tiny.pair("next").ours
    graphs = DecodeGraphs(model.decoder, model.decoder.new_cache())
    graphs.has_kernel, pools = lambda step: True, []

    def capture(step, pool):
        pools.append(pool)
        if len(pools) == 3:
            raise RuntimeError("no memory for a graph")
        return SimpleNamespace(replay=None), torch.zeros(1)

    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(decode_graphs.cuda_graphs, "Pool", object)
    monkeypatch.setattr(decode_graphs.cuda_graphs, "capture", capture)
    for size in (1, 2, 4, 8):
        graphs._captured((decode_graphs.LOGITS, size, 32, "auto", torch.float32))
    assert pools[0] is pools[1] is pools[2] is not pools[3]
    assert [key[1] for key in graphs.graphs.keys] == [1, 2, 8]


def test_the_stream_is_restored_when_a_capture_cannot_end(monkeypatch):
    """As torch.cuda.graph, whose exit does not reach the stream's if the capture was invalidated."""
    side = SimpleNamespace(wait_stream=lambda other: None)
    before = SimpleNamespace(wait_stream=lambda other: None)
    now = [before]

    class Graph:
        def __init__(self, graph, pool, stream, capture_error_mode):
            self.stream = stream

        def __enter__(self):
            now[0] = self.stream

        def __exit__(self, *error):
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: now.__setitem__(0, stream))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)
    monkeypatch.setattr(torch.cuda, "graph", Graph)
    with pytest.raises(RuntimeError, match="previous error"):
        cuda_graphs.capture(lambda: torch.zeros(1), cuda_graphs.Pool("pool", side))
    assert now == [before]


def test_what_a_failed_warm_up_has_launched_is_waited_for(monkeypatch):
    waits = []
    side = SimpleNamespace(wait_stream=lambda other: None)
    before = SimpleNamespace(wait_stream=waits.append)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: before)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    with pytest.raises(ZeroDivisionError):
        cuda_graphs.capture(lambda: 1 / 0, cuda_graphs.Pool("pool", side))
    assert waits == [side]


def test_what_no_graph_serves(expected, served, monkeypatch):
    """RoPE that follows the length, and a backend without the op."""
    dynamic = tiny.pair("next_dynamic_rope").ours
    alone, _ = answers(dynamic, REQUESTS)
    found, runner = answers(dynamic, REQUESTS, Played)
    assert found == alone
    assert not runner.device.graphs.captures
    assert "dynamic" in runner.device.graphs.unfit
    monkeypatch.undo()
    with use_backend("reference"):
        found, runner = answers(tiny.pair("next").ours, REQUESTS, Played)
    assert found == expected["next"]
    assert not runner.device.graphs.captures
