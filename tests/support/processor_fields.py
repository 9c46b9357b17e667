"""Images of odd sizes, and the comparison of what two processors return."""

import torch

SIZES = [(1, 1), (1, 300), (300, 1), (48, 48), (56, 56), (97, 31), (31, 97), (200, 201), (333, 250), (640, 17)]


def assert_same(found, expected):
    assert list(found) == list(expected)
    for field in expected:
        assert found[field].dtype == expected[field].dtype, field
        assert torch.equal(found[field], expected[field]), field
