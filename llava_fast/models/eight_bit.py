"""Linears that may multiply many rows in 8 bits: vision towers, projectors and prefill with `load(precision=...)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llava_fast.errors import BackendError
from llava_fast.models.fused import MergedLinear, is_plain, takes
from llava_fast.models.quantised import like
from llava_fast.ops import scaled_linear
from llava_fast.ops.rounding import rounded_rows
from llava_fast.ops.scaled_linear import unfit_device

PRECISIONS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
FEW_ROWS = 256  # up to so many, a decoding step's, 16-bit weights are used


class EightBitLinear(nn.Linear):
    """nn.Linear whose products of more than FEW_ROWS rows may run in 8 bits (ops.scaled_linear); selection decides.

    Takes over a Linear's weight and bias, and holds its weight once more: codes [out, in] of 8 bits and scale float32
    [out, 1]. They follow the weight: after a change in place (PEFT's merge) it is rounded anew at the next product. Not
    seen is a change of an inference tensor (of a model loaded in inference mode) or through `weight.data`, after which
    `round_weight` is to be called. A state dict has the weight alone, so a checkpoint is written as without them.
    Where a gradient is needed, in training mode, under autocast and torch.compile it is an nn.Linear.
    """

    codes: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        nn.Linear.__init__(self, linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias, self.code_dtype = linear.weight, linear.bias, dtype
        self.training = linear.training
        for name in ("codes", "scale"):
            self.register_buffer(name, None, persistent=False)
        self.round_weight()

    def round_weight(self) -> None:
        """Derive the codes anew from the weight."""
        self.codes, self.scale = rounded_rows(self.weight.detach(), self.code_dtype)
        self._rounded = _state_of(self.weight)

    def follow_weight(self) -> None:
        """Derive the codes anew if the weight has changed."""
        if self._rounded != _state_of(self.weight):
            self.round_weight()

    def forward(self, x: Tensor) -> Tensor:
        gradients = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        if x.shape[:-1].numel() <= FEW_ROWS or self.training or gradients:
            return super().forward(x)
        if not takes("scaled_linear", x, operands=(self.weight,)):
            return super().forward(x)
        self.follow_weight()
        return scaled_linear(x, self.weight, self.codes, self.scale, self.bias)

    def train(self, mode: bool = True) -> EightBitLinear:
        if self.training and not mode:
            self.round_weight()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EightBitLinear:
        super()._apply(fn, recurse)
        self.round_weight()
        return self

    def _load_from_state_dict(self, *args) -> None:
        super()._load_from_state_dict(*args)
        self.round_weight()


def _state_of(weight: Tensor) -> tuple[int, int]:
    """What a change of the weight changes: its address (`weight.data = ...`) or its version (in place)."""
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version


class EightBitMergedLinear(MergedLinear, EightBitLinear):  # type: ignore[misc]  # forward returns a tuple
    """A MergedLinear likewise."""

    def __init__(self, linear: MergedLinear, dtype: torch.dtype) -> None:
        EightBitLinear.__init__(self, linear, dtype)
        self.names, self.sizes = linear.names, linear.sizes


def use_precision(model: Any, precision: str) -> None:
    """Let the Linears of a LlavaModel's tower, projector and decoder layers multiply in 8 bits, in place. Linears that
    are wrapped, hooked or quantised stay as they are. `precision` is "int8" or "fp8"; raises BackendError as
    `check_precision` does."""
    embedding = like(model.decoder.embed_tokens)
    check_precision(precision, embedding.device, embedding.dtype)
    layers = model.get_submodule(f"decoder.{model.config.decoder.layers_name}")
    for part in (model.vision_tower, model.projector, layers):
        for module in list(part.modules()):
            for name, linear in list(module.named_children()):
                if is_plain(linear, nn.Linear):
                    setattr(module, name, EightBitLinear(linear, PRECISIONS[precision]))
                elif is_plain(linear, MergedLinear):
                    setattr(module, name, EightBitMergedLinear(linear, PRECISIONS[precision]))


def check_precision(precision: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raises BackendError for a precision that is unknown, or that this device or PyTorch does not support."""
    if precision not in PRECISIONS:
        raise BackendError(f"precision is {precision!r}: use {', '.join(map(repr, PRECISIONS))} or None")
    if (why := unfit_device(device, PRECISIONS[precision])) is not None:
        raise BackendError(f"precision {precision!r} cannot be used on {device}: {why}; leave precision out")
    if precision == "fp8" and device.type == "cuda" and dtype != torch.bfloat16:
        raise BackendError(f"precision 'fp8' on CUDA needs dtype='bfloat16', not {dtype}")
