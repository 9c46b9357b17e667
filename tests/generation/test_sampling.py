"""Sampling against transformers' logits processors, draws that follow the probabilities, and seeds."""

import itertools
import json
import re

import pytest
import torch
from transformers.generation import logits_process as theirs

from llava_fast.errors import RequestError
from llava_fast.generation.grammar import Grammar
from llava_fast.generation.sampling import AnswerPenalty, Sampler, Sampling, filtered_probabilities, penalise
from tests.support import tiny
from tests.support.parity import assert_same_answer, forget_rope


def reference(logits, options: Sampling, seen=()):
    """transformers' probabilities, its processors in its own order."""
    scores, ids = logits[None], torch.tensor([list(seen)])
    if options.repetition_penalty != 1:
        scores = theirs.RepetitionPenaltyLogitsProcessor(options.repetition_penalty)(ids, scores.clone())
    scores = theirs.TemperatureLogitsWarper(options.temperature)(ids, scores)
    if options.top_k:
        scores = theirs.TopKLogitsWarper(options.top_k)(ids, scores)
    if options.top_p < 1:
        scores = theirs.TopPLogitsWarper(options.top_p)(ids, scores)
    if options.min_p:
        scores = theirs.MinPLogitsWarper(options.min_p)(ids, scores)
    return scores[0].softmax(-1)


GRID = list(itertools.product((0.2, 1.0, 3.0), (1.0, 0.9, 0.5, 1e-6), (0, 1, 3, 50, 1000), (1.0, 1.3, 0.7)))


@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
def test_probabilities_are_transformers(spread):
    for number, (temperature, top_p, top_k, penalty) in enumerate(GRID):
        generator = torch.Generator().manual_seed(number)
        logits = torch.randn(200, generator=generator) * spread
        seen = torch.randint(0, 200, (40,), generator=generator).tolist()
        options = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, repetition_penalty=penalty)
        expected = reference(logits, options, seen)
        ours = filtered_probabilities(penalise(logits, set(seen), penalty) if penalty != 1 else logits, options)
        torch.testing.assert_close(ours, expected, rtol=2e-5, atol=1e-7)
        assert ((ours > 0) == (expected > 0)).all(), options


def test_ties_at_the_edge_are_kept_or_dropped_as_in_transformers():
    logits = torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0, -5.0])
    for top_k in (1, 2, 3):
        options = Sampling(temperature=1.0, top_k=top_k)
        assert torch.equal(filtered_probabilities(logits, options) > 0, reference(logits, options) > 0)


def test_draws_follow_the_probabilities():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 2.5, -20.0])
    options = Sampling(temperature=0.8, top_p=0.97)
    expected = filtered_probabilities(logits, options)
    sampler = Sampler(options, 0, [])
    counts = torch.bincount(torch.tensor([sampler(logits) for _ in range(4000)]), minlength=6)
    assert (counts[expected == 0] == 0).all()
    sigma = (4000 * expected * (1 - expected)).sqrt().clamp_min(1)
    assert ((counts - 4000 * expected).abs() < 4 * sigma).all()


def test_the_smallest_temperature_is_greedy_and_overflows_nowhere():
    logits = torch.randn(100) * 20
    for temperature in (1e-6, 1e-30):
        assert Sampler(Sampling(temperature=temperature), 1, [])(logits) == logits.argmax()


def test_a_penalty_also_counts_what_was_just_drawn():
    sampler = Sampler(Sampling(repetition_penalty=10.0), None, [3, -200, 999])
    logits = torch.tensor([3.0, 2.0, 1.0, 5.0])
    assert [sampler(logits) for _ in range(3)] == [0, 1, 2]


