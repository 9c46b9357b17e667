"""The scheduler: an answer equals that of `generate`, whatever else joins, leaves, waits, is chunked, preempted or
fails; and its blocks are freed."""

import random

import pytest
import torch

from llava_fast.errors import CacheFullError, GenerationError
from llava_fast.generation import scheduler as scheduling
from llava_fast.generation.prefix_cache import PrefixCache
from llava_fast.generation.prompt import read_prompt
from llava_fast.generation.runner import Runner
from llava_fast.generation.sampling import Sampling
from llava_fast.generation.scheduler import Scheduler
from llava_fast.generation.sequence import new_sequence
from tests.support import tiny

PICTURES = [tiny.picture(60, 90, seed) for seed in range(3)]
REQUESTS = [
    {"prompt": "<image>hello there", "images": PICTURES[:1]},
    {"prompt": "no picture, but a text that is longer than one block of rows"},
    {"prompt": "<image>hello there, and more", "images": PICTURES[:1]},
    {"prompt": "a <image> b <image>", "images": PICTURES[1:]},
    {"prompt": "no picture, but a text that is longer than one block of rows, and goes on"},
    {"prompt": "x"},
]
OPTIONS = {"max_new_tokens": 14, "ignore_eos": True}
NAMES = ["next", "next_mistral_window", "next_dynamic_rope", "onevision_window"]


def make(model, blocks: int | None = None, reuse: bool = False, block_rows: int = 16, **options) -> Scheduler:
    cache = model.decoder.new_cache(keep_bytes=1 << 30 if reuse and blocks is None else 0, block_rows=block_rows)
    if blocks is not None:
        cache.max_blocks = blocks
    runner = Runner(model, cache)
    return Scheduler(runner, PrefixCache(cache) if reuse else None, **options)


def sequence_of(model, request: dict, processors=(), **options):
    sampling = Sampling(**{**OPTIONS, **options})
    return new_sequence(model, read_prompt(model.processor, request), sampling, request.get("seed"), True, processors)


def run(scheduler: Scheduler, *sequences) -> None:
    for sequence in sequences:
        scheduler.add(sequence)
    while not scheduler.is_idle:
        scheduler.step()


def assert_empty(scheduler: Scheduler) -> None:
    assert scheduler.is_idle
    stats = scheduler.stats
    assert stats.used_blocks == stats.waiting == stats.prefilling == stats.decoding == 0
    assert not any(scheduler.cache.users)
    assert stats.kept_blocks == scheduler.cache.blocks - scheduler.cache.free_blocks
    if scheduler.prefixes is None:
        assert stats.kept_blocks == 0


def encoded(model, monkeypatch) -> list[int]:
    """A growing list of how many tiles each call of the tower had."""
    calls, forward = [], model.vision_tower.forward
    monkeypatch.setattr(model.vision_tower, "forward", lambda t, **how: calls.append(len(t)) or forward(t, **how))
    return calls


@pytest.fixture(scope="module")
def alone():
    """What generate gives each request of REQUESTS alone, by model name."""
    found: dict[str, list] = {}

    def answers(name: str):
        if name not in found:
            model = tiny.pair(name).ours
            found[name] = [model.generate([request], **OPTIONS)[0] for request in REQUESTS]
        return found[name]

    return answers


