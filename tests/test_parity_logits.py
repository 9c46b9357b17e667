"""The same logits and the same greedy answers as transformers, for every variant, singly and in one batch."""

import functools

import numpy as np
import pytest
import torch

from tests.support import tiny
from tests.support.parity import all_logits, assert_close, assert_same_answer, reference_greedy, reference_logits

EXTREMES = [(1, 1), (1, 400), (400, 1), (3, 700), (700, 2), (56, 56), (57, 56), (112, 112), (8, 8)]
RANDOM = [tuple(int(side) for side in size) for size in np.random.default_rng(5).integers(2, 300, (47, 2))]
SIZES = EXTREMES + RANDOM  # 56 sizes, 4 for each of 14 cases; later ones share theirs


@functools.lru_cache
def requests_of(name: str) -> list[dict]:
    """Four single images, then several images, text alone, and videos where the kind has them."""
    place = list(tiny.CASES).index(name)
    sizes = SIZES[place % 14 :: 14]
    requests = [{"prompt": f"hello <image> {h}x{w}:", "images": [tiny.picture(h, w)]} for h, w in sizes]
    requests.append({"prompt": "a <image><image>\nthe b", "images": [tiny.picture(*size) for size in sizes[:2]]})
    requests.append({"prompt": "Only text, and of another length than the rest of them. " * (3 if place % 2 else 9)})
    if tiny.CASES[name].kind in tiny.WITH_VIDEOS:
        frames = np.stack([tiny.picture(*sizes[3], seed) for seed in range(3)])
        requests.append({"prompt": "<video> what is it?", "video": frames})
        requests.append({"prompt": "<image> or <video>", "video": frames[:2], "images": [tiny.picture(*sizes[0])]})
    return requests


@functools.lru_cache
def reference(name: str) -> list[torch.Tensor]:
    pair = tiny.pair(name)
    return [reference_logits(pair.hf, pair.reference_inputs(**request)) for request in requests_of(name)]


def test_enough_sizes():
    used = {image.shape[:2] for name in tiny.CASES for r in requests_of(name) for image in r.get("images", [])}
    assert used == set(SIZES)
    assert len(used) >= 40


@pytest.mark.parametrize("name", tiny.CASES)
def test_logits_of_each_request_alone(name):
    model = tiny.pair(name).ours
    for request, expected in zip(requests_of(name), reference(name), strict=True):
        with torch.no_grad():
            batch = model.prepare([request])
            assert_close("logits", all_logits(model, batch)[0], expected)
            assert_close("logits", model(batch).logits, expected[-1:])


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("name", tiny.CASES)
def test_logits_of_all_requests_in_one_batch(name, layout):
    model, expected = tiny.pair(name).ours, reference(name)
    with torch.no_grad():
        batch = model.prepare(requests_of(name), layout=layout)
        pieces = all_logits(model, batch)
        last = model(batch).logits
    if layout == "padded":
        assert model(batch, logits="all").logits.shape[:2] == (len(expected), max(batch.plan.lengths))
    for piece, logits in zip(pieces, expected, strict=True):
        assert_close(f"logits, {layout} batch", piece, logits)
    assert_close(f"logits, {layout} batch", last, torch.stack([e[-1] for e in expected]))


@pytest.mark.parametrize("name", tiny.CASES)
def test_greedy_answers_alone_and_in_one_batch(name):
    pair, requests = tiny.pair(name), requests_of(name)
    together = pair.ours.generate(requests, max_new_tokens=32, ignore_eos=True)
    for number, (request, answer) in enumerate(zip(requests, together, strict=True)):
        inputs = pair.reference_inputs(**request)
        expected, logits = reference_greedy(pair.hf, inputs)
        assert len(set(expected)) >= 8, "the test's weights repeat themselves"
        assert_same_answer(answer.token_ids, expected, logits)
        assert answer.finish_reason == "length"
        assert answer.usage.prompt_tokens == inputs["input_ids"].shape[1]
        assert answer.usage.visual_tokens == pair.visual_count(inputs["input_ids"], request["prompt"])
        assert answer.usage.completion_tokens == 32
        if number % 3 == 0:
            alone = pair.ours.generate([request], max_new_tokens=32, ignore_eos=True)[0]
            assert_same_answer(alone.token_ids, expected, logits)
