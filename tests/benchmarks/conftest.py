"""Benchmarks are no part of the package, so the checkout's root goes on the path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
