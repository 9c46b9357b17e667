"""What tests share: tiny models and checkpoints, made data, comparisons. `from tests.support import tiny`."""
