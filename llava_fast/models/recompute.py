"""Activation checkpointing: layers are recomputed in the backward pass instead of saving their activations.

Source: Chen et al. 2016. "selective" saves what is most expensive to recompute: attention's output and every second
matrix product (Korthikanti et al. 2022 chose by cost too).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Literal, Protocol

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Recompute = Literal["none", "layers", "selective"]

_aten = torch.ops.aten
_PRODUCTS = (_aten.mm.default, _aten.addmm.default, _aten.bmm.default)
_ATTENTION = (
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
)


def run_layer(how: Recompute, function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), a layer's forward, saving for the backward pass only what `how` allows."""
    if how == "none" or not torch.is_grad_enabled():
        return function(*args)
    if how == "layers":
        return checkpoint(function, *args, use_reentrant=False)
    return checkpoint(function, *args, use_reentrant=False, context_fn=_selective)


def _selective():
    return create_selective_checkpoint_contexts(
        functools.partial(_keep, {True: itertools.count(), False: itertools.count()})
    )


def _keep(products: dict[bool, itertools.count], ctx, op, *args, **kwargs) -> CheckpointPolicy:
    if op in _ATTENTION or (op in _PRODUCTS and next(products[ctx.is_recompute]) % 2):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


class _Layers(Protocol):
    recompute: Recompute

    def parameters(self) -> Iterator[nn.Parameter]: ...


class _Model(Protocol):
    """The interface of a LlavaModel, which this module does not import."""

    @property
    def decoder(self) -> _Layers: ...

    @property
    def vision_tower(self) -> _Layers: ...


def set_recompute(model: _Model, how: Recompute) -> None:
    """Let the decoder and the tower of a LlavaModel recompute their layers; the tower only if it is trained."""
    model.decoder.recompute = how
    trained = any(parameter.requires_grad for parameter in model.vision_tower.parameters())
    model.vision_tower.recompute = how if trained else "none"
