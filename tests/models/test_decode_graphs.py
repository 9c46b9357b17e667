"""Decoding steps over device tensors alone, and from graphs, which are played (tests/support/played.py)."""

import copy
from types import SimpleNamespace

import pytest
import torch

from llava_fast.generation.prompt import read_prompt
from llava_fast.generation.runner import Runner
from llava_fast.generation.sampling import Sampling
from llava_fast.generation.sequence import new_sequence
from llava_fast.models.paged_cache import BlockTable
from llava_fast.ops import use_backend
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


@pytest.mark.parametrize("graphs", [None, Played])
def test_every_op_in_triton(graphs):
    """In the interpreter, so one short request."""
    requests, options = [{"prompt": "hello"}], {"graphs": graphs, "tokens": 3}
    with use_backend("reference"):
        expected, _ = answers(tiny.pair("next_qwen").ours, requests, tokens=3)
    with use_backend("triton"):
        found, runner = answers(tiny.pair("next_qwen").ours, requests, **options)
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
    assert found == expected["next"]
    assert runner.device.graphs.captures == 2  # that chooses tokens, that ends with logits; neither again
    assert "no memory for a graph" in runner.device.graphs.unfit
    assert [record.message for record in caplog.records if "capturing" in record.message]


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
