"""Generation on tiny models: a batch gives what each request gives alone, options do what they say, chat reuses."""

from __future__ import annotations

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as theirs

from llava_fast.errors import GenerationError, ImageError, RequestError
from llava_fast.generation import llava
from llava_fast.generation.sampling import Sampling, filtered_probabilities, penalise
from tests.support import tiny

SIZES = [(60, 90), (112, 112), (30, 200), (200, 31)]


@pytest.fixture(scope="module", params=["next", "next_mistral_window", "next_qwen"])
def model(request):
    return tiny.pair(request.param).ours


def requests() -> list[dict]:
    mixed = [{"prompt": "<image>hello there", "images": [tiny.picture(h, w)]} for h, w in SIZES]
    mixed.insert(1, {"prompt": "hello, and no picture at all"})
    mixed.append({"prompt": "a <image> b <image> c", "images": [tiny.picture(40, 40), tiny.picture(50, 99)]})
    return mixed


def test_a_batch_gives_what_each_gives_alone(model):
    together = model.generate(requests(), max_new_tokens=12, ignore_eos=True)
    for request, answer in zip(requests(), together, strict=True):
        alone = model.generate([request], max_new_tokens=12, ignore_eos=True)[0]
        assert alone == answer
    assert len({len(set(answer.token_ids)) for answer in together} - {1}) > 0


def test_sequences_that_end_early_leave_the_others_as_they_were(model):
    full = model.generate(requests(), max_new_tokens=16, ignore_eos=True)
    stops = tuple({answer.text[3:5] for answer in full[:3] if len(answer.text) > 8} - {""})
    cut = model.generate(requests(), max_new_tokens=16, ignore_eos=True, stop=stops)
    assert stops
    assert len({len(answer.token_ids) for answer in cut}) > 1
    for before, after in zip(full, cut, strict=True):
        assert before.token_ids[: len(after.token_ids)] == after.token_ids
        assert before.text.startswith(after.text)
        assert not any(stop in after.text for stop in stops)


def test_a_draw_does_not_depend_on_the_place_in_the_batch(model):
    seeded = [{**request, "seed": 100 + number} for number, request in enumerate(requests())]
    options = {"max_new_tokens": 10, "temperature": 1.5, "top_k": 40, "top_p": 0.95, "ignore_eos": True}
    forward = model.generate(seeded, **options)
    backward = model.generate(seeded[::-1], **options)[::-1]
    assert [a.token_ids for a in forward] == [a.token_ids for a in backward]
    other = model.generate([{**request, "seed": 7} for request in requests()], **options)
    assert [a.token_ids for a in other] != [a.token_ids for a in forward]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}, {"stop": ["h", "e"]}])
def test_streamed_pieces_are_the_text(model, options):
    request = requests()[0]
    pieces = list(model.stream(request, max_new_tokens=40, **options))
    assert "".join(pieces) == model.generate([request], max_new_tokens=40, **options)[0].text


def test_limits(model):
    nothing, one = (model.generate([requests()[0]], max_new_tokens=n, ignore_eos=True)[0] for n in (0, 1))
    assert nothing.token_ids == []
    assert nothing.finish_reason == "length"
    assert len(one.token_ids) == 1
    assert one.usage.completion_tokens == 1
    assert model.generate([]) == []


@pytest.mark.parametrize(
    "option", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}, {"repetition_penalty": 0}]
)
def test_options_out_of_range_are_refused(model, option):
    with pytest.raises(RequestError, match=next(iter(option))):
        model.generate([requests()[1]], **option)


@pytest.mark.parametrize(
    ("top_k", "top_p", "temperature"), [(0, 1.0, 0.7), (5, 1.0, 1.0), (0, 0.8, 1.3), (20, 0.6, 0.5)]
)
def test_filters_are_transformers(top_k, top_p, temperature):
    logits = torch.randn(20, 300, generator=torch.Generator().manual_seed(0)) * 3
    expected = theirs.TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        expected = theirs.TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = theirs.TopPLogitsWarper(top_p)(None, expected)
    options = Sampling(temperature=temperature, top_p=top_p, top_k=top_k)
    ours = torch.stack([filtered_probabilities(row, options) for row in logits])
    torch.testing.assert_close(ours, expected.softmax(-1), rtol=1e-5, atol=1e-8)


def test_repetition_penalty_is_transformers():
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(1))
    seen = torch.tensor([[3, 5, 5, 299]])
    expected = theirs.RepetitionPenaltyLogitsProcessor(1.3)(seen, logits.clone())[0]
    assert torch.equal(penalise(logits[0], set(seen[0].tolist()), 1.3), expected)


