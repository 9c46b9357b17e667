"""Generation at its edges: ends, stops, limits, slots that change hands, streams, full contexts."""

import dataclasses

import pytest
import torch

from llava_fast.errors import RequestError
from llava_fast.generation.prompt import Prompt
from llava_fast.generation.runner import Runner
from llava_fast.generation.sampling import Sampler, Sampling
from llava_fast.generation.sequence import Sequence
from llava_fast.generation.text import TextDecoder
from tests.support import tiny
from tests.support.parity import assert_same_answer, forget_rope, reference_greedy

REQUESTS = [
    {"prompt": "<image>hello there", "images": [tiny.picture(60, 90)]},
    {"prompt": "no picture"},
    {"prompt": "a <image> b <image>", "images": [tiny.picture(40, 40), tiny.picture(5, 199)]},
    {"prompt": ""},
    {"prompt": "the end of the list, a little longer than the rest"},
]
NAMES = ["next", "next_mistral_window", "next_dynamic_rope", "onevision_window"]


def requests_for(name: str) -> list[dict]:
    return [r for r in REQUESTS if r["prompt"] or name != "onevision_window"]  # whose tokenizer adds no BOS


@pytest.fixture
def with_ends():
    """Give a model other end tokens for one test."""
    changed = []

    def change(pair, ends):
        changed.append((pair.ours, pair.ours.config))
        pair.ours.config = dataclasses.replace(pair.ours.config, eos_token_ids=tuple(ends))

    yield change
    for model, config in changed:
        model.config = config


@pytest.mark.parametrize("name", NAMES)
def test_sequences_that_end_at_different_times(name, with_ends):
    """End tokens met early by some: slots change hands, and each answer is what transformers gives alone."""
    pair, requests = tiny.pair(name), requests_for(name)
    free = [a.token_ids for a in pair.ours.generate(requests, max_new_tokens=24, ignore_eos=True)]
    ends = {free[0][20], free[1][3], free[2][9]}
    with_ends(pair, ends)
    answers = pair.ours.generate(requests, max_new_tokens=24)
    lengths = [len(answer.token_ids) for answer in answers]
    assert len(set(lengths)) >= 3, "the test's ends do not differ"
    for request, answer in zip(requests, answers, strict=True):
        forget_rope(pair.hf)
        inputs = pair.reference_inputs(**request)
        out = pair.hf.generate(**inputs, max_new_tokens=24, do_sample=False, eos_token_id=sorted(ends), pad_token_id=0)
        assert answer.token_ids == out[0, inputs["input_ids"].shape[1] :].tolist()
        assert answer.finish_reason == ("stop" if answer.token_ids[-1] in ends else "length")
        assert answer == pair.ours.generate([request], max_new_tokens=24)[0]
        words = answer.token_ids[:-1] if answer.finish_reason == "stop" else answer.token_ids
        assert answer.text == pair.ours.tokenizer.decode(words, skip_special_tokens=True)


@pytest.mark.parametrize("name", NAMES)
def test_prompts_of_one_token_each(name):
    """The first pass then looks like a decoding step."""
    pair = tiny.pair(name)
    prompts = ["", "", ""] if name != "onevision_window" else ["a", "b", "c"]
    answers = pair.ours.generate([{"prompt": prompt} for prompt in prompts], max_new_tokens=12, ignore_eos=True)
    for prompt, answer in zip(prompts, answers, strict=True):
        expected, logits = reference_greedy(pair.hf, pair.reference_inputs(prompt), 12)
        assert answer.usage.prompt_tokens == 1
        assert_same_answer(answer.token_ids, expected, logits)


def test_an_end_token_at_the_first_step(with_ends):
    pair = tiny.pair("next")
    first = pair.ours.generate(REQUESTS[:2], max_new_tokens=1, ignore_eos=True)[0].token_ids[0]
    with_ends(pair, {first})
    ended, other = pair.ours.generate(REQUESTS[:2], max_new_tokens=5)
    assert (ended.token_ids, ended.text, ended.finish_reason) == ([first], "", "stop")
    assert ended.usage.completion_tokens == 1
    assert len(other.token_ids) == 5
    kept = pair.ours.generate(REQUESTS[:1], max_new_tokens=5, ignore_eos=True)[0]
    assert len(kept.token_ids) == 5
    assert kept.finish_reason == "length"


