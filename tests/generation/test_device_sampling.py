"""Tokens chosen on the device, a step before the host sees them: the host's own, and a float64 reference's."""

import itertools
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llava_fast.errors import GenerationError
from llava_fast.generation import sampling as rules
from llava_fast.generation.device_sampling import Choice, Flight, Slots, chosen_tokens
from llava_fast.generation.prefix_cache import PrefixCache
from llava_fast.generation.prompt import read_prompt
from llava_fast.generation.sampling import Sampler, Sampling, uniform
from llava_fast.generation.sequence import new_sequence
from llava_fast.models.decode_graphs import MOST_SEQUENCES
from tests.support import tiny
from tests.support.played import Played, scheduler_of

VOCABULARY = 200
GRID = [
    Sampling(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, repetition_penalty=penalty)
    for temperature, top_p, top_k, min_p, penalty in itertools.product(
        (0.0, 0.3, 1.0, 2.5), (1.0, 0.9, 0.4), (0, 1, 7, 1000), (0.0, 0.05), (1.0, 1.3)
    )
]


def reference(logits, options: Sampling, seen, number: float) -> int:
    """One token, in float64."""
    x = logits.double().numpy().copy()
    for token in seen:
        x[token] = x[token] / options.repetition_penalty if x[token] > 0 else x[token] * options.repetition_penalty
    if options.temperature == 0:
        return int(x.argmax())
    x = (x - x.max()) / options.temperature
    order = np.argsort(x, kind="stable")
    if options.top_k:
        x[x < x[order[-min(options.top_k, len(x))]]] = -np.inf
    if options.top_p < 1:
        mass = np.exp(x[order]).cumsum() / np.exp(x).sum()
        x[order[:-1][mass[:-1] <= 1 - options.top_p]] = -np.inf
    if options.min_p:
        x[x < np.log(options.min_p)] = -np.inf
    reached = np.exp(x).cumsum()
    return int((reached <= number * reached[-1]).sum())


def rows_of(options, seen, seeds, tokens):
    """Sequences as Choice reads them."""
    return [
        SimpleNamespace(sampler=Sampler(each, seed, ids), token_ids=[token], ahead=0, slot=None)
        for each, ids, seed, token in zip(options, seen, seeds, tokens, strict=True)
    ]


@pytest.mark.parametrize("spread", [0.3, 4.0])
def test_host_and_device_choose_as_the_reference(spread):
    """Every combination of options, all rows at once."""
    draw = torch.Generator().manual_seed(1)
    logits = torch.randn(len(GRID), VOCABULARY, generator=draw) * spread
    seen = [torch.randint(0, VOCABULARY, (30,), generator=draw).unique().tolist() for _ in GRID]
    rows = rows_of(GRID, seen, range(len(GRID)), [ids[0] for ids in seen])
    slots = Slots(VOCABULARY, torch.device("cpu"))
    for row in rows:
        slots.give(row)
    choice = Choice(slots, draws=True, sorts=True, penalises=True)
    types = {name: getattr(torch, column.dtype) for name, column in choice.columns.items()}
    given = {name: torch.tensor(values, dtype=types[name]) for name, values in choice.values(rows).items()}
    device = choice.result(choice.tokens(given), logits, given).tolist()
    for row, mine, logit, ids in zip(rows, device, logits, seen, strict=True):
        options, number = row.sampler.options, uniform(row.sampler.seed, 1)
        penalised = ids if options.repetition_penalty != 1 else ()
        assert mine == reference(logit, options, penalised, number), options
        row.sampler.drawn = row.token_ids.copy()
        assert row.sampler(logit) == mine
    assert slots.last[[row.slot for row in rows]].tolist() == device


