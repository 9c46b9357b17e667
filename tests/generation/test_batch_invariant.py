"""Runner(batch_invariant=True): every logit is bit-identical to that of a single run, whatever else runs."""

import random

import pytest
import torch

from llava_fast.generation import scheduler as scheduling
from llava_fast.generation.feature_cache import FeatureCache
from llava_fast.generation.runner import Runner
from llava_fast.generation.scheduler import Scheduler
from tests.generation.test_scheduler import REQUESTS, assert_empty, sequence_of
from tests.support import tiny


@pytest.fixture
def logits(monkeypatch):
    """The logits that each sequence's tokens were chosen from, by sequence."""
    seen: dict = {}
    choose = scheduling.choose

    def recorded(rows, sequences):
        for row, sequence in zip(rows, sequences, strict=True):
            seen.setdefault(sequence, []).append(row.clone())
        return choose(rows, sequences)

    monkeypatch.setattr(scheduling, "choose", recorded)
    return seen


def make(model, blocks: int | None = None) -> Scheduler:
    cache = model.decoder.new_cache(block_rows=4)
    if blocks is not None:
        cache.max_blocks = blocks
    return Scheduler(Runner(model, cache, batch_invariant=True), max_running=40)


def finish(scheduler: Scheduler) -> None:
    while not scheduler.is_idle:
        scheduler.step()


@pytest.mark.parametrize("kind", ["", "little memory", "hooked"])
@pytest.mark.parametrize("name", ["next", "next_dynamic_rope", "onevision_window"])
def test_no_bit_depends_on_the_company(name, kind, logits):
    model, dice = tiny.pair(name).ours, random.Random(f"{name} {kind}")
    hook = model.decoder.layers[0].register_forward_hook(lambda *_: None) if kind == "hooked" else None
    try:
        expected = []
        for request in REQUESTS:
            scheduler, sequence = Scheduler(Runner(model)), sequence_of(model, request)  # as generate does it
            scheduler.add(sequence)
            finish(scheduler)
            expected.append(logits.pop(sequence))
        longest = max(sequence_of(model, request).prompt.rows for request in REQUESTS)
        scheduler = make(model, longest // 4 + 6 if kind == "little memory" else None)
        running = []
        for number in [dice.randrange(len(REQUESTS)) for _ in range(14)]:
            running.append((number, sequence_of(model, REQUESTS[number])))
            scheduler.add(running[-1][1])
            for _ in range(dice.randrange(4)):
                scheduler.step()
            if dice.random() < 0.2:
                scheduler.cancel(dice.choice(running)[1])
        finish(scheduler)
    finally:
        if hook is not None:
            hook.remove()
    compared = 0
    for number, sequence in running:
        for mine, alone in zip(logits.get(sequence, []), expected[number], strict=False):
            assert torch.equal(mine, alone)
            compared += 1
    assert compared > 60
    if name == "next":
        assert (scheduler.stats.preemptions > 0) == (kind == "little memory")
    assert_empty(scheduler)


def test_more_than_one_native_step_holds(logits):
    model = tiny.pair("next").ours
    scheduler = make(model)
    sequences = [sequence_of(model, REQUESTS[number % 2 * 5]) for number in range(36)]
    for sequence in sequences:
        scheduler.add(sequence)
    finish(scheduler)
    for sequence in sequences[2:]:
        assert all(map(torch.equal, logits[sequence], logits[sequences[sequences.index(sequence) % 2]]))


def test_features_are_refused():
    with pytest.raises(ValueError, match="features"):
        Runner(tiny.pair("next").ours, features=FeatureCache(1), batch_invariant=True)
