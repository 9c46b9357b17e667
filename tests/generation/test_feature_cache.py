"""Image features that are kept: the same answers, each image encoded once, within a bound of bytes."""

import torch

from llava_fast.generation.feature_cache import FeatureCache
from llava_fast.generation.runner import Runner
from llava_fast.generation.scheduler import Scheduler
from tests.generation.test_scheduler import OPTIONS, PICTURES, encoded, run, sequence_of
from tests.support import tiny

REQUESTS = [
    {"prompt": "<image>hello", "images": PICTURES[:1]},
    {"prompt": "another beginning <image> and <image>", "images": [PICTURES[0], PICTURES[0]]},
    {"prompt": "a <image> b <image>", "images": PICTURES[1:]},
    {"prompt": "b <image> a <image>", "images": PICTURES[:0:-1]},
]


def test_an_image_is_encoded_once_and_answers_stay(monkeypatch):
    model = tiny.pair("next").ours
    alone = [model.generate(request, **OPTIONS)[0] for request in REQUESTS]
    calls = encoded(model, monkeypatch)
    features = FeatureCache(1 << 30)
    for chunk_rows in (4096, 13):
        scheduler = Scheduler(Runner(model, features=features), chunk_rows=chunk_rows)
        sequences = [sequence_of(model, request) for request in REQUESTS]
        run(scheduler, *sequences)
        assert [sequence.result() for sequence in sequences] == alone
        run(scheduler, *[sequence_of(model, request) for request in REQUESTS])
    # PICTURES[1] and [2] come as one of two images and PICTURES[0] both ways, which the family may tile alike.
    assert len(calls) <= 2
    assert features.hits


def test_bytes_are_bounded_and_the_oldest_goes():
    features = FeatureCache(max_bytes=2 * 10 * 4)
    for key in range(3):
        features.put(key, torch.full((2, 5), float(key)))
        features.get(0)
    assert features.bytes == 80
    assert features.get(1) is None
    assert features.get(0)[0, 0] == 0
    assert features.get(2)[0, 0] == 2
    features.put(9, torch.zeros(100))
    assert features.get(9) is None
    assert features.bytes == 80


def test_what_is_kept_is_a_copy():
    features, rows = FeatureCache(1 << 20), torch.zeros(4, 2)
    features.put(1, rows[:2])
    rows += 1
    assert features.get(1).sum() == 0