@pytest.mark.parametrize("reuse", [False, True], ids=["", "prefixes"])
@pytest.mark.parametrize("little", [False, True], ids=["", "little memory"])
@pytest.mark.parametrize("name", NAMES)
def test_random_joins_and_leaves_change_no_answer(name, little, reuse, alone):
    model, dice = tiny.pair(name).ours, random.Random(f"{name} {little} {reuse}")
    longest = max(answer.usage.prompt_tokens for answer in alone(name))
    scheduler = make(model, longest // 4 + 6 if little else None, reuse, 4, chunk_rows=13, max_running=4)
    running, left = [], 0
    for _ in range(2):
        for number in dice.sample(range(len(REQUESTS)), len(REQUESTS)):
            sequence = sequence_of(model, REQUESTS[number])
            scheduler.add(sequence)
            running.append((number, sequence, []))
            for _ in range(dice.randrange(8)):
                moved = scheduler.step()
                assert len({id(s) for s, _ in moved}) == len(moved)
                for _, mine, pieces in running:
                    pieces += [text for s, text in moved if s is mine]
            if dice.random() < 0.3:
                cancelled = dice.choice(running)[1]
                left += cancelled.finish_reason is None
                scheduler.cancel(cancelled)
    while not scheduler.is_idle:
        moved = scheduler.step()
        for _, mine, pieces in running:
            pieces += [text for s, text in moved if s is mine]
    for number, sequence, pieces in running:
        expected = alone(name)[number]
        if sequence.finish_reason == "cancelled":
            assert sequence.token_ids == expected.token_ids[: len(sequence.token_ids)]
        else:
            assert sequence.result() == expected
            assert "".join(pieces) == expected.text
    assert left
    assert little or not scheduler.stats.preemptions
    assert (scheduler.stats.reused_rows > 0) == reuse
    assert_empty(scheduler)


def test_a_long_prompt_does_not_stall_the_others():
    model = tiny.pair("next").ours
    scheduler = make(model, chunk_rows=16)
    short, long = sequence_of(model, REQUESTS[5]), sequence_of(model, REQUESTS[3])
    scheduler.add(short)
    scheduler.step()
    scheduler.add(long)
    assert long.prompt.rows > 5 * 16
    for tokens in range(2, 7):
        assert [sequence for sequence, _ in scheduler.step()] == [short]
        assert len(short.token_ids) == tokens
        assert not long.token_ids
        assert long.table.length == 16 * (tokens - 1)
    run(scheduler)


@pytest.mark.parametrize("chunk_rows", [1, 7, 1000])
def test_an_image_in_several_chunks_is_encoded_once(chunk_rows, monkeypatch, alone):
    model, expected = tiny.pair("next").ours, alone("next")[3]
    calls = encoded(model, monkeypatch)
    sequence = sequence_of(model, REQUESTS[3])
    run(make(model, chunk_rows=chunk_rows), sequence)
    assert sequence.result() == expected
    assert sum(calls) == sum(len(model.processor.tiles(picture, alone=True)) for picture in PICTURES[1:])


# ---------------------------------------------------------------- blocks


def test_without_free_blocks_a_sequence_waits_for_them(alone):
    model = tiny.pair("next").ours
    scheduler = make(model, blocks=9)
    first, second = sequence_of(model, REQUESTS[4]), sequence_of(model, REQUESTS[1])
    for sequence in (first, second):
        scheduler.add(sequence)
    while first.finish_reason is None:
        scheduler.step()
        assert scheduler.stats.waiting == (second.table is None)
    assert second.table is None
    run(scheduler)
    assert second.result() == alone("next")[1]
    assert scheduler.stats.preemptions == 0
    assert_empty(scheduler)


def test_a_prompt_that_never_fits_is_refused_and_an_answer_ends_where_memory_does(alone):
    model = tiny.pair("next").ours
    scheduler = make(model, blocks=5)
    rows = 5 * scheduler.cache.block_rows
    with pytest.raises(CacheFullError, match=rf"rows and the KV cache holds {rows}"):
        scheduler.add(sequence_of(model, REQUESTS[3]))
    sequence = sequence_of(model, REQUESTS[1], max_new_tokens=1000)
    run(scheduler, sequence)
    expected = model.generate([REQUESTS[1]], max_new_tokens=rows - sequence.prompt.rows, ignore_eos=True)[0]
    assert sequence.result() == expected
    assert expected.finish_reason == "length"
    assert_empty(scheduler)


@pytest.mark.parametrize("name", ["next", "next_dynamic_rope"])
def test_who_came_last_gives_way_and_answers_as_if_nothing_had_happened(name):
    """Dynamic RoPE turns keys of an answer beyond the decoder's own length one base each: they are run one by one."""
    model = tiny.pair(name).ours
    options = {"max_new_tokens": 90, "ignore_eos": True, "temperature": 0.9}
    requests = [{**REQUESTS[1], "seed": 5}, {**REQUESTS[1], "seed": 6}]
    expected = model.generate(requests, **options)
    scheduler = make(model, blocks=14)
    sequences = [sequence_of(model, request, **options) for request in requests]
    run(scheduler, *sequences)
    assert scheduler.stats.preemptions >= 1
    assert sequences[1].admission > 1
    assert [sequence.result() for sequence in sequences] == expected
    assert_empty(scheduler)


def test_memory_stays_flat_over_many_generations():
    model = tiny.pair("next").ours
    scheduler = make(model, reuse=True)
    scheduler.cache.keep_blocks = 40
    for number in range(0, 1000, 20):
        requests = [{"prompt": f"{count} is a number"} for count in range(number, number + 20)]
        run(scheduler, *(sequence_of(model, request, max_new_tokens=2) for request in requests))
    assert scheduler.cache.blocks <= max(40, (1 << 20) // scheduler.cache.block_bytes)
    assert len(scheduler.prefixes._nodes) <= scheduler.cache.blocks
    assert len(scheduler.prefixes._unused) <= scheduler.cache.blocks
    assert_empty(scheduler)


# ---------------------------------------------------------------- leaving


@pytest.mark.parametrize("when", ["waiting", "prefill", "answering"])
def test_cancelling_gives_blocks_back_at_once(when, alone):
    model = tiny.pair("next").ours
    scheduler = make(model, chunk_rows=100)
    other, sequence = sequence_of(model, REQUESTS[1]), sequence_of(model, REQUESTS[3])
    run(scheduler, sequence_of(model, REQUESTS[5]))
    scheduler.add(other)
    scheduler.add(sequence)
    while when != "waiting" and (sequence.table is None or (when == "answering" and len(sequence.token_ids) < 2)):
        scheduler.step()
    assert (sequence in scheduler.waiting, sequence in scheduler.prefilling) == (when == "waiting", when == "prefill")
    scheduler.cancel(sequence)
    mine = 0 if other.table is None else len(other.table.blocks)
    assert scheduler.stats.used_blocks == mine
    assert sequence.finish_reason == "cancelled"
    assert sequence.table is None
    run(scheduler)
    assert other.result() == alone("next")[1]
    scheduler.cancel(other)
    assert other.finish_reason == "length"
    assert_empty(scheduler)


@pytest.mark.parametrize("when", [0, 3])
@pytest.mark.parametrize("how", ["greedy", "draws"])
def test_logits_that_are_no_numbers_end_their_own_sequence(how, when, alone, monkeypatch):
    model = tiny.pair("next").ours
    scheduler = make(model, reuse=True, chunk_rows=1000)
    options = {"temperature": 1.0} if how == "draws" else {}
    sequences = [sequence_of(model, REQUESTS[0], **options), *(sequence_of(model, r) for r in REQUESTS[1:])]
    bad, choose = sequences[0], scheduling.choose

    def spoilt(logits, members):
        logits = logits.clone()
        if bad in members and len(bad.token_ids) == when:
            logits[members.index(bad), 7] = torch.nan
        return choose(logits, members)

    monkeypatch.setattr(scheduling, "choose", spoilt)
    run(scheduler, *sequences)
    assert bad.finish_reason == "error"
    assert len(bad.token_ids) == when
    with pytest.raises(GenerationError, match=f"not numbers at token {when + 1} of the answer"):
        bad.result()
    for sequence, expected in zip(sequences[1:], alone("next")[1:], strict=True):
        assert sequence.result() == expected
    assert_empty(scheduler)


def test_generate_and_stream_raise_what_went_wrong():
    model = tiny.pair("next").ours
    row = tiny.tokenizer().convert_tokens_to_ids("z")
    weight = model.decoder.embed_tokens.weight
    kept = weight[row].detach().clone()
    try:
        with torch.no_grad():
            weight[row] = torch.nan
        requests = [{"prompt": "a"}, {"prompt": "z", "id": "mine"}]
        with pytest.raises(GenerationError, match=r"^request mine: the model's logits are not numbers at token 1 "):
            model.generate(requests, **OPTIONS)
        with pytest.raises(GenerationError, match=r"^request 0: "):
            list(model.stream({"prompt": "z"}, **OPTIONS))
        chat = model.chat()
        with pytest.raises(GenerationError):
            chat.send("z", **OPTIONS)
    finally:
        with torch.no_grad():
            weight[row] = kept
    assert chat.messages == []
    assert chat.send("z", **OPTIONS) == model.chat().send("z", **OPTIONS)


def test_a_pass_that_fails_takes_only_its_cause_along(alone, monkeypatch):
    model = tiny.pair("next").ours
    forward = model.vision_tower.forward

    def failing(tiles, **how):
        if (tiles == 9).all((1, 2, 3)).any():
            raise ValueError("a tile of nines")
        return forward(tiles, **how)

    monkeypatch.setattr(model.vision_tower, "forward", failing)
    scheduler = make(model)
    bad = sequence_of(model, {"prompt": "<image>", "images": [PICTURES[0]]})
    bad.prompt.parts[-1].tiles[0][:] = 9
    sequences = [sequence_of(model, request) for request in REQUESTS]
    run(scheduler, *sequences[:3], bad, *sequences[3:])
    with pytest.raises(ValueError, match="a tile of nines"):
        bad.result()
    assert [sequence.result() for sequence in sequences] == alone("next")
    assert_empty(scheduler)


@pytest.mark.parametrize("at", [1, 2, 5])
def test_a_pass_that_fails_late_is_run_again_as_it_was(alone, monkeypatch, at):
    """The model has run; what its logits say cannot be read."""
    calls, choose = [], scheduling.choose

    def failing(logits, sequences):
        calls.append(len(sequences))
        if len(calls) == at:
            raise RuntimeError("a transfer failed")
        return choose(logits, sequences)

    monkeypatch.setattr(scheduling, "choose", failing)
    scheduler = make(tiny.pair("next").ours, chunk_rows=10_000)
    sequences = [sequence_of(scheduler.runner.model, request) for request in REQUESTS]
    run(scheduler, *sequences)
    assert calls[at - 1] == len(sequences)
    assert [sequence.result() for sequence in sequences] == alone("next")
    assert_empty(scheduler)


def test_an_error_of_the_device_fails_all(monkeypatch):
    calls = []

    def failing(logits, sequences):
        calls.append(len(sequences))
        raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(scheduling, "choose", failing)
    scheduler = make(tiny.pair("next").ours, max_running=2)
    sequences = [sequence_of(scheduler.runner.model, request) for request in REQUESTS]
    run(scheduler, *sequences)
    assert len(calls) == 1
    assert all(isinstance(sequence.error, torch.AcceleratorError) for sequence in sequences)
    assert_empty(scheduler)


# ---------------------------------------------------------------- logits processors


def test_processors_change_their_own_sequence_and_may_fail(alone):
    model = tiny.pair("next").ours
    seen = []

    def only_even(logits, token_ids):
        seen.append(list(token_ids))
        return logits.masked_fill(torch.arange(len(logits)) % 2 == 1, -torch.inf)

    def failing(logits, token_ids):
        raise KeyError("no rule for this")

    sequences = [sequence_of(model, REQUESTS[1], [only_even]), sequence_of(model, REQUESTS[1], [failing])]
    plain = sequence_of(model, REQUESTS[1])
    run(make(model), *sequences, plain)
    tokens = sequences[0].result().token_ids
    assert all(token % 2 == 0 for token in tokens)
    assert seen == [tokens[:n] for n in range(len(tokens))]
    assert sequences[1].finish_reason == "error"
    assert isinstance(sequences[1].error, KeyError)
    assert plain.result() == alone("next")[1]
    assert any(token % 2 for token in plain.token_ids)


# ---------------------------------------------------------------- prefixes


def test_cached_images_are_not_encoded_again(monkeypatch, alone):
    model = tiny.pair("next").ours
    scheduler, calls = make(model, reuse=True), encoded(model, monkeypatch)
    first, longer = (sequence_of(model, REQUESTS[number]) for number in (0, 2))
    run(scheduler, first)
    assert len(calls) == 1
    run(scheduler, longer)
    assert len(calls) == 1
    assert longer.cached_rows >= first.prompt.rows - 1
    assert longer.result() == alone("next")[2]
    other = sequence_of(model, {"prompt": "<image>hello there, and more", "images": PICTURES[1:2]})
    run(scheduler, other)
    assert len(calls) == 2, "another picture is another row, after the BOS"
    assert other.cached_rows == 1, "another picture is another row, after the BOS"


@pytest.mark.parametrize("same", range(1, 40, 3))
def test_reuse_is_exact_to_the_row(same):
    model = tiny.pair("next").ours
    text = "abcdefghijklmnopqrstuvwxyz0123456789ABCDEFG"
    first = sequence_of(model, {"prompt": text})
    assert first.prompt.rows == len(text) + 1
    other = {"prompt": text[:same] + "-" + text[same + 1 :]}
    scheduler, second = make(model, reuse=True), sequence_of(model, other)
    run(scheduler, first)
    run(scheduler, second)
    assert second.cached_rows == 1 + same
    assert second.result() == model.generate([other], **OPTIONS)[0]
    again = sequence_of(model, {"prompt": text})
    run(scheduler, again)
    assert again.cached_rows == first.prompt.rows - 1
    assert again.result() == first.result()


def test_an_answer_is_reused_as_a_prompt():
    """As by a chat, to the last row that was run: that of the last token but one."""
    model = tiny.pair("next").ours
    scheduler, first = make(model, reuse=True), sequence_of(model, REQUESTS[1])
    run(scheduler, first)
    blocks, rows = scheduler.prefixes.find([*first.prompt.keys, *first.token_ids, 3])
    assert rows == first.prompt.rows + len(first.token_ids) - 1
    assert len(blocks) == scheduler.cache.blocks_for(rows)


def test_identical_prompts_at_once_run_their_rows_once(monkeypatch, alone):
    model = tiny.pair("next").ours
    calls = encoded(model, monkeypatch)
    scheduler = make(model, reuse=True, chunk_rows=32)
    sequences = [sequence_of(model, REQUESTS[0]) for _ in range(4)]
    run(scheduler, *sequences)
    assert len(calls) == 1
    assert [sequence.result() for sequence in sequences] == [alone("next")[0]] * 4
    assert sum(sequence.cached_rows > sequence.prompt.rows // 2 for sequence in sequences) == 3
    assert_empty(scheduler)


def test_kept_blocks_are_given_back_the_oldest_first():
    model = tiny.pair("next").ours
    scheduler = make(model, blocks=12, reuse=True)
    requests = [{"prompt": f"{letter} begins a text of a few blocks, some fifty rows"} for letter in "abcde"]
    for request in requests:
        run(scheduler, sequence_of(model, request, max_new_tokens=1))
    again = [sequence_of(model, request, max_new_tokens=1) for request in reversed(requests)]
    run(scheduler, again[0])
    run(scheduler, again[-1])
    rows = again[0].prompt.rows
    assert again[0].cached_rows == rows - 1
    assert again[-1].cached_rows < rows - 1
    assert_empty(scheduler)


def test_a_full_context_is_where_an_answer_ends():
    model = tiny.pair("next_dynamic_rope").ours
    context = model.config.decoder.context_length
    sequence = sequence_of(model, {"prompt": "x" * (context - 8)}, max_new_tokens=100)
    scheduler = make(model, chunk_rows=16)
    run(scheduler, sequence)
    assert sequence.prompt.rows + len(sequence.token_ids) == context
    assert sequence.finish_reason == "length"
    assert_empty(scheduler)


def test_rows_that_a_preempted_answer_finds_again_are_its_own():
    """`cached_rows` then counts them; `reused_rows` and the statistics do not."""
    model = tiny.pair("next").ours
    options = {"max_new_tokens": 90, "ignore_eos": True}
    requests = [{"prompt": "one " * 9}, {"prompt": "two " * 9}]
    scheduler = make(model, blocks=14, reuse=True)
    sequences = [sequence_of(model, request, **options) for request in requests]
    run(scheduler, *sequences)
    assert scheduler.stats.preemptions >= 1
    again = max(sequences, key=lambda sequence: sequence.admission)
    assert again.cached_rows > again.prompt.rows
    shared = 1  # the BOS
    assert again.reused_rows <= shared
    assert scheduler.stats.reused_rows == sum(sequence.reused_rows for sequence in sequences) <= shared