@pytest.mark.parametrize("name", ["next", "llava15", "onevision"])
@pytest.mark.parametrize("penalty", [1.4, 0.8])
def test_penalised_greedy_answers_are_transformers(name, penalty):
    """transformers counts the whole prompt, the image's placeholders too."""
    pair = tiny.pair(name)
    requests = [{"prompt": "hello <image> the end", "images": [tiny.picture(60, 90)]}, {"prompt": "a text, the same"}]
    answers = pair.ours.generate(requests, max_new_tokens=24, repetition_penalty=penalty, ignore_eos=True)
    for request, answer in zip(requests, answers, strict=True):
        inputs = pair.reference_inputs(**request)
        forget_rope(pair.hf)
        out = pair.hf.generate(
            **inputs,
            max_new_tokens=24,
            do_sample=False,
            repetition_penalty=penalty,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
        expected = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        assert_same_answer(answer.token_ids, expected, torch.stack(out.scores)[:, 0])


def test_image_placeholders_count_as_seen(monkeypatch):
    """The placeholder's own logit is penalised like any other token's of the prompt."""
    model, seen = tiny.pair("next").ours, []
    monkeypatch.setattr(Sampler, "__call__", lambda self, logits: seen.append(set(self.processors[0].seen)) or 50)
    requests = [{"prompt": "<image>a", "images": [tiny.picture(30, 30)]}, {"prompt": "a"}]
    model.generate(requests, max_new_tokens=1, repetition_penalty=1.1)
    assert [tiny.IMAGE_ID in ids for ids in seen] == [True, False]


# ---------------------------------------------------------------- seeds

REQUESTS = [
    {"prompt": "hello"},
    {"prompt": "<image> the", "images": [tiny.picture(60, 90)]},
    {"prompt": "a longer one"},
]
OPTIONS = {"max_new_tokens": 12, "temperature": 1.3, "top_p": 0.98, "ignore_eos": True}


def tokens(answers):
    return [answer.token_ids for answer in answers]


def test_a_requests_own_seed_gives_its_draws_anywhere():
    model = tiny.pair("next").ours
    seeded = [{**request, "seed": 40 + number} for number, request in enumerate(REQUESTS)]
    together = tokens(model.generate(seeded, **OPTIONS, seed=1))
    assert together == [tokens(model.generate([request], **OPTIONS, seed=2))[0] for request in seeded]
    assert together[::-1] == tokens(model.generate(seeded[::-1], **OPTIONS))
    assert together[1] == tokens(model.generate([REQUESTS[2]] * 5 + [seeded[1]], **OPTIONS))[5]
    assert together != tokens(model.generate([{**request, "seed": 7} for request in REQUESTS], **OPTIONS))


def test_one_seed_for_all_is_repeatable_and_differs_between_requests():
    model = tiny.pair("next").ours
    same = [REQUESTS[0]] * 3
    first = tokens(model.generate(same, **OPTIONS, seed=5))
    assert first == tokens(model.generate(same, **OPTIONS, seed=5))
    assert len(set(map(tuple, first))) == 3
    assert first[2] == tokens(model.generate([{**REQUESTS[0], "seed": 7}], **OPTIONS))[0]
    unseeded = [tuple(tokens(model.generate([REQUESTS[0]], **OPTIONS))[0]) for _ in range(2)]
    assert unseeded[0] != unseeded[1]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": "hot"},
        {"top_p": 0},
        {"top_p": 1.5},
        {"top_p": None},
        {"top_k": -1},
        {"top_k": 2.5},
        {"repetition_penalty": 0},
        {"repetition_penalty": float("nan")},
        {"max_new_tokens": -1},
        {"max_new_tokens": 1.5},
        {"max_new_tokens": "9"},
        {"stop": 5},
        {"stop": ["a", 5]},
        {"stop": ""},
        {"stop": ["a", ""]},
        {"seed": "x"},
        {"seed": 0.5},
        {"seed": 2**63},
    ],
)
def test_every_option_is_checked(options):
    with pytest.raises(RequestError, match=f"^{next(iter(options))} must be"):
        Sampling(**options)


@pytest.mark.parametrize("min_p", [0.01, 0.1, 0.5, 1.0])
def test_min_p_is_transformers(min_p):
    for number, (temperature, top_p, top_k) in enumerate(itertools.product((0.3, 1.0, 2.0), (1.0, 0.8), (0, 5))):
        logits = torch.randn(200, generator=torch.Generator().manual_seed(number)) * 3
        options = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
        ours, expected = filtered_probabilities(logits, options), reference(logits, options)
        torch.testing.assert_close(ours, expected, rtol=2e-5, atol=1e-7)
        assert ((ours > 0) == (expected > 0)).all(), options