@pytest.mark.parametrize("budget", [0, 1, 2])
def test_small_budgets(budget):
    model = tiny.pair("next").ours
    for answer, full in zip(
        model.generate(REQUESTS, max_new_tokens=budget, ignore_eos=True),
        model.generate(REQUESTS, max_new_tokens=4, ignore_eos=True),
        strict=True,
    ):
        assert answer.token_ids == full.token_ids[:budget]
        assert answer.finish_reason == "length"
    assert len("".join(model.stream(REQUESTS[0], max_new_tokens=budget))) <= 4 * budget


# ---------------------------------------------------------------- stop strings


def test_stop_strings_across_and_inside_tokens():
    """Every substring of an answer as its stop: the text ends before it, at the first token that completes it."""
    model, request = tiny.pair("next").ours, REQUESTS[4]
    full = model.generate([request], max_new_tokens=32, ignore_eos=True)[0]
    text, words = full.text, model.tokenizer
    assert len(text) > 8
    for begin in range(0, len(text) - 3, 2):
        for length in (1, 2, 3):
            stop = text[begin : begin + length]
            if "\ufffd" in stop:
                continue
            answer = model.generate([request], max_new_tokens=32, ignore_eos=True, stop=stop)[0]
            assert answer.text == text[: text.find(stop)]
            assert answer.finish_reason == "stop"
            count = len(answer.token_ids)
            assert answer.token_ids == full.token_ids[:count]
            assert stop in words.decode(answer.token_ids, skip_special_tokens=True)
            assert stop not in words.decode(answer.token_ids[:-1], skip_special_tokens=True)
            pieces = list(model.stream(request, max_new_tokens=32, ignore_eos=True, stop=[stop]))
            assert "".join(pieces) == answer.text


def test_a_special_token_as_stop_string_stops():
    """It leaves no text, so it has to be met as a token; with `ignore_eos` an asked-for stop still holds."""
    model = tiny.pair("next").ours
    for ignore_eos in (False, True):
        script = model.tokenizer.convert_tokens_to_ids(["h", "e", "<|eot_id|>", "a", "<|im_end|>"])
        answer = scripted(model, script, stop="<|eot_id|>", ignore_eos=ignore_eos)
        assert answer.text == "he"
        assert answer.finish_reason == "stop"
        assert len(answer.token_ids) == 3


def test_an_ordinary_token_as_a_templates_stop_is_met_however_it_is_spelt():
    """llava_v0's "###" may come as one token or as "##" and "#"."""
    from llava_fast.inputs.chat.rendering import builtin_template

    model = tiny.pair("next").ours
    template = dataclasses.replace(
        builtin_template("vicuna_v1"), format=dataclasses.replace(builtin_template("vicuna_v1").format, stop=("###",))
    )
    processor = model.processor
    try:
        model.processor = dataclasses.replace(processor, template=template)
        for spelling in (["###"], ["##", "#"], ["#", "##"], ["#", "#", "#"]):
            script = model.tokenizer.convert_tokens_to_ids(["h", *spelling, "e"])
            answer = scripted(model, script)
            assert (answer.text, answer.finish_reason, len(answer.token_ids)) == ("h", "stop", 1 + len(spelling))
    finally:
        model.processor = processor


def scripted(model, script: list[int], **options):
    """What generate makes of a model that says exactly `script`."""
    upcoming = iter(script)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llava_fast.generation.scheduler.choose", lambda logits, running: [next(upcoming)])
        return model.generate([{"prompt": "a"}], max_new_tokens=len(script), **options)[0]


def test_text_is_what_the_tokenizer_makes_of_the_tokens():
    """Multi-byte characters, special tokens and ids that the tokenizer does not know."""
    model = tiny.pair("next").ours
    bytes_of = model.tokenizer("né → 日本 🙂", add_special_tokens=False)["input_ids"]
    script = [*bytes_of[:5], tiny.PAD_ID, *bytes_of[5:], tiny.VOCABULARY - 1, *bytes_of[:2]]
    answer = scripted(model, script, ignore_eos=True)
    assert answer.token_ids == script
    assert answer.text == model.tokenizer.decode(script, skip_special_tokens=True)
    assert "né → 日本 🙂" in answer.text


