"""The projector in plain PyTorch. Gathering kept rows, this projector, then token_pack: the specification of
`llava_fast.ops.assemble_inputs`."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from llava_fast.ops import activations


def project(
    features: Tensor,
    kept: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    activation: str,
    form: ModuleType = activations,
) -> tuple[Tensor, list[Tensor]]:
    """(projected rows [k, width], pre-activations of every layer but the last). `form`: the module whose activation
    functions run, `activations` or `elementwise`."""
    x = _rows(features, kept)
    pres = []
    for number, weight in enumerate(weights):
        if number:
            pres.append(x)
            x = form.activate(activation, x)
        x = F.linear(x, weight, biases[number] if biases else None)
    return x, pres


def project_backward(
    grad: Tensor,
    features: Tensor,
    kept: Tensor,
    weights: list[Tensor],
    pres: list[Tensor],
    activation: str,
    feature_rows: int,
    needed: list[bool],
    form: ModuleType = activations,
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """Gradients of features, weights and biases from `grad`, that of the projected rows (zero for padding rows); None
    where not `needed` (same order)."""
    depth = len(weights)
    of_weights, of_biases = needed[1 : 1 + depth], needed[1 + depth :]
    weight_grads: list[Tensor | None] = [None] * depth
    bias_grads: list[Tensor | None] = [None] * len(of_biases)
    for number in range(depth - 1, -1, -1):
        if of_weights[number]:
            x = form.activate(activation, pres[number - 1]) if number else _rows(features, kept)
            weight_grads[number] = grad.T @ x
        if of_biases and of_biases[number]:
            bias_grads[number] = grad.sum(0)
        if not (needed[0] or any(of_weights[:number]) or any(of_biases[:number])):
            return None, weight_grads, bias_grads
        grad = grad @ weights[number]
        if number:
            grad = form.activation_gradient(activation, grad, pres[number - 1])
    out = grad.new_zeros(feature_rows + 1, grad.shape[1])  # the extra last row takes the padding's gradients
    out.index_copy_(0, torch.where(kept >= 0, kept, feature_rows).long(), grad)
    return out[:feature_rows], weight_grads, bias_grads


def _rows(features: Tensor, kept: Tensor) -> Tensor:
    """features[kept]; an arbitrary row for padding, since its result is not used."""
    return features[kept.clamp(0).long()]
