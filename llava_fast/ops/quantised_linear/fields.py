"""A linear layer as the integers that csrc/decode reads."""

from __future__ import annotations

import torch
from torch import Tensor

from llava_fast.ops.quantised_linear.weight import QuantisedWeight

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 3}  # csrc/decode/kernels.h


def fields_of(weight: Tensor | QuantisedWeight, bias: Tensor | None) -> list[int]:
    """[kind, address of the weight, of the scale, of the zero point, group size, address of the bias]; 0 for what is
    absent. The tensors must be contiguous and on the CPU. The kind of an unsupported dtype is -1."""
    of_bias = 0 if bias is None else bias.data_ptr()
    if isinstance(weight, Tensor):
        return [_KINDS.get(weight.dtype, -1), weight.data_ptr(), 0, 0, 0, of_bias]
    zero = 0 if weight.zero is None else weight.zero.data_ptr()
    return [_KINDS[weight.codes.dtype], weight.codes.data_ptr(), weight.scale.data_ptr(), zero, weight.group, of_bias]
