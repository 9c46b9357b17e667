"""assemble_inputs with matrix products by PyTorch (cuBLAS) and one kernel each for activation and placement."""

from __future__ import annotations

from torch import Tensor

from llava_fast.ops import elementwise
from llava_fast.ops.assemble_inputs import reference
from llava_fast.ops.token_pack import triton_kernels as token_pack


def assemble_inputs(
    features: Tensor,
    kept: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    source: Tensor,
    row: Tensor,
    embedding: Tensor,
    constant: Tensor,
    activation: str,
    keep: int,
) -> tuple[Tensor, list[Tensor]]:
    """(inputs_embeds [rows, width], each layer's pre-activation; an empty tensor for layers before `keep`)."""
    visual, pres = reference.project(features, kept, weights, biases, activation, elementwise)
    out = token_pack.token_pack(source, row, embedding, visual, constant)
    return out, [pre if number >= keep else pre.new_empty(0, pre.shape[1]) for number, pre in enumerate(pres)]


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
    """Gradients of features, weights and biases from the output's gradient; None where not `needed` (same order)."""
    grad = token_pack.visual_gradient(grad, place)
    return reference.project_backward(
        grad, features, kept, weights, pres, activation, feature_rows, needed, elementwise
    )