def test_what_no_row_needs_changes_no_token():
    """A row's token does not depend on what its neighbours ask for."""
    logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(3)) * 3
    for temperature, number in itertools.product((0.0, 0.8), (0.0, 0.3, 0.999)):
        plain = {"number": [number], "temperature": [temperature], "least": [-torch.inf]}
        given = {name: torch.tensor(value) for name, value in plain.items()}
        sorted_too = {**given, "top_k": torch.tensor([0]), "tail": torch.tensor([0.0])}
        assert torch.equal(chosen_tokens(logits, given), chosen_tokens(logits, sorted_too))
        if not temperature:
            assert torch.equal(chosen_tokens(logits, given), chosen_tokens(logits, {}))


@pytest.mark.parametrize("columns", ["greedy", "drawn"])
def test_a_row_that_is_not_numbers_is_marked_and_no_other(columns):
    logits = torch.zeros(4, 5)
    logits[:, 2] = 9
    logits[1, 3] = torch.nan
    logits[2] = -torch.inf
    drawn = {"number": [0.5] * 4, "temperature": [0.1] * 4, "least": [-torch.inf] * 4}
    given = {name: torch.tensor(value) for name, value in drawn.items()} if columns == "drawn" else {}
    found = chosen_tokens(logits, given).tolist()
    assert found[0] == found[3] == 2
    assert found[1] == -1
    assert found[2] == (-1 if columns == "drawn" else 0)
    if columns == "drawn":
        with pytest.raises(GenerationError, match="not numbers"):
            Sampler(Sampling(temperature=1), 0, [])(logits[2])


def test_the_numbers_of_draws():
    assert rules._mixed(rules._STEP) == 0xE220A8397B1DCDAF  # SplitMix64's first output for the seed 0
    numbers = np.array([[uniform(seed, number) for number in range(100)] for seed in range(100)])
    assert 0 <= numbers.min() < numbers.max() < 1
    assert len(np.unique(numbers)) == numbers.size
    counts = np.histogram(numbers, 10, (0, 1))[0]
    assert (abs(counts - 1000) < 4 * 30).all()
    for other in (numbers[1:] - numbers[:-1], numbers[:, 1:] - numbers[:, :-1]):  # neighbours are independent
        assert abs(np.var(other) - 1 / 6) < 0.005


# ---------------------------------------------------------------- whole answers

PICTURES = [tiny.picture(60, 90, seed) for seed in range(2)]
REQUESTS = [
    {"prompt": "<image>hello there", "images": PICTURES[:1]},
    {"prompt": "x"},
    {"prompt": "no picture, but a text that is longer than one block of rows"},
    {"prompt": "a <image> b <image>", "images": PICTURES},
]
GREEDY = {"temperature": 0}
DRAWN = {"temperature": 1.2}
FILTERED = {"temperature": 1.5, "top_k": 40, "top_p": 0.95, "min_p": 0.01}
PENALISED = {"temperature": 0.9, "repetition_penalty": 1.4}
GREEDY_PENALISED = {"repetition_penalty": 1.4}
MIXES = {
    "greedy": [GREEDY] * 4,
    "drawn": [DRAWN] * 4,
    "mixed": [GREEDY, FILTERED, PENALISED, GREEDY_PENALISED],
    "with one that the host chooses for": [GREEDY, DRAWN, {"logprobs": 1}, PENALISED],
}


def sequences_of(model, mix, tokens=12, **common):
    made = []
    for number, (request, options) in enumerate(zip(REQUESTS, mix, strict=False)):
        sampling = Sampling(max_new_tokens=tokens, **{"ignore_eos": True, **common, **options})
        made.append(new_sequence(model, read_prompt(model.processor, request), sampling, number, True))
    return made


def run(scheduler, sequences, apart=1):
    """Each joins so many steps after the one before; (texts as they came, all)."""
    pieces = {id(each): "" for each in sequences}
    waiting = list(sequences)
    while waiting or not scheduler.is_idle:
        if waiting:
            scheduler.add(waiting.pop(0))
        for _ in range(apart if waiting else 1):
            moved = scheduler.step()
            assert len({id(each) for each, _ in moved}) == len(moved)
            for sequence, piece in moved:
                pieces[id(sequence)] += piece
    return [pieces[id(each)] for each in sequences]


