"""Types of a transformers LLaVA for the type checker."""

from __future__ import annotations

from typing import Any, TypeAlias

StockModel: TypeAlias = Any
"""A transformers LLaVA (whole or inner) or its tower: an nn.Module whose attributes depend on transformers' version."""
