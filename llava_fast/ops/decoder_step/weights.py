"""The weights that `decoder_step` takes: checked once, and again whenever one of them has moved.

Shapes: C width, H query heads, K key heads, D head size, I intermediate width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class LayerWeights(NamedTuple):
    """One decoder layer. Norms [C]; q [H*D, C]; k, v [K*D, C]; o [C, H*D]; gate, up [I, C]; down [C, I]; each bias
    [rows of its weight] or None."""

    input_norm: Tensor
    q: Tensor
    q_bias: Tensor | None
    k: Tensor
    k_bias: Tensor | None
    v: Tensor
    v_bias: Tensor | None
    o: Tensor
    o_bias: Tensor | None
    post_norm: Tensor
    gate: Tensor
    gate_bias: Tensor | None
    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


class DecoderWeights:
    """A decoder's layers and final norm [C]. `windows[layer]` is how many rows a row attends to, itself included
    (None: all). The tensors are referred to, not copied.

    Raises ValueError where shapes do not fit together or dtypes or devices differ.
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
        self.intermediate = len(first.gate)
        self.heads, self.kv_heads = len(first.q) // head_dim, len(first.k) // head_dim
        if head_dim < 2 or head_dim % 2 or not self.kv_heads or self.heads % self.kv_heads:
            raise ValueError(
                f"q {tuple(first.q.shape)} and k {tuple(first.k.shape)} are not whole groups of heads of an even "
                f"size {head_dim}"
            )
        self._named: list[tuple[str, Tensor, tuple[int, ...]]] = [("norm", norm, (self.width,))]
        for number, layer in enumerate(self.layers):
            self._named += self._expected(number, layer)
        self._tensors = [tensor for _, tensor, _ in self._named]
        self.check()

    def check(self) -> None:
        """Raise ValueError unless every tensor has its shape and all have one dtype and device."""
        for name, tensor, shape in self._named:
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
            if tensor.dtype != self.norm.dtype or tensor.device != self.norm.device:
                raise ValueError(
                    f"{name} is {tensor.dtype} on {tensor.device}, the final norm {self.norm.dtype} on "
                    f"{self.norm.device}: all must be the same"
                )
        self._state = self._current_state()
        kept = {id(tensor): pointer for tensor, pointer in zip(self._tensors, self._state[0], strict=True)}
        self._pointers = [0 if t is None else kept[id(t)] for layer in self.layers for t in layer]
        strided = [name for name, tensor, _ in self._named if not tensor.is_contiguous()]
        self.unfit: str | None = None  # why the native backend cannot take these weights
        if self.norm.dtype != torch.float32 or self.norm.device.type != "cpu":
            self.unfit = f"the weights are {self.norm.dtype} on {self.norm.device}, it takes float32 on the CPU"
        elif strided:
            self.unfit = f"{strided[0]} is not contiguous"

    def refresh(self) -> None:
        """Check again if a tensor was given other memory (`model.to`, `parameter.data = ...`) since the last time."""
        if self._current_state() != self._state:
            self.check()

    def pointers(self) -> list[int]:
        """Addresses of the layers' tensors, 16 a layer in LayerWeights' order, 0 for None, as of the last check."""
        return self._pointers

    def _current_state(self) -> tuple[list, list, list]:
        tensors = self._tensors
        return (
            list(map(Tensor.data_ptr, tensors)),
            list(map(Tensor.numel, tensors)),
            [tensor.dtype for tensor in tensors],
        )

    def _expected(self, number: int, layer: LayerWeights) -> list[tuple[str, Tensor, tuple[int, ...]]]:
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
