"""Tiles one after the other: where, and with the same result."""

import torch

from llava_fast.models.blocks import by_tile as module
from llava_fast.models.blocks.by_tile import by_tile


def test_large_tiles_one_after_the_other(monkeypatch):
    linear = torch.nn.Linear(8, 4)
    seen = []

    def run(x):
        seen.append(len(x))
        return linear(x)

    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        together = by_tile(run, x)
        monkeypatch.setattr(module, "LEAST", 40)
        torch.testing.assert_close(by_tile(run, x), together, rtol=1e-5, atol=1e-6)
        assert by_tile(run, x[:0]).shape == (0, 5, 4)
        assert by_tile(run, x[:1]).shape == (1, 5, 4)
    by_tile(run, x)
    assert seen == [3, 1, 1, 1, 0, 1, 3]