def assert_empty(scheduler):
    assert scheduler.stats.used_blocks == 0
    assert not any(scheduler.cache.users)
    assert len(scheduler.runner.device.slots.free) == MOST_SEQUENCES


@pytest.mark.parametrize("name", list(MIXES))
def test_answers_are_the_hosts(name, served):
    model = tiny.pair("next").ours
    expected = sequences_of(model, MIXES[name])
    texts = run(scheduler_of(model), expected)
    scheduler, found = scheduler_of(model, Played), sequences_of(model, MIXES[name])
    assert run(scheduler, found, apart=3) == texts
    assert [each.result() for each in found] == [each.result() for each in expected]
    assert scheduler.runner.device.graphs.replays > 5
    assert_empty(scheduler)


def test_a_step_is_launched_before_the_last_ones_tokens_are_read(served, monkeypatch):
    """One step behind, and nothing launched beyond the limit."""
    model, log = tiny.pair("next").ours, []
    scheduler, (sequence,) = scheduler_of(model, Played), sequences_of(model, [DRAWN], tokens=7)
    launch, tokens = scheduler.runner.launch, Flight.tokens

    def launched(sequences):
        flight = launch(sequences)
        log.append(("launch", len(sequence.token_ids)) if flight else ("host", len(sequence.token_ids)))
        return flight

    monkeypatch.setattr(scheduler.runner, "launch", launched)
    monkeypatch.setattr(Flight, "tokens", lambda self: log.append(("read", len(sequence.token_ids))) or tokens(self))
    run(scheduler, [sequence])
    # the prompt gives token 1, the first step of a bucket runs the modules
    steps = [("launch", 2), ("launch", 2), ("read", 2), ("launch", 3), ("read", 3), ("launch", 4), ("read", 4)]
    assert log == [("host", 1), *steps, ("launch", 5), ("read", 5), ("read", 6)]
    assert len(sequence.token_ids) == 7
    assert scheduler.runner.device.graphs.replays == 5


@pytest.mark.parametrize("prefixes", [None, PrefixCache])
def test_a_token_too_many_is_dropped_where_an_answer_ends(prefixes, served):
    """At end tokens and stop strings; the cache then holds what a later prompt may take."""
    model = tiny.pair("next").ours
    (first,) = sequences_of(model, [GREEDY], tokens=30)
    run(scheduler_of(model), [first])
    stops = [first.text.text[9:11], "no such string"]
    expected = sequences_of(model, MIXES["mixed"], tokens=40, stop=stops)
    run(scheduler_of(model), expected)
    assert [each.finish_reason for each in expected].count("stop") >= 1
    scheduler = scheduler_of(model, Played, prefixes=prefixes)
    for _ in range(2):
        found = sequences_of(model, MIXES["mixed"], tokens=40, stop=stops)
        run(scheduler, found, apart=2)
        assert [each.result() for each in found] == [each.result() for each in expected]
        assert scheduler._flight is None
        assert_empty(scheduler)
    assert (scheduler.stats.reused_rows > 0) == (prefixes is not None)
    # An end token: the answer's own third.
    (ended,) = sequences_of(model, [GREEDY], tokens=30)
    ended.end_ids = frozenset(first.token_ids[4:5])
    run(scheduler, [ended])
    assert ended.token_ids == first.token_ids[: first.token_ids.index(first.token_ids[4]) + 1]
    assert ended.finish_reason == "stop"


