"""What the type checker is told of a transformers LLaVA."""

from __future__ import annotations

from typing import Any, TypeAlias

StockModel: TypeAlias = Any
"""A transformers LLaVA, whole or inner, or its tower: an nn.Module whose attributes depend on transformers' version."""
