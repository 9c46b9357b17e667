"""Rotary position tables. Kinds and formulas follow transformers' modeling_rope_utils.py; by_prompt is Qwen 1's.

Sources: Su et al. 2021 (RoPE); linear: Chen et al. 2023 (Position Interpolation); dynamic: the NTK-aware scaling
posted by u/emozilla (2023); llama3: Meta's llama-models; by_prompt: Bai et al. 2023 (Qwen), modeling_qwen.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llava_fast.models.blocks.attention import Spans

_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_NEEDED = {"default": (), "linear": ("factor",), "dynamic": ("factor",), "llama3": _LLAMA3}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: kind "default", "linear", "dynamic" or "llama3" (transformers' names and maths), or
    "by_prompt", whose base grows with the length of a prompt beyond the trained one; `factor` is then how often that
    fits into the longest context. It does not grow in training."""

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    @classmethod
    def from_hf(cls, text: Any) -> RopeConfig:
        """From a transformers text config (5.x: rope_parameters). Raises ValueError for another kind, or if a field
        that its kind needs is missing.
        """
        rope = text.rope_parameters
        kind = rope.get("rope_type", "default")
        if kind not in _NEEDED:
            raise ValueError(f"rope_type is {kind!r}; supported are {', '.join(_NEEDED)}")
        for field in ("rope_theta", *_NEEDED[kind]):
            if rope.get(field) is None:
                raise ValueError(f"RoPE of type {kind!r} needs {field}")
        chosen: dict[str, Any] = {"theta": float(rope["rope_theta"])}
        if kind != "default":
            chosen["factor"] = float(rope["factor"])
        if kind == "dynamic":
            chosen["original_max_positions"] = text.max_position_embeddings
        if kind == "llama3":
            chosen["low_freq_factor"] = float(rope["low_freq_factor"])
            chosen["high_freq_factor"] = float(rope["high_freq_factor"])
            chosen["original_max_positions"] = int(rope["original_max_position_embeddings"])
        return cls(kind, **chosen)

    def scaling(self) -> dict[str, Any]:
        """transformers' rope_scaling, without the base frequency."""
        fields: dict[str, Any] = {"rope_type": self.kind}
        if self.kind != "default":
            fields["factor"] = self.factor
        if self.kind == "llama3":
            fields |= {
                "low_freq_factor": self.low_freq_factor,
                "high_freq_factor": self.high_freq_factor,
                "original_max_position_embeddings": self.original_max_positions,
            }
        return fields


class Rope(nn.Module):
    """cos and signed sin of each row's position, [R, 1, D], for `decoder.rotate`. Holds no weights."""

    def __init__(self, config: RopeConfig, head_dim: int, max_positions: int) -> None:
        super().__init__()
        self.config = config
        self.head_dim = head_dim
        self.max_positions = max_positions
        self._table: tuple[Tensor, Tensor] | None = None

    def forward(self, position_R: Tensor, dtype: torch.dtype, spans: Spans) -> tuple[Tensor, Tensor]:
        if self.config.kind == "dynamic" or (self.config.kind == "by_prompt" and not self.training):
            growths = [self._growth(spans, number) for number in range(len(spans.lengths))]
            if self.config.kind == "dynamic" or any(growth > 1 for growth in growths):
                return self._grown(position_R, dtype, spans, growths)
        self.reserve(spans.reach, position_R.device, dtype)
        return self.at(position_R)

    def reserve(self, reach: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Compute cos and sin of the positions below `reach`; returns the table, which a call with a longer reach
        replaces. Not for dynamic RoPE.
        """
        table = self._table
        if table is None or len(table[0]) < reach or table[0].device != device or table[0].dtype != dtype:
            rows = 2 * reach  # doubling, so that a growing answer rarely needs a new table
            table = self._table = self._cos_sin(torch.arange(rows, device=device), self._frequencies(device), dtype)
        return table

    def at(self, position_R: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [R, 1, D] of positions that the table has."""
        assert self._table is not None, "reserve first"
        return self._table[0].index_select(0, position_R), self._table[1].index_select(0, position_R)

    def _cos_sin(self, position: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        angle = position.float()[:, None] * frequencies
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([cos, cos], -1).to(dtype)[:, None], torch.cat([-sin, sin], -1).to(dtype)[:, None]

    def _base_frequencies(self, device: torch.device, theta: float | Tensor) -> Tensor:
        exponent = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device) / self.head_dim
        return 1.0 / (theta**exponent)

    def _frequencies(self, device: torch.device) -> Tensor:
        config = self.config
        frequencies = self._base_frequencies(device, config.theta)
        if config.kind == "linear":
            return frequencies / config.factor
        if config.kind == "llama3":
            wavelength = 2 * math.pi / frequencies
            low = config.original_max_positions / config.low_freq_factor
            high = config.original_max_positions / config.high_freq_factor
            smooth = (config.original_max_positions / wavelength - config.low_freq_factor) / (
                config.high_freq_factor - config.low_freq_factor
            )
            blended = (1 - smooth) * frequencies / config.factor + smooth * frequencies
            scaled = torch.where(wavelength > low, frequencies / config.factor, frequencies)
            return torch.where((wavelength <= low) & (wavelength >= high), blended, scaled)
        return frequencies

    def _growth(self, spans: Spans, number: int) -> float:
        """By how much the base of one sequence grows, before the power of head_dim / (head_dim - 2). Each sequence's
        own length decides, so results do not depend on the batch. Dynamic: the rows so far; keys cached before it grew
        keep their base, as in transformers. By prompt: the rows of the prompt, all through its answer."""
        config, length = self.config, spans.lengths[number]
        if spans.branches and (branches := spans.branches[number]):
            alone = length - sum(branches) + max(branches)
            if alone > self.max_positions:
                raise ValueError(
                    f"{config.kind} RoPE rotates a prompt by the length of the whole sequence, so answers that reach "
                    f"{alone} positions (over {self.max_positions}) cannot share its rows: shorten them"
                )
            return 1.0
        reach = length + (spans.before[number] if spans.before else 0)
        if config.kind == "by_prompt":
            ratio = (spans.prompts[number] if spans.prompts else reach) / self.max_positions
            return max(2.0 ** math.ceil(math.log2(ratio) + 1) - 1, 1.0) if ratio > 1 else 1.0
        return config.factor * max(reach, self.max_positions) / self.max_positions - (config.factor - 1)

    def _grown(
        self, position_R: Tensor, dtype: torch.dtype, spans: Spans, growths: list[float]
    ) -> tuple[Tensor, Tensor]:
        theta = torch.full((len(position_R), 1), self.config.theta, dtype=torch.float32, device=position_R.device)
        for start, length, growth in zip(spans.starts, spans.lengths, growths, strict=True):
            theta[start : start + length] = self.config.theta * growth ** (self.head_dim / (self.head_dim - 2))
        return self._cos_sin(position_R, self._base_frequencies(position_R.device, theta), dtype)
