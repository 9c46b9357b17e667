"""assemble_inputs: from ViT features to the decoder's inputs_embeds in one op: projector and placement of all rows."""

from __future__ import annotations

import torch
from torch import Tensor

from llava_fast.ops import activations, backend, elementwise, library, triton_support
from llava_fast.ops.assemble_inputs import reference
from llava_fast.ops.token_pack import InversePlacement, token_pack, token_pack_backward

backend.register("assemble_inputs", "reference", "any device; rows are packed by token_pack's backend")
backend.register("assemble_inputs", "cublas", "CUDA, several layers")
backend.register("assemble_inputs", "triton", "CUDA")


def assemble_inputs(
    features: Tensor,
    kept: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    source: Tensor,
    row: Tensor,
    embedding: Tensor,
    constant: Tensor,
    inverse: InversePlacement,
    activation: str = "gelu",
    count: Tensor | None = None,
) -> Tensor:
    """Write projected feature rows, text embeddings and constant rows to their places: inputs_embeds [rows, width].

    features  [n, in]: rows of the vision tower.
    kept      int [k]: the feature row of each projected row, without duplicates; negative for a padding row, which
              must have a negative place too.
    weights   [out, in] each: the projector's linear layers; `activation` (transformers' name) runs between them.
    biases    [out] each, or an empty list.
    source    int [rows]: 0 text embedding, 1 projected row, 2 constant, -1 padding (a zero row).
    row       int [rows]: the row of that table (for text, the token id); ignored for padding.
    embedding [vocabulary, width]; constant [m, width] (row 0: the newline).
    inverse   the inverse placement; its visual_place [k] is the decoder row that each projected row
              goes to, or negative. It must agree with source and row, as the plan's columns do.
    count     int [1] on the same device: all kept rows from index count[0] on are padding, and kernels may skip them
              unless gradients are needed. None: padding may be anywhere.
    Returns [rows, width] in embedding's dtype. Gradients flow to features (zeros for rows not kept), every weight and
    bias, embedding and constant. They are summed in float32 in a fixed order; nothing is saved or computed for frozen
    inputs.

    FLOPs: 2 * k * (in * hidden + hidden * width) forward for two layers; per layer the same again for the gradient of
    its weight, and again for that of its input. Minimum bytes: kept feature rows read, hidden rows written and read,
    output rows written, weights read, each once; in training the hidden rows' pre-activations are written too. The
    projected rows and the kept features are never copied. Under autocast the projector runs in autocast's dtype, as
    nn.Linear does.
    Raises ValueError for mismatched shapes and for an unknown activation.
    """
    activations.check(activation)
    _check(features, kept, weights, biases, source, row, embedding, constant, inverse, count)
    features, *layers = library.autocast(features, *weights, *biases)
    weights, biases = layers[: len(weights)], layers[len(weights) :]
    keep = _first_kept(features, weights, biases) if torch.is_grad_enabled() else len(weights)
    return _assemble_inputs(
        features, kept, weights, biases, source, row, embedding, constant, list(inverse), activation, keep, count
    )[0]


def _check(features, kept, weights, biases, source, row, embedding, constant, inverse, count) -> None:
    if source.shape != row.shape or source.dim() != 1:
        raise ValueError(f"source {tuple(source.shape)} and row {tuple(row.shape)} must both be [rows]")
    if not weights or len(biases) not in (0, len(weights)):
        raise ValueError(
            f"{len(weights)} weights and {len(biases)} biases: give at least one weight, and a bias for each or none"
        )
    width = features.shape[-1]
    for number, weight in enumerate(weights):
        if weight.dim() != 2 or weight.shape[1] != width:
            raise ValueError(f"weight {number} is {tuple(weight.shape)}, but its input has {width} features")
        width = weight.shape[0]
        if biases and biases[number].shape != (width,):
            raise ValueError(f"bias {number} is {tuple(biases[number].shape)}, expected ({width},)")
    if embedding.shape[-1] != width or constant.shape[-1] != width:
        raise ValueError(
            f"tables differ in width: projector {width}, embedding {embedding.shape[-1]}, constant {constant.shape[-1]}"
        )
    if len(inverse.visual_place) != len(kept) or len(inverse.constant_segment) != len(constant) + 1:
        raise ValueError(
            f"inverse covers {len(inverse.visual_place)} visual and {len(inverse.constant_segment) - 1} constant rows, "
            f"but {len(kept)} rows are kept and there are {len(constant)} constants"
        )
    if count is not None and count.shape != (1,):
        raise ValueError(f"count must be [1], got {tuple(count.shape)}")


