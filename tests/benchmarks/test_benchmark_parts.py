"""Timing, memory, floors and shapes: each measures or counts correctly."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from benchmarks import floors
from benchmarks.floors import Floor, Phase, Sizes
from benchmarks.machine import Ceilings
from benchmarks.memory import PeakMemory
from benchmarks.shapes import SHAPES, build_config, build_tokenizer
from benchmarks.subject import Subject
from benchmarks.timing import Quantiles, Timed, time_in_turns

CPU = torch.device("cpu")


def test_providers_take_turns_and_inputs_rotate():
    calls: list = []
    timed = [
        Timed(lambda i: calls.append(("a", i)), lambda: calls.append("prepare"), lambda: calls.append("finish")),
        Timed(lambda i: calls.append(("b", i))),
    ]
    first, second = time_in_turns(timed, iters=5, warmup=0.0, device=CPU, blocks=2)
    assert (first.samples, second.samples) == (5, 5)
    runs = [call for call in calls if isinstance(call, tuple)]
    assert [name for name, _ in runs] == list("aaabbbaabb")
    assert [i for name, i in runs if name == "a"] == [0, 1, 2, 3, 4]
    assert calls[:3] == ["prepare", ("a", 0), "finish"]


def test_preparing_is_off_the_clock():
    slow = Timed(lambda i: time.sleep(0.002), lambda: time.sleep(0.05), lambda: time.sleep(0.05))
    (times,) = time_in_turns([slow], iters=3, warmup=0.0, device=CPU)
    assert 0.002 <= times.median < 0.05
    assert times.cpu < times.median  # sleeping takes no processor time


def test_warm_up_lasts_as_long_as_asked():
    calls: list[int] = []
    time_in_turns([Timed(lambda i: (calls.append(i), time.sleep(0.01)))], iters=1, warmup=0.05, device=CPU)
    assert len(calls) >= 3


def test_quantiles():
    times = Quantiles.of([(float(n), None) for n in range(11)])
    assert (times.median, times.p20, times.p80, times.cpu, times.samples) == (5.0, 2.0, 8.0, None, 11)


def test_peak_memory_sees_what_is_freed_again():
    with PeakMemory(CPU) as peak:
        bytearray(64 << 20)
    if peak.bytes is None:
        pytest.skip("this system has no high-water mark that can be reset")
    assert 60 << 20 < peak.bytes < 80 << 20
    with PeakMemory(CPU) as again:
        bytearray(1 << 20)
    assert again.bytes < 20 << 20  # the earlier peak does not count


def test_floor_takes_the_slower_ceiling_of_each_phase():
    ceilings = Ceilings(bytes_per_second=10.0, flops_per_second=100.0)
    floor = Floor((Phase(flops=100, bytes=1), Phase(flops=1, bytes=50)))
    assert floor.seconds(ceilings) == pytest.approx(1 + 5)
    assert floor.bound(ceilings) == "memory"
    assert Floor((Phase(100, 1),)).bound(ceilings) == "arithmetic"


def test_decode_floor_reads_every_weight_each_step(tiny):
    decoder = tiny.config.decoder
    floor = floors.decode_floor(decoder, context=7, batch=2, tokens=3, itemsize=4)
    read = [name for name, _ in tiny.ours.decoder.named_parameters() if "norm" not in name and "embed" not in name]
    weights = sum(tiny.ours.decoder.get_parameter(name).numel() for name in read)
    cached = 2 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim
    assert [phase.bytes for phase in floor.phases] == [4 * (weights + 2 * (7 + n) * cached) for n in range(3)]


def test_vision_floor_counts_the_weights_that_run(tiny):
    vision = tiny.config.vision
    tower = tiny.ours.vision_tower
    layers = tower.encoder.layers[: vision.layers_needed]
    weights = (
        sum(p.numel() for p in layers.parameters() if p.dim() > 1) + tower.embeddings.patch_embedding.weight.numel()
    )
    assert floors.vision_weights(vision) == weights


def test_prefill_floor_grows_with_rows(tiny):
    short, long = (
        floors.prefill_floor(tiny.config, Sizes(tiles=1, kept=36, lengths=(rows,), logits=1), 4) for rows in (50, 100)
    )
    assert long.phases[1].flops > 2 * short.phases[1].flops - 2 * floors.head_flops(tiny.config.decoder, 1)


@pytest.mark.parametrize("name", ["llava-1.5-7b", "llava-next-7b"])
def test_real_widths(name):
    full, cut = build_config(SHAPES[name]), build_config(SHAPES[name], layers=2)
    assert (full.text_config.hidden_size, full.text_config.intermediate_size) == (4096, 11008)
    assert (full.text_config.num_hidden_layers, full.vision_config.num_hidden_layers) == (32, 24)
    assert (full.vision_feature_layer, cut.vision_feature_layer) == (-2, -1)
    assert (cut.text_config.num_hidden_layers, cut.vision_config.num_hidden_layers) == (2, 2)
    assert cut.text_config.hidden_size == 4096


def test_every_token_has_text():
    tokenizer = build_tokenizer(500)
    assert len(tokenizer) == 500
    assert all(tokenizer.decode([token]) for token in range(500))
    assert tokenizer("<image>a").input_ids[:2] == [1, 3]


def test_both_sides_share_one_set_of_weights(tiny):
    theirs = tiny.hf.model.language_model.layers[0].mlp.up_proj.weight
    assert tiny.ours.decoder.layers[0].mlp.up_proj.weight.data_ptr() == theirs.data_ptr()
    assert not any(p.is_meta for p in tiny.ours.parameters())


def test_random_weights_have_the_spread_asked_for(tiny):
    weight = tiny.hf.model.language_model.layers[1].mlp.up_proj.weight
    assert weight.std().item() == pytest.approx(weight.shape[1] ** -0.5, rel=0.05)
    norm = tiny.hf.model.language_model.norm.weight
    assert norm.mean().item() == pytest.approx(1, abs=0.05)
    rows = np.unique(weight.detach().numpy(), axis=0)
    assert len(rows) == len(weight)


def test_unknown_model_is_named():
    with pytest.raises(ValueError, match="neither a shape"):
        Subject("llava-9-9b", None, torch.float32, "cpu")


@pytest.fixture(scope="module")
def tiny():
    subject = Subject("tiny", None, torch.float32, "cpu")
    yield subject
    subject.close()