def test_presence_and_frequency_count_the_answer_alone():
    changed = AnswerPenalty(0.5, 0.25)(torch.zeros(5), [1, 1, 3])
    assert changed.tolist() == [0.0, -1.0, 0.0, -0.75, 0.0]
    sampler = Sampler(Sampling(presence_penalty=1.5), None, seen=[2])
    logits = torch.tensor([0.0, 1.0, 2.0])
    assert [sampler(logits) for _ in range(4)] == [2, 1, 2, 2]  # the prompt's 2 costs nothing, the answer's does once


def test_a_bias_forces_and_forbids():
    sampler = Sampler(Sampling(logit_bias={2: -100, 0: 100}), None, [])
    assert sampler(torch.tensor([0.0, 1.0, 50.0])) == 0
    with pytest.raises(RequestError, match="names the token 7"):
        Sampler(Sampling(logit_bias={7: 1}), None, [])(torch.zeros(3))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_log_probabilities_are_the_models_own(temperature):
    options = Sampling(logprobs=2, logit_bias={3: 100}, temperature=temperature, seed=0)
    sampler = Sampler(options, 0, [])
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    assert sampler(logits) == 3
    (found,) = sampler.logprobs
    every = logits.log_softmax(0)
    assert found.token_id == 3
    assert found.logprob == pytest.approx(every[3].item())
    assert [token for token, _ in found.top] == [2, 1]
    assert [p for _, p in found.top] == pytest.approx(every[[2, 1]].tolist())


def test_generate_returns_log_probabilities_and_the_same_answer():
    model = tiny.pair("next").ours
    request = {"prompt": "<image>hello", "images": [tiny.picture(60, 90)]}
    (plain,) = model.generate(request, max_new_tokens=6)
    (told,) = model.generate(request, max_new_tokens=6, logprobs=3)
    assert told.token_ids == plain.token_ids
    assert plain.logprobs is None
    assert [one.token_id for one in told.logprobs] == told.token_ids
    assert all(one.top[0] == (one.token_id, one.logprob) for one in told.logprobs)


SCHEMA = {
    "type": "object",
    "properties": {"digit": {"type": "integer", "minimum": 0, "maximum": 9}, "sure": {"type": "boolean"}},
    "required": ["digit", "sure"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_takes_its_grammars_form(temperature):
    model = tiny.pair("next").ours
    requests = [{"prompt": "hello", "seed": seed} for seed in range(3)]
    options = {"max_new_tokens": 200, "temperature": temperature}
    for answer in model.generate(requests, grammar=Grammar.regex("[a-c]{2}x[0-9]{3}"), **options):
        assert re.fullmatch("[a-c]{2}x[0-9]{3}", answer.text)
        assert answer.finish_reason == "stop"
    for answer in model.generate(requests, grammar=Grammar.json_schema(SCHEMA), logit_bias={9 + 2: -50}, **options):
        if answer.finish_reason == "stop":  # white space may go on for ever
            assert set(json.loads(answer.text)) == {"digit", "sure"}
        assert answer.text.startswith("{")


@pytest.mark.parametrize(
    ("grammar", "says"),
    [
        (Grammar.regex("(a"), "regular expression cannot be used"),
        (Grammar.json_schema({"type": "no type"}), "JSON schema cannot be used"),
        (Grammar("json_schema", "{"), "JSON schema cannot be used"),
    ],
)
def test_a_grammar_that_cannot_be_used_is_refused(grammar, says):
    with pytest.raises(RequestError, match=says):
        tiny.pair("next").ours.generate({"prompt": "hello"}, grammar=grammar)


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_p": 2},
        {"presence_penalty": float("nan")},
        {"frequency_penalty": "1"},
        {"logit_bias": {"a": 1}},
        {"logit_bias": {1: float("inf")}},
        {"logprobs": -1},
        {"grammar": "[a-z]"},
        {"grammar": Grammar.json(), "ignore_eos": True},
    ],
)
def test_new_options_out_of_range_are_refused(wrong):
    with pytest.raises(RequestError, match=next(iter(wrong))):
        Sampling(**wrong)
