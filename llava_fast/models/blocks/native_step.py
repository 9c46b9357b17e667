"""Whether a decoder pass may run as one compiled `decoder_step`, which reads weights and calls no module, and whether
its head may run natively too.

It may if every module is the one that `Decoder` built, or a QuantisedLinear or EightBitLinear in its place. If one is
wrapped (LoRA), hooked or parametrised, the modules run instead, because its own forward must be called. Checked before
each pass.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import repeat
from operator import contains, is_
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from llava_fast.models.blocks.attention import Spans
from llava_fast.models.quantised import QuantisedLinear
from llava_fast.ops import backend
from llava_fast.ops.decoder_step import DecoderWeights, LayerWeights
from llava_fast.ops.linear import native

MAX_ROWS = 32  # above this PyTorch's matrix products are as fast


def step_weights(decoder: nn.Module, plain: frozenset[type], x_RC: Tensor, spans: Spans) -> DecoderWeights | None:
    """The decoder's weights for `decoder_step`, or None if this pass must run the modules.

    `plain` are the module types that the op replaces.
    """
    if (
        not _may_run(x_RC)
        or x_RC.dtype not in (torch.float32, torch.bfloat16)
        or not 0 < len(x_RC) == len(spans.lengths) <= MAX_ROWS
        or max(spans.lengths) > 1
    ):
        return None
    snapshot = _snapshots.get(decoder)
    if snapshot is None or not snapshot.holds():
        snapshot = _snapshots[decoder] = Snapshot(decoder, plain)
    weights = snapshot.weights
    return weights if weights is not None and weights.norm.dtype == x_RC.dtype else None


def head_runs_natively(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether the native form of ops.linear gives the logits of these rows: of a single one, where it is faster."""
    return (
        len(hidden) == 1  # of four, PyTorch's product is faster: 12.0 ms to 14.5 (of one, 12.7 to 7.5) at 7B width
        and hidden.dtype == native.DTYPE  # asked first, because of float32 each token asks in vain
        and type(weight) is nn.Parameter
        and _may_run(hidden)
        and native.unfit(hidden, weight, bias) is None
    )


def _may_run(x: Tensor) -> bool:
    """Whether native code may replace modules in this call."""
    return not (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
        or type(x) is not Tensor
        or not x.is_cpu
        or backend.requested() not in ("auto", "native")
        or nn.modules.module._has_any_global_hook()
    )


class Snapshot:
    """A decoder's modules at one moment: `weights` if all were plain, else None.

    `holds` compares lists created here, which takes a few microseconds per layer.
    """

    def __init__(self, decoder: nn.Module, plain: frozenset[type], whole: bool = False) -> None:
        """whole: include the decoder itself, its embedding and its head (or take any other module)."""
        self.weights: DecoderWeights | None = None
        parts = [decoder] if whole else [decoder.get_submodule(part) for part in ("layers", "norm")]
        self._modules = [module for part in parts for module in part.modules()]
        self._kinds = list(map(type, self._modules))
        self._hooks = [
            hooks for module in self._modules for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]
        self._attributes = [vars(module) for module in self._modules]
        self._children = [module._modules for module in (decoder, *self._modules) if module._modules]
        self._children_then = [dict(children) for children in self._children]
        found = [
            (owner, name)
            for module in self._modules
            for owner in (module._parameters, module._buffers)
            for name in owner
        ]
        self._owners, self._names = [owner for owner, _ in found], [name for _, name in found]
        self._tensors_then = [owner[name] for owner, name in found]
        self._plain = all(kind in plain for kind in self._kinds[1:])  # the first is the list of layers
        if self._plain and self._undisturbed():
            norm: Any = decoder.norm
            if _are_ordinary(self._modules, norm.weight.dtype):
                self.weights = weights_of(decoder)

    def holds(self) -> bool:
        """True if no module, hook, parameter or buffer object changed since. Data pointers are not compared."""
        return (
            (self.weights is not None or not self._plain)
            and self._undisturbed()
            and list(map(type, self._modules)) == self._kinds
            and self._children == self._children_then
            and all(map(is_, map(_get, self._owners, self._names), self._tensors_then))
        )

    @property
    def kinds(self) -> set[type]:
        """The types of the decoder's modules."""
        return set(self._kinds)

    def _undisturbed(self) -> bool:
        return not any(self._hooks) and not any(map(contains, self._attributes, repeat("forward")))


def _are_ordinary(modules: list[nn.Module], dtype: torch.dtype) -> bool:
    """Whether csrc/decode supports the modules' tensors: contiguous, on the CPU, unquantised ones of one dtype,
    quantised ones without a column order.
    """
    parameters = [tensor for module in modules for tensor in module._parameters.values() if tensor is not None]
    buffers = [tensor for module in modules for tensor in module._buffers.values() if tensor is not None]
    return (
        all(type(tensor) is nn.Parameter and tensor.dtype == dtype for tensor in parameters)
        and all(tensor.is_cpu and tensor.is_contiguous() for tensor in parameters + buffers)
        and all(module.order is None for module in modules if isinstance(module, QuantisedLinear))
    )


def weights_of(decoder: Any) -> DecoderWeights:
    """The weights of a decoder of plain modules."""

    def parts(linear: Any) -> list:
        return [linear.quantised if isinstance(linear, QuantisedLinear) else linear.weight, linear.bias]

    layers = []
    for layer in decoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        tensors = [layer.input_layernorm.weight]
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
            tensors += parts(linear)
        tensors.append(layer.post_attention_layernorm.weight)
        for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
            tensors += parts(linear)
        layers.append(LayerWeights(*tensors))
    config = decoder.config
    return DecoderWeights(layers, decoder.norm.weight, config.head_dim, config.rms_norm_eps, config.sliding_windows)


_get: Callable[[dict, str], Any] = dict.get
_snapshots: WeakKeyDictionary[nn.Module, Snapshot] = WeakKeyDictionary()
