"""scaled_linear: a linear layer that may multiply in 8 bits, with both operands rounded, if that is faster here."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from llava_fast.ops import backend, library
from llava_fast.ops.rounding import LARGEST
from llava_fast.ops.scaled_linear import eight_bit
from llava_fast.ops.scaled_linear.eight_bit import unfit_device

__all__ = ["scaled_linear", "unfit_device"]

backend.register("scaled_linear", "reference", "any device: the product in x's dtype")
backend.register(
    "scaled_linear",
    "eight_bit",
    "CUDA: int8 from compute capability 8.0 on, float8 from 9.0 on; CPU",
    default_on=("cpu", "cuda"),  # its callers have asked for 8 bits
)


def scaled_linear(x: Tensor, weight: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, or about that: with x and the weight in 8 bits.

    x [.., in], weight [out, in] and bias [out] or None floating, of one dtype. codes [out, in], int8 or float8_e4m3fn,
    and scale float32 [out, 1]: the weight by `ops.rounding.rounded_rows`. Returns [.., out] in x's dtype. For
    inference only: no gradient.
    The reference is the product in x's dtype, which does not read the codes. The eight_bit backend rounds each row of
    x in the same way, multiplies the codes and scales the sums (`reference.rounded_linear`), with an error below
    |x - x'| |w|.T + |x'| |w - w'|.T at each element, where x' and w' are the rounded operands, and float32's rounding.
    FLOPs for n rows: 2 * n * in * out. Minimum bytes: x, codes and output once, and x's codes twice.
    Raises ValueError for mismatched tensors.
    """
    if x.dim() < 2 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x {tuple(x.shape)} must be [.., in] and weight {tuple(weight.shape)} [out, in]")
    if codes.shape != weight.shape or codes.dtype not in LARGEST or scale.shape != (len(weight), 1):
        raise ValueError(
            f"codes {codes.dtype} {tuple(codes.shape)} and scale {tuple(scale.shape)} must be the weight's "
            f"{tuple(weight.shape)} by rounded_rows"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} must be [{len(weight)}], one entry for each row of weight")
    if any(each is not None and each.dtype != x.dtype for each in (weight, bias)):
        raise ValueError(f"x, weight and bias must have one dtype, x is {x.dtype} and weight {weight.dtype}")
    return _scaled_linear(x, weight, codes, scale, bias)


def _run(x: Tensor, weight: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    unfit = eight_bit.unfit(x, codes)
    if backend.choose("scaled_linear", x.device.type, {"eight_bit": unfit}) == "eight_bit":
        out = eight_bit.scaled_linear(x.flatten(0, -2), codes, scale, bias)
        return out.view(*x.shape[:-1], len(codes))
    return F.linear(x, weight, bias)


_scaled_linear = library.define(
    "scaled_linear(Tensor x, Tensor weight, Tensor codes, Tensor scale, Tensor? bias) -> Tensor",
    _run,
    lambda x, weight, *_: x.new_empty(*x.shape[:-1], len(weight)),
)
