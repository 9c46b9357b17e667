"""Whether a decoder pass may run as one compiled `decoder_step`, which reads weights and calls no module.

It may while every module is what `Decoder` built: one that is wrapped (LoRA), hooked, quantised or parametrised
must keep its own forward, and then the ordinary modules run. Checked before each pass.
"""

from __future__ import annotations

from itertools import repeat
from operator import contains, is_
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from llava_fast.models.blocks.attention import Spans
from llava_fast.ops import backend
from llava_fast.ops.decoder_step import DecoderWeights, LayerWeights

MAX_ROWS = 32  # above this PyTorch's matrix products catch up


def step_weights(decoder: nn.Module, plain: frozenset[type], x_RC: Tensor, spans: Spans) -> DecoderWeights | None:
    """The decoder's weights for `decoder_step`, or None if this pass has to run module by module.

    `plain` are the module types whose forward the op stands for.
    """
    if (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
        or type(x_RC) is not Tensor
        or x_RC.dtype != torch.float32
        or not x_RC.is_cpu
        or not 0 < len(x_RC) == len(spans.lengths) <= MAX_ROWS
        or max(spans.lengths) > 1
        or backend.requested() not in ("auto", "native")
        or nn.modules.module._has_any_global_hook()
    ):
        return None
    snapshot = _snapshots.get(decoder)
    if snapshot is None or not snapshot.holds():
        snapshot = _snapshots[decoder] = Snapshot(decoder, plain)
    return snapshot.weights


class Snapshot:
    """What a decoder's modules were when it was taken: `weights` if all were plain then, else None.

    `holds` compares lists made here, a few microseconds a layer.
    """

    def __init__(self, decoder: nn.Module, plain: frozenset[type]) -> None:
        self.weights: DecoderWeights | None = None
        self._modules = [module for part in ("layers", "norm") for module in decoder.get_submodule(part).modules()]
        self._kinds = list(map(type, self._modules))
        self._hooks = [
            hooks for module in self._modules for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]
        self._attributes = [vars(module) for module in self._modules]
        self._children = [module._modules for module in (decoder, *self._modules) if module._modules]
        self._children_then = [dict(children) for children in self._children]
        found = [(module._parameters, name) for module in self._modules for name in module._parameters]
        self._owners, self._names = [owner for owner, _ in found], [name for _, name in found]
        self._parameters_then = [owner[name] for owner, name in found]
        tensors = [tensor for tensor in self._parameters_then if tensor is not None]
        self._plain = all(kind in plain for kind in self._kinds[1:])  # the first is the list of layers
        if self._plain and self._undisturbed() and all(map(_is_ordinary, tensors)):
            self.weights = weights_of(decoder)

    def holds(self) -> bool:
        """True if no module, hook or parameter object changed since. Data pointers are not compared."""
        return (
            (self.weights is not None or not self._plain)
            and self._undisturbed()
            and list(map(type, self._modules)) == self._kinds
            and self._children == self._children_then
            and all(map(is_, map(dict.get, self._owners, self._names), self._parameters_then))
        )

    def _undisturbed(self) -> bool:
        return not any(self._hooks) and not any(map(contains, self._attributes, repeat("forward")))


def _is_ordinary(tensor: Tensor) -> bool:
    return type(tensor) is nn.Parameter and tensor.dtype == torch.float32 and tensor.is_cpu and tensor.is_contiguous()


def weights_of(decoder: Any) -> DecoderWeights:
    """The tensors of a Decoder of plain modules."""
    layers = []
    for layer in decoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        tensors = [layer.input_layernorm.weight]
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
            tensors += [linear.weight, linear.bias]
        tensors.append(layer.post_attention_layernorm.weight)
        for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
            tensors += [linear.weight, linear.bias]
        layers.append(LayerWeights(*tensors))
    config = decoder.config
    return DecoderWeights(layers, decoder.norm.weight, config.head_dim, config.rms_norm_eps, config.sliding_windows)


_snapshots: WeakKeyDictionary[nn.Module, Snapshot] = WeakKeyDictionary()