def _first_kept(features: Tensor, weights: list[Tensor], biases: list[Tensor]) -> int:
    """Index of the first layer whose pre-activation the backward pass needs: the first layer with a gradient, or the
    layer before it if that gradient is its weight's, which is computed from the layer's input."""
    if features.requires_grad:
        return 0
    for number, weight in enumerate(weights):
        if weight.requires_grad:
            return max(number - 1, 0)
        if biases and biases[number].requires_grad:
            return number
    return len(weights)


def _run(
    features: Tensor,
    kept: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    source: Tensor,
    row: Tensor,
    embedding: Tensor,
    constant: Tensor,
    inverse: list[Tensor],
    activation: str,
    keep: int,
    count: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    tables = [features, *weights, *biases, embedding, constant]
    unfit = triton_support.unfit(*tables, kept, source, row) or triton_support.unequal(*tables)
    no_fusion = elementwise.unfit(activation if len(weights) > 1 else "")
    chosen = backend.choose("assemble_inputs", embedding.device.type, {"triton": unfit, "cublas": unfit or no_fusion})
    if chosen == "cublas":
        from llava_fast.ops.assemble_inputs import cublas

        placed = (source.contiguous(), row.contiguous(), embedding.contiguous(), constant.contiguous())
        return cublas.assemble_inputs(features, kept, weights, biases, *placed, activation, keep)
    if chosen == "triton":
        from llava_fast.ops.assemble_inputs import triton_kernels

        return triton_kernels.assemble_inputs(
            features.contiguous(),
            kept.contiguous(),
            [weight.contiguous() for weight in weights],
            [bias.contiguous() for bias in biases],
            source.contiguous(),
            row.contiguous(),
            embedding.contiguous(),
            constant.contiguous(),
            InversePlacement(*inverse).visual_place.contiguous(),
            activation,
            keep,
            count,
        )
    visual, pres = reference.project(features, kept, weights, biases, activation)
    out = token_pack(source, row, embedding, visual, constant, InversePlacement(*inverse))
    return out, [pre if number >= keep else pre.new_empty(0, pre.shape[1]) for number, pre in enumerate(pres)]


def _run_backward(
    grad: Tensor,
    features: Tensor,
    kept: Tensor,
    weights: list[Tensor],
    pres: list[Tensor],
    source: Tensor,
    row: Tensor,
    inverse: list[Tensor],
    activation: str,
    feature_rows: int,
    needed: list[bool],
) -> list[Tensor]:
    unfit = triton_support.unfit(grad) or triton_support.unequal(grad, *weights)
    no_fusion = elementwise.unfit(activation if len(weights) > 1 else "")
    chosen = backend.choose("assemble_inputs", grad.device.type, {"triton": unfit, "cublas": unfit or no_fusion})
    if chosen == "cublas":
        from llava_fast.ops.assemble_inputs import cublas

        place = InversePlacement(*inverse).visual_place.contiguous()
        of_features, of_weights, of_biases = cublas.project_backward(
            grad.contiguous(), features, kept, place, weights, pres, activation, feature_rows, needed
        )
    elif chosen == "triton":
        from llava_fast.ops.assemble_inputs import triton_kernels

        of_features, of_weights, of_biases = triton_kernels.project_backward(
            grad.contiguous(),
            features.contiguous(),
            kept.contiguous(),
            InversePlacement(*inverse).visual_place.contiguous(),
            [weight.contiguous() for weight in weights],
            pres,
            activation,
            feature_rows,
            needed,
        )
    else:
        of_visual = token_pack_backward(grad, source, row, [0, len(kept), 0], [False, True, False], inverse)[1]
        of_features, of_weights, of_biases = reference.project_backward(
            of_visual.to(weights[0].dtype), features, kept, weights, pres, activation, feature_rows, needed
        )
    found = (of_features, *of_weights, *of_biases)
    return [weights[0].new_empty(0) if gradient is None else gradient for gradient in found]


def _fake(
    features, kept, weights, biases, source, row, embedding, constant, inverse, activation, keep, count
) -> tuple[Tensor, list[Tensor]]:
    out = embedding.new_empty(source.shape[0], embedding.shape[1])
    rows = kept.shape[0]
    sizes = ((rows if number >= keep else 0, weight.shape[0]) for number, weight in enumerate(weights[:-1]))
    return out, [features.new_empty(size) for size in sizes]


def _fake_backward(
    grad, features, kept, weights, pres, source, row, inverse, activation, feature_rows, needed
) -> list[Tensor]:
    shapes = [(feature_rows, weights[0].shape[1]), *(weight.shape for weight in weights)]
    shapes += [weight.shape[:1] for weight in weights]
    return [weights[0].new_empty(shape if want else 0) for shape, want in zip(shapes, needed, strict=False)]


def _save(ctx, inputs, output) -> None:
    features, kept, weights, biases, source, row, embedding, constant, inverse, activation, *_ = inputs
    pres = output[1]
    ctx.counts = (len(weights), len(pres), len(biases))
    ctx.needed = [t.requires_grad for t in (features, *weights, *biases)]
    ctx.tables = [(len(table), table.dtype) for table in (embedding, constant)]
    ctx.packs = [embedding.requires_grad, False, constant.requires_grad]
    ctx.feature_rows, ctx.activation = len(features), activation
    ctx.save_for_backward(
        features if ctx.needed[1] else features.new_empty(0, features.shape[1]),
        kept,
        *weights,
        *pres,
        source,
        row,
        *inverse,
    )
    ctx.mark_non_differentiable(*pres)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad: Tensor | None, _):
    layers, hidden, biases = ctx.counts
    features, kept, *rest = ctx.saved_tensors
    weights, pres, (source, row, *inverse) = rest[:layers], rest[layers : layers + hidden], rest[layers + hidden :]
    found: list[Tensor | None] = [None] * (1 + layers + biases)
    if grad is not None and any(ctx.needed):
        made = _assemble_inputs_backward(
            grad, features, kept, weights, pres, source, row, inverse, ctx.activation, ctx.feature_rows, ctx.needed
        )
        found = [gradient if want else None for gradient, want in zip(made, ctx.needed, strict=True)]
    packed: list[Tensor | None] = [None, None]
    if grad is not None and any(ctx.packs):
        sizes = [ctx.tables[0][0], 0, ctx.tables[1][0]]
        of_embedding, _, of_constant = token_pack_backward(grad, source, row, sizes, ctx.packs, inverse)
        made = ((of_embedding, ctx.packs[0]), (of_constant, ctx.packs[2]))
        packed = [g.to(dtype) if want else None for (g, want), (_, dtype) in zip(made, ctx.tables, strict=True)]
    of_weights, of_biases = found[1 : 1 + layers], found[1 + layers :]
    return found[0], None, of_weights, of_biases, None, None, *packed, [None] * len(inverse), None, None, None


_assemble_inputs_backward = library.define(
    "assemble_inputs_backward(Tensor grad, Tensor features, Tensor kept, Tensor[] weights, Tensor[] pres,"
    " Tensor source, Tensor row, Tensor[] inverse, str activation, SymInt feature_rows, bool[] needed) -> Tensor[]",
    _run_backward,
    _fake_backward,
)
_assemble_inputs = library.define(
    "assemble_inputs(Tensor features, Tensor kept, Tensor[] weights, Tensor[] biases, Tensor source, Tensor row,"
    " Tensor embedding, Tensor constant, Tensor[] inverse, str activation, int keep, Tensor? count)"
    " -> (Tensor, Tensor[])",
    _run,
    _fake,
    _backward,
    _save,
)