def test_chat_answers_as_a_fresh_request_would_and_encodes_an_image_once(model, monkeypatch):
    tower, calls = model.vision_tower, []
    forward = type(tower).forward
    monkeypatch.setattr(type(tower), "forward", lambda *args, **how: calls.append(args) or forward(*args, **how))
    chat, picture = model.chat(), tiny.picture(60, 90)
    chat.send("what is this?", images=[picture, picture], max_new_tokens=6)
    chat.send("and this?", images=[tiny.picture(30, 200)], max_new_tokens=6)
    third = chat.send("why?", max_new_tokens=6)
    assert len(calls) == 2
    history = {"messages": chat.messages[:-1], "images": [picture, picture, tiny.picture(30, 200)]}
    assert model.generate([history], max_new_tokens=6)[0] == third


def test_a_failed_turn_leaves_the_conversation_as_it_was(model):
    chat = model.chat()
    chat.send("hello", max_new_tokens=4)
    before = list(chat.messages)
    with pytest.raises(ImageError):
        chat.send("look", images=[b"not an image"])
    with pytest.raises(RequestError):
        chat.send("x" * 10_000)
    assert chat.messages == before
    again = model.chat()
    again.send("hello", max_new_tokens=4)
    assert chat.send("more", max_new_tokens=4) == again.send("more", max_new_tokens=4)
    chat.reset()
    assert chat.messages == []


def test_a_hook_on_the_embedding_is_obeyed_by_prompt_and_answer_alike(model):
    request = requests()[1]
    plain = model(model.prepare([request])).logits
    handle = model.decoder.embed_tokens.register_forward_hook(lambda module, args, out: out * 2)
    try:
        hooked = model(model.prepare([request])).logits
    finally:
        handle.remove()
    assert not torch.allclose(plain, hooked)
    assert np.allclose(plain.detach(), model(model.prepare([request])).logits.detach())


def test_calls_share_the_memory_of_a_cache():
    """The next call takes the last one's memory, also after an error or a stream that was left; answers stay."""
    model = copy.deepcopy(tiny.pair("next").ours)
    requests = [{"prompt": "<image>hello", "images": [tiny.picture(60, 90)]}, {"prompt": "hello"}]
    first = model.generate(requests, max_new_tokens=6)
    cache = llava._idle[model].cache
    segments = list(cache.segments)
    assert segments
    assert not cache.used_blocks
    assert [each.token_ids for each in model.generate(requests, max_new_tokens=6)] == [e.token_ids for e in first]
    stream = model.stream(requests[1], max_new_tokens=6, ignore_eos=True)
    next(stream)
    assert model not in llava._idle
    assert model.generate(requests[1:], max_new_tokens=6)[0].token_ids == first[1].token_ids  # beside it: its own
    stream.close()
    assert llava._idle[model][0] is cache
    assert not cache.used_blocks
    with torch.no_grad():
        model.decoder.norm.weight.fill_(torch.nan)
    with pytest.raises(GenerationError):
        model.generate(requests[1:], max_new_tokens=6)
    with torch.no_grad():
        model.decoder.norm.weight.copy_(tiny.pair("next").ours.decoder.norm.weight)
    assert [each.token_ids for each in model.generate(requests, max_new_tokens=6)] == [e.token_ids for e in first]
    assert [each is mine for each, mine in zip(llava._idle[model][0].segments, segments, strict=True)]
    assert model.double().generate(requests[1:], max_new_tokens=6)[0].token_ids == first[1].token_ids
    assert llava._idle[model][0] is not cache


def test_a_large_cache_is_given_back(monkeypatch):
    monkeypatch.setitem(llava.KEPT_BYTES, "cpu", 1)
    model = copy.deepcopy(tiny.pair("next").ours)
    before = model.generate([{"prompt": "hello"}], max_new_tokens=6)[0].token_ids
    cache = llava._idle[model].cache
    held = cache.segments[0]
    assert model.generate([{"prompt": "hello"}], max_new_tokens=6)[0].token_ids == before
    assert llava._idle[model][0] is cache
    assert cache.segments[0] is not held


def test_a_model_that_goes_takes_its_cache_along():
    model = copy.deepcopy(tiny.pair("next").ours)
    model.generate([{"prompt": "hello"}], max_new_tokens=2)
    cache = weakref.ref(llava._idle[model][0])
    del model
    gc.collect()
    assert cache() is None
