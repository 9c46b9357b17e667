"""assemble_inputs with the shared GEMM: its loads gather the kept rows and its epilogue stores projected rows at their
places, so neither features nor projected rows are copied. token_pack's kernel writes the other rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llava_fast.ops import gemm, sums
from llava_fast.ops.token_pack import triton_kernels as token_pack
from llava_fast.ops.triton_support import Specimen


def assemble_inputs(
    features: Tensor,
    kept: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    source: Tensor,
    row: Tensor,
    embedding: Tensor,
    constant: Tensor,
    place: Tensor,
    activation: str,
    keep: int,
    count: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    """(inputs_embeds [rows, width], each layer's pre-activation; an empty tensor for layers before `keep`).

    `count` is ignored if pre-activations are kept: the backward pass reads all of their rows.
    """
    count = count if keep == len(weights) else None
    out = torch.empty(len(source), embedding.shape[1], dtype=embedding.dtype, device=embedding.device)
    token_pack.pack(source, row, embedding, None, constant, out)
    gather: Tensor | None = kept
    x = features
    pres = []
    for number, weight in enumerate(weights[:-1]):
        pre = x.new_empty((len(kept), len(weight)) if number >= keep else (0, len(weight)))
        bias = biases[number] if biases else None
        kept_pre = pre if number >= keep else None
        x = gemm.gemm(x, weight, len(kept), bias=bias, activation=activation, gather=gather, count=count, pre=kept_pre)
        pres.append(pre)
        gather = None
    bias = biases[-1] if biases else None
    gemm.gemm(x, weights[-1], len(kept), bias=bias, gather=gather, out=out, store=place, count=count)
    return out, pres


def project_backward(
    grad: Tensor,
    features: Tensor,
    kept: Tensor,
    place: Tensor,
    weights: list[Tensor],
    pres: list[Tensor],
    activation: str,
    feature_rows: int,
    needed: list[bool],
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """Gradients of features, weights and biases from the output's gradient; None where not `needed` (same order).

    The output's gradient is gathered by the projected rows' places and features by `kept`, without copies. Hidden
    activations are recomputed once from the pre-activations, for the gradient of the next layer's weight.
    """
    depth, rows = len(weights), len(kept)
    of_weights, of_biases = needed[1 : 1 + depth], needed[1 + depth :]
    weight_grads: list[Tensor | None] = [None] * depth
    bias_grads: list[Tensor | None] = [None] * len(of_biases)
    gather: Tensor | None = place
    for number in range(depth - 1, -1, -1):
        if of_weights[number]:
            x, x_gather = (gemm.activation(pres[number - 1], activation), None) if number else (features, kept)
            weight_grads[number] = gemm.weight_gradient(grad, x, rows, grad_gather=gather, x_gather=x_gather)
            del x
        if of_biases and of_biases[number]:
            bias_grads[number] = sums.sum_rows(grad, rows, gather)
        if not (needed[0] or any(of_weights[:number]) or any(of_biases[:number])):
            return None, weight_grads, bias_grads
        if number:
            pre = pres[number - 1]
            grad = gemm.gemm(
                grad, weights[number], rows, transposed=False, gather=gather, slope=pre, activation=activation
            )
            gather = None
    out = torch.zeros(feature_rows, weights[0].shape[1], dtype=grad.dtype, device=grad.device)
    gemm.gemm(grad, weights[0], rows, transposed=False, gather=gather, out=out, store=kept)
    return out, weight_grads, bias_grads


def specimens() -> list[Specimen]:
    """The launches of LLaVA's mlp2x_gelu projector in inference and training. In 16 bits also those of the linear
    projector and of a trained tower."""
    op, name = "assemble_inputs", "gelu"
    found = []
    for dtype in ("bf16", "fp16", "fp32"):
        first: dict[str, Any] = {"activation": name, "bias": True, "gather": True}
        hidden: dict[str, Any] = {"activation": name, "slope": True, "gather": True, "transposed": False}
        found += [
            token_pack.pack_specimen(op, dtype, visual=False),
            gemm.gemm_specimen(op, dtype, f"{dtype} first layer", **first),
            gemm.gemm_specimen(op, dtype, f"{dtype} first layer, kept", **first, pre=True),
            gemm.gemm_specimen(op, dtype, f"{dtype} last layer", bias=True, store=True),
            gemm.gemm_specimen(op, dtype, f"{dtype} first layer, counted", **first, count=True),
            gemm.gemm_specimen(op, dtype, f"{dtype} last layer, counted", bias=True, store=True, count=True),
            gemm.gemm_specimen(op, dtype, f"{dtype} gradient of hidden", **hidden),
            gemm.weight_gradient_specimen(op, dtype, f"{dtype} last weight", grad_gather=True),
            gemm.weight_gradient_specimen(op, dtype, f"{dtype} first weight", x_gather=True),
            *(gemm.activation_specimen(op, dtype, name, gradient) for gradient in (False, True)),
            *sums.sum_specimens(op, dtype, gather=True),
        ]
    for dtype in ("bf16", "fp16"):
        found += [
            gemm.gemm_specimen(op, dtype, f"{dtype} only layer", gather=True, bias=True, store=True),
            gemm.gemm_specimen(op, dtype, f"{dtype} gradient of features", transposed=False, store=True),
            gemm.weight_gradient_specimen(op, dtype, f"{dtype} only weight", grad_gather=True, x_gather=True),
        ]
    return found
