"""Shared by the tests: tiny models and checkpoints, generated data, comparisons. `from tests.support import tiny`."""