def test_random_joins_and_leaves(served):
    model, dice = tiny.pair("next").ours, random.Random(5)
    mix = MIXES["mixed"]
    alone = sequences_of(model, mix, tokens=30)
    run(scheduler_of(model), alone, apart=40)
    longest = max(each.prompt.rows for each in alone)
    scheduler = scheduler_of(model, Played, block_rows=4, blocks=longest // 4 + 9, chunk_rows=64)
    running = []
    for _ in range(3):
        for number, sequence in enumerate(sequences_of(model, mix, tokens=30)):
            scheduler.add(sequence)
            running.append((alone[number], sequence))
            for _ in range(dice.randrange(5)):
                scheduler.step()
            if dice.random() < 0.3:
                scheduler.cancel(dice.choice(running)[1])
    while not scheduler.is_idle:
        scheduler.step()
    for expected, sequence in running:
        assert sequence.token_ids == expected.token_ids[: len(sequence.token_ids)]
        assert sequence.finish_reason == "cancelled" or len(sequence.token_ids) == 30
    assert scheduler.runner.device.graphs.replays > 20
    assert_empty(scheduler)


def test_who_is_preempted_knows_its_tokens(served):
    model, mix = tiny.pair("next").ours, [GREEDY, FILTERED, PENALISED]
    expected = sequences_of(model, mix, tokens=60)[1:]
    run(scheduler_of(model), expected)
    scheduler = scheduler_of(model, Played, block_rows=4, blocks=36)
    found = sequences_of(model, mix, tokens=60)[1:]
    run(scheduler, found)
    assert [each.result() for each in found] == [each.result() for each in expected]
    assert scheduler.stats.preemptions
    assert_empty(scheduler)


def test_failures_stay_with_their_sequence(served, monkeypatch, caplog):
    model = tiny.pair("next").ours
    expected = sequences_of(model, [DRAWN] * 3)
    run(scheduler_of(model), expected)
    tokens, reads = Flight.tokens, []

    def one_wrong(flight):
        reads.append(flight)
        found = tokens(flight)
        return [-1 if len(reads) == 5 and number == 1 else token for number, token in enumerate(found)]

    monkeypatch.setattr(Flight, "tokens", one_wrong)
    scheduler, found = scheduler_of(model, Played, prefixes=PrefixCache), sequences_of(model, [DRAWN] * 3)
    run(scheduler, found)
    assert "not numbers" in str(found[1].error)
    assert [found[0].token_ids, found[2].token_ids] == [expected[0].token_ids, expected[2].token_ids]
    assert_empty(scheduler)
    # A launch that fails leaves the step to the host.
    monkeypatch.setattr(Flight, "tokens", tokens)
    scheduler, found = scheduler_of(model, Played), sequences_of(model, [DRAWN] * 3)
    monkeypatch.setattr(scheduler.runner, "launch", lambda sequences: 1 / 0)
    run(scheduler, found)
    assert [each.token_ids for each in found] == [each.token_ids for each in expected]
    assert "launching a step of 1 sequences failed" in caplog.text
    # A device that fails while the host waits ends every sequence.
    scheduler, found = scheduler_of(model, Played), sequences_of(model, [DRAWN] * 3)
    monkeypatch.setattr(Flight, "tokens", lambda flight: 1 / 0)
    run(scheduler, found)
    assert [each.finish_reason for each in found] == ["error"] * 3
    assert_empty(scheduler)


def test_a_capture_that_fails_leaves_the_choice_to_the_host(served, caplog):
    """And the graph that ends with logits still runs."""

    class Failing(Played):
        def capture(self, step):
            replay, out = super().capture(step)
            if not out.is_floating_point():
                raise RuntimeError("no sort in a graph")
            return replay, out

    model = tiny.pair("next").ours
    expected = sequences_of(model, [DRAWN] * 2)
    run(scheduler_of(model), expected)
    scheduler, found = scheduler_of(model, Failing), sequences_of(model, [DRAWN] * 2)
    run(scheduler, found)
    assert [each.result() for each in found] == [each.result() for each in expected]
    assert scheduler.runner.device.graphs.unfit is None
    assert scheduler.runner.device.graphs.replays > 5
    assert caplog.text.count("no sort in a graph'); the host chooses its tokens") == 2  # once for each bucket
    assert_empty(scheduler)