# ---------------------------------------------------------------- streams


def test_streams_can_be_interleaved_and_left():
    model = tiny.pair("next").ours
    options = {"max_new_tokens": 20, "ignore_eos": True}
    expected = [answer.text for answer in model.generate(REQUESTS[:2], **options)]
    streams = [model.stream(request, **options) for request in REQUESTS[:2]]
    texts = ["", ""]
    for _ in range(30):
        for number, stream in enumerate(streams):
            texts[number] += next(stream, "")
    assert texts == expected
    left = model.stream(REQUESTS[0], **options)
    next(left)
    left.close()
    assert model.generate(REQUESTS[:1], **options)[0].text == expected[0]


@pytest.mark.parametrize("stop", [None, "a stop string that never comes"])
def test_a_stream_gives_text_as_soon_as_it_is_certain(stop, monkeypatch):
    model, steps = tiny.pair("next").ours, []
    step = Runner.step
    monkeypatch.setattr(Runner, "step", lambda *given: steps.append(1) or step(*given))
    options = {"max_new_tokens": 24, "ignore_eos": True, "stop": stop}
    arrived = [(len(steps), piece) for piece in model.stream(REQUESTS[0], **options)]
    assert len(steps) == 23
    assert len(arrived) > 8
    assert arrived[0][0] < 12  # the first piece came while all other tokens were still to be made
    assert len({after for after, _ in arrived}) == len(arrived)  # each piece as its own step ended
    steps.clear()
    assert "".join(piece for _, piece in arrived) == model.generate(REQUESTS[:1], **options)[0].text


def test_a_stream_leaves_gradients_on_for_its_caller():
    model = tiny.pair("next").ours
    stream = model.stream(REQUESTS[0], max_new_tokens=6, ignore_eos=True)
    next(stream)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert list(stream) is not None
    assert not any(parameter.is_inference() for parameter in model.parameters())


def test_a_streams_error_is_the_requests():
    with pytest.raises(RequestError, match=r"^request 0: "):
        next(tiny.pair("next").ours.stream({"prompt": "<image>"}))


# ---------------------------------------------------------------- contexts


def test_an_answer_ends_where_the_context_does():
    model = tiny.pair("next_dynamic_rope").ours
    context = model.config.decoder.context_length
    assert context == 384
    prompt = "x" * (context - 10)  # and a BOS
    answer, other = model.generate([{"prompt": prompt}, {"prompt": "a"}], max_new_tokens=50, ignore_eos=True)
    assert len(answer.token_ids) == 9
    assert answer.finish_reason == "length"
    assert len(other.token_ids) == 50
    with pytest.raises(RequestError, match=r"^request 1 fills the context of 384 tokens"):
        model.generate([{"prompt": "a"}, {"prompt": "x" * (context - 1)}], max_new_tokens=1)
    assert model.generate([{"prompt": "x" * (context - 1)}], max_new_tokens=0)[0].token_ids == []


def test_a_huge_budget_costs_no_more_than_the_context():
    model = tiny.pair("next_dynamic_rope").ours
    answer = model.generate([{"prompt": "a"}], max_new_tokens=10**9, ignore_eos=True)[0]
    assert len(answer.token_ids) == 384 - 2


def test_the_sequence_object_counts_an_end_at_the_limit_as_an_end():
    words = tiny.tokenizer()
    sequence = Sequence(Prompt([]), Sampler(Sampling(), None, []), TextDecoder(words), frozenset({2}), 2)
    letter = words.convert_tokens_to_ids("h")
    assert sequence.push(letter) == "h"
    assert sequence.finish_reason is None
    assert sequence.push(2) == ""
    assert sequence.finish_reason == "stop"
    assert sequence.token_ids == [letter, 2]


def test_nothing_to_do():
    assert tiny.pair("next").ours.generate([]) == []


def test_one_request_may_be_given_bare():
    model = tiny.pair("next").ours
    assert model.generate(REQUESTS[0], max_new_tokens=3) == model.generate(REQUESTS[:1], max_new_tokens=3)
