"""The weights of `decoder_step`: validated once, and again whenever the memory of one of them changes.

Shapes: C width, H query heads, K key/value heads, D head size, I intermediate width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llava_fast.ops.quantised_linear.fields import fields_of
from llava_fast.ops.quantised_linear.weight import QuantisedWeight

LINEARS = ("q", "k", "v", "o", "gate", "up", "down")


class LayerWeights(NamedTuple):
    """One decoder layer. Norms [C]; q [H*D, C]; k, v [K*D, C]; o [C, H*D]; gate, up [I, C]; down [C, I]; each bias
    [rows of its weight] or None."""

    input_norm: Tensor
    q: Tensor | QuantisedWeight
    q_bias: Tensor | None
    k: Tensor | QuantisedWeight
    k_bias: Tensor | None
    v: Tensor | QuantisedWeight
    v_bias: Tensor | None
    o: Tensor | QuantisedWeight
    o_bias: Tensor | None
    post_norm: Tensor
    gate: Tensor | QuantisedWeight
    gate_bias: Tensor | None
    up: Tensor | QuantisedWeight
    up_bias: Tensor | None
    down: Tensor | QuantisedWeight
    down_bias: Tensor | None


class DecoderWeights:
    """A decoder's layers and final norm [C]. windows[layer]: how many rows a row attends to, itself included (None:
    all). The tensors are referenced, not copied.

    Raises ValueError for mismatched shapes or devices, and for unquantised tensors of different dtypes.
    """

    def __init__(
        self,
        layers: Sequence[LayerWeights],
        norm: Tensor,
        head_dim: int,
        eps: float,
        windows: Sequence[int | None] | None = None,
    ) -> None:
        if not layers:
            raise ValueError("a decoder needs at least one layer")
        self.layers = list(layers)
        self.norm = norm
        self.head_dim = head_dim
        self.eps = eps
        self.windows = [window or 0 for window in windows or [None] * len(layers)]
        if len(self.windows) != len(layers):
            raise ValueError(f"{len(self.windows)} windows for {len(layers)} layers")
        first = self.layers[0]
        self.width = norm.numel()
        self.intermediate = first.gate.shape[0]
        self.heads, self.kv_heads = first.q.shape[0] // head_dim, first.k.shape[0] // head_dim
        if head_dim < 2 or head_dim % 2 or not self.kv_heads or self.heads % self.kv_heads:
            raise ValueError(
                f"q {tuple(first.q.shape)} and k {tuple(first.k.shape)} are not whole groups of heads of an even "
                f"size {head_dim}"
            )
        self._named: list[tuple[str, Tensor | QuantisedWeight, tuple[int, ...]]] = [("norm", norm, (self.width,))]
        for number, layer in enumerate(self.layers):
            self._named += self._expected(number, layer)
        self._tensors = [part for _, weight, _ in self._named for part in _parts(weight)]
        self.check()

    def check(self) -> None:
        """Raise ValueError unless every tensor has its shape and all have one dtype and device."""
        for name, weight, shape in self._named:
            if tuple(weight.shape) != shape:
                raise ValueError(f"{name} must be {list(shape)}, got {list(weight.shape)}")
            if isinstance(weight, QuantisedWeight):
                dtype, device = self.norm.dtype, weight.scale.device
            else:
                dtype, device = weight.dtype, weight.device
            if dtype != self.norm.dtype or device != self.norm.device:
                raise ValueError(
                    f"{name} is {dtype} on {device}, the final norm {self.norm.dtype} on {self.norm.device}: all must "
                    "be the same"
                )
        self._state = self._current_state()
        self.table = torch.tensor([_fields(layer) for layer in self.layers], dtype=torch.int64, device="cpu")
        strided = [name for name, weight, _ in self._named if not all(map(Tensor.is_contiguous, _parts(weight)))]
        self.unfit: str | None = None  # why the native backend does not support these weights
        if self.norm.dtype not in (torch.float32, torch.bfloat16) or self.norm.device.type != "cpu":
            self.unfit = (
                f"the weights are {self.norm.dtype} on {self.norm.device}; it takes float32 and bfloat16 on the CPU"
            )
        elif strided:
            self.unfit = f"{strided[0]} is not contiguous"

    def refresh(self) -> None:
        """Check again if the memory of a tensor changed since the last check (`model.to`, `parameter.data = ...`)."""
        if self._current_state() != self._state:
            self.check()

    def _current_state(self) -> tuple[list, list, list, list]:
        tensors = self._tensors
        return (
            list(map(Tensor.data_ptr, tensors)),
            list(map(Tensor.size, tensors)),
            list(map(Tensor.is_contiguous, tensors)),  # other strides than these the native form does not take
            [tensor.dtype for tensor in tensors],
        )

    def _expected(self, number: int, layer: LayerWeights) -> list[tuple[str, Tensor | QuantisedWeight, tuple]]:
        width, middle = self.width, self.intermediate
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        matrices = {
            "q": (q, width),
            "k": (kv, width),
            "v": (kv, width),
            "o": (width, q),
            "gate": (middle, width),
            "up": (middle, width),
            "down": (width, middle),
        }
        shapes: dict[str, tuple[int, ...]] = {"input_norm": (width,), "post_norm": (width,), **matrices}
        shapes |= {f"{name}_bias": (rows,) for name, (rows, _) in matrices.items()}
        return [
            (f"layer {number}'s {name}", tensor, shapes[name])
            for name, tensor in layer._asdict().items()
            if tensor is not None
        ]


def _parts(weight: Tensor | QuantisedWeight) -> list[Tensor]:
    if isinstance(weight, QuantisedWeight):
        return [part for part in (weight.codes, weight.scale, weight.zero) if part is not None]
    return [weight]


def _fields(layer: LayerWeights) -> list[int]:
    """A layer as _C.decoder_step reads it: the addresses of the norms, then the fields of each linear layer."""
    fields = [layer.input_norm.data_ptr(), layer.post_norm.data_ptr()]
    for name in LINEARS:
        weight, bias = getattr(layer, name), getattr(layer, f"{name}_bias")
        fields += fields_of(weight, bias)
    return fields
