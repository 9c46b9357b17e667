"""The products of csrc/decode with a quantised weight, in float64: the entries of x rounded to 8 bits, a scale for each
group of them, times the dequantised weight."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from llava_fast.ops.quantised_linear import QuantisedWeight, dequantise


def steps(x: Tensor, group: int = 32) -> Tensor:
    """The scale of each entry of x [rows, in]: the largest of its group is 127 of them."""
    padded = F.pad(x.double(), (0, -x.shape[1] % group)).unflatten(1, (-1, group)).abs()
    return (padded.amax(2, keepdim=True) / 127).expand(padded.shape).flatten(1)[:, : x.shape[1]]


def emulated(x: Tensor, weight: QuantisedWeight, bias: Tensor | None, group: int = 32) -> Tensor:
    step = steps(x, group)
    rounded = (x.double() / step).nan_to_num().round() * step
    return F.linear(rounded, dequantise(weight, torch.float64), None if bias is None else bias.double())


def room(x: Tensor, group: int = 32) -> Tensor:
    """How far each entry of x is from one that is rounded to another code."""
    step = steps(x, group)
    codes = (x.double() / step).nan_to_num()
    return (0.5 - (codes - codes.round()).abs()) * step


def emulation_error(x: Tensor, weight: QuantisedWeight, bias: Tensor | None, group: int = 32) -> Tensor:
    """How far float32 may be from `emulated`: a step for each code that x / step in float32, of two roundings, may
    turn (codes are at most 127: 127 * 2**-23 < 2**-16), and what the sums are off by."""
    step = steps(x, group)
    turned = torch.where(room(x, group) <= 2**-16 * step, step, 0)
    turned_sums = turned @ dequantise(weight, torch.float64).abs().T
    return turned_sums + summation_error(x, weight) + 2**-23 * emulated(x, weight, bias, group).abs()


def rounding_error(x: Tensor, weight: QuantisedWeight, bias: Tensor | None, group: int = 32) -> Tensor:
    """How far float32 with rounded x may be from the exact product: half a step for each entry of x (and the two
    roundings of x / step), and what the sums are off by."""
    dense = dequantise(weight, torch.float64)
    exact = F.linear(x.double(), dense, None if bias is None else bias.double())
    rounding = steps(x, group) @ dense.abs().T * (0.5 + 2**-15)
    return rounding + summation_error(x, weight, group) + 2**-23 * exact.abs()


def summation_error(x: Tensor, weight: QuantisedWeight, group: int = 32) -> Tensor:
    """A rounding for each addition of a group of 32 or more (sums within one are exact) and for each scale."""
    terms = (x.double().abs() + steps(x, group)) @ dequantise(weight, torch.float64).abs().T
    return terms * (x.shape[1] / 32 + 8) * 2**-24
