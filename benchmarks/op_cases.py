"""Benchmark cases of the ops at the sizes of LLaVA-NeXT 7B, with their baselines and lower bounds.

Used by the tuning command and the GPU check. Sizes: CLIP-L/14-336 (577 rows of width 1024 per tile, 576 of them kept),
a decoder of width 4096, a newline after every 24 visual rows, and 64 text tokens. Each case has its own random inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.decoder_cases import DECODER_CASES
from benchmarks.image_cases import image_patch_rows, image_tiles, image_tiles_from_host
from benchmarks.op_case import OpCase, Widths, doubled, first_gradient
from benchmarks.quantised_cases import QUANTISED_CASES
from llava_fast import ops
from llava_fast.ops.mix_rows import InversePooling
from llava_fast.ops.token_pack import InversePlacement

ROWS_PER_TILE, KEPT_PER_TILE, LINE, TEXT = 577, 576, 24, 64


def cases(tiles: int, dtype: torch.dtype, device: str, widths: Widths) -> Iterator[OpCase]:
    """Yield a case of every op for an image of `tiles` tiles."""
    for make in MAKERS:
        yield made(make, tiles, dtype, device, widths)


def made(make: Callable[..., OpCase], tiles: int, dtype: torch.dtype, device: str, widths: Widths) -> OpCase:
    """One case with random inputs that are the same at each call."""
    torch.manual_seed(tiles)
    return make(tiles, dtype, torch.device(device), widths)


def token_pack(tiles: int, dtype: torch.dtype, device: torch.device, widths: Widths) -> OpCase:
    source, row, tables, _ = _placement(tiles, dtype, device, widths)
    moved = 2 * len(source) * widths.decoder * dtype.itemsize

    def plain() -> Tensor:
        out = tables[0][torch.where(source == 0, row, 0).long()]
        out = out.masked_scatter((source == 1)[:, None], tables[1])
        return torch.where((source == 2)[:, None], tables[2], out)

    return OpCase(
        "token_pack",
        f"{tiles} tiles",
        len(source),
        0,
        moved,
        ("pack_kernel",),
        lambda: ops.token_pack(source, row, *tables),
        plain,
        lambda: ops.token_pack(source, row, *(table.double() for table in tables)),
    )


def token_pack_gradients(tiles: int, dtype: torch.dtype, device: torch.device, widths: Widths) -> OpCase:
    source, row, tables, inverse = _placement(tiles, dtype, device, widths)
    grad = torch.randn(len(source), widths.decoder, dtype=dtype, device=device)
    visual, place = tables[1].requires_grad_(), inverse.visual_place.long()

    def gradient(table: Tensor, grad: Tensor) -> Tensor:
        others = [other.to(table.dtype) for other in (tables[0], tables[2])]
        return torch.autograd.grad(ops.token_pack(source, row, others[0], table, others[1], inverse), table, grad)[0]

    def plain() -> Tensor:
        return grad[place]  # no search for the rows: that would wait for the device, which no graph can hold

    return OpCase(
        "token_pack_backward",
        f"{tiles} tiles",
        len(visual),
        0,
        4 * len(visual) * widths.decoder * dtype.itemsize,  # the forward pass runs too
        ("take_rows_kernel",),
        lambda: gradient(visual, grad),
        plain,
        lambda: gradient(visual.detach().double().requires_grad_(), grad.double()),
    )


def token_pack_native(tiles: int, dtype: torch.dtype, device: torch.device, widths: Widths) -> OpCase:
    """The CUDA backend of csrc, to compare with the Triton backend."""
    case = token_pack(tiles, dtype, device, widths)
    return replace(case, op="token_pack_native", kernels=(), backend="native")


def token_pack_native_gradients(tiles: int, dtype: torch.dtype, device: torch.device, widths: Widths) -> OpCase:
    case = token_pack_gradients(tiles, dtype, device, widths)
    return replace(case, op="token_pack_native_backward", kernels=(), backend="native")


def token_pack_table_gradients(tiles: int, dtype: torch.dtype, device: torch.device, widths: Widths) -> OpCase:
    """Both passes with a trained embedding and newline; what is compared is the gradient of the tokens' embeddings and
    of the newline."""
    source, row, tables, inverse = _placement(tiles, dtype, device, widths)
    grad = torch.randn(len(source), widths.decoder, dtype=dtype, device=device)
    text_row, newline_row = inverse.text_row.long(), inverse.constant_row.long()
    tokens = row[text_row].long()
    distinct = inverse.text_token.long()

    def gradient(tables: list[Tensor], grad: Tensor) -> Tensor:
        leaves = [table.detach().requires_grad_() for table in (tables[0], tables[2])]
        out = ops.token_pack(source, row, leaves[0], tables[1], leaves[1], inverse)
        of_embedding, of_constant = torch.autograd.grad(out, leaves, grad)
        return torch.cat([of_embedding[distinct], of_constant])

    def plain() -> Tensor:
        of_embedding = torch.zeros_like(tables[0]).index_add_(0, tokens, grad[text_row])
        return torch.cat([of_embedding[distinct], grad[newline_row].sum(0, keepdim=True)])

    return OpCase(
        "token_pack_tables_backward",
        f"{tiles} tiles",
        TEXT,
        TEXT * widths.decoder,
        (widths.vocabulary + 2 * len(source) + TEXT + len(newline_row)) * widths.decoder * dtype.itemsize,
        ("sum_segments_kernel",),
        lambda: gradient(tables, grad),
        plain,
        lambda: gradient([table.double() for table in tables], grad.double()),
    )


def token_pack_native_table_gradients(tiles: int, dtype: torch.dtype, device: torch.device, widths: Widths) -> OpCase:
    case = token_pack_table_gradients(tiles, dtype, device, widths)
    return replace(case, op="token_pack_native_tables_backward", kernels=(), backend="native")


def mix_rows(tiles: int, dtype: torch.dtype, device: torch.device, widths: Widths) -> OpCase:
    """2x2 average pooling of projected rows, as video does."""
    rows, index, weight, inverse = _pooled(tiles, dtype, device, widths)
    return OpCase(
        "mix_rows",
        f"{tiles} tiles, 2x2",
        len(index),
        2 * index.numel() * widths.decoder,
        (len(rows) + len(index)) * widths.decoder * dtype.itemsize,
        ("mix_kernel",),
        lambda: ops.mix_rows(rows, index, weight, inverse=inverse),
        lambda: _avg_pool(rows, tiles),
        lambda: ops.mix_rows(rows.double(), index, weight),
    )


def mix_rows_gradients(tiles: int, dtype: torch.dtype, device: torch.device, widths: Widths) -> OpCase:
    """Both passes of the same; what is compared is the gradient of the rows."""
    rows, index, weight, inverse = _pooled(tiles, dtype, device, widths)
    grad = torch.randn(len(index), widths.decoder, dtype=dtype, device=device)

    def fused(rows: Tensor) -> Tensor:
        return ops.mix_rows(rows, index, weight, inverse=inverse)

    return OpCase(
        "mix_rows_backward",
        f"{tiles} tiles, 2x2",
        len(rows),
        4 * index.numel() * widths.decoder,  # the forward pass runs too
        2 * (len(rows) + len(index)) * widths.decoder * dtype.itemsize,
        ("mix_backward_kernel",),
        lambda: first_gradient(fused, [rows], [grad]),
        lambda: first_gradient(lambda rows: _avg_pool(rows, tiles), [rows], [grad]),
        lambda: first_gradient(fused, [rows.double()], [grad.double()]),
    )


def _pooled(
    tiles: int, dtype: torch.dtype, device: torch.device, widths: Widths
) -> tuple[Tensor, Tensor, Tensor, InversePooling]:
    """(rows, index, weight, inverse) of mix_rows for a 2x2 average of each tile's rows."""
    grid = torch.arange(tiles * KEPT_PER_TILE).view(tiles, LINE // 2, 2, LINE // 2, 2)
    index = grid.permute(0, 1, 3, 2, 4).reshape(-1, 4).int().to(device)
    rows = torch.randn(tiles * KEPT_PER_TILE, widths.decoder, dtype=dtype, device=device)
    inverse = InversePooling(
        torch.argsort(index.flatten(), stable=True).int(), torch.arange(len(rows) + 1, device=device).int()
    )
    return rows, index, torch.full(index.shape, 0.25, device=device), inverse


def _avg_pool(rows: Tensor, tiles: int) -> Tensor:
    picture = rows.view(tiles, LINE, LINE, -1).permute(0, 3, 1, 2)
    return F.avg_pool2d(picture, 2).permute(0, 2, 3, 1).flatten(0, 2)


def patch_embed(tiles: int, dtype: torch.dtype, device: torch.device, widths: Widths, rows: bool = False) -> OpCase:
    """CLIP's patch embedding from planar tiles, or from patch rows as the image op can produce them."""
    pixels, planar, weights, fixed = _patches(tiles, dtype, device, widths, rows)
    out_rows = tiles * len(weights[1])
    taps = weights[0][0].numel()
    moved = pixels.numel() + (weights[0].numel() + weights[1].numel() * (1 + tiles)) * dtype.itemsize
    return OpCase(
        "patch_embed",
        f"{tiles} tiles, {'rows' if rows else 'planar'}",
        out_rows,
        2 * out_rows * taps * widths.vision,
        moved,
        ("patch_embed_kernel_rows" if rows else "patch_embed_kernel",),
        lambda: _embedded(pixels, weights, fixed),
        lambda: _convolved(planar, weights, fixed),
        lambda: _embedded(pixels, [weight.double() for weight in weights], fixed),
    )


def patch_embed_gradients(
    tiles: int, dtype: torch.dtype, device: torch.device, widths: Widths, rows: bool = False
) -> OpCase:
    """Both passes of the patch embedding; what is compared is the weight's gradient."""
    pixels, planar, weights, fixed = _patches(tiles, dtype, device, widths, rows)
    out_rows = tiles * len(weights[1])
    taps = weights[0][0].numel()
    grad = torch.randn(tiles, len(weights[1]), widths.vision, dtype=dtype, device=device)

    def gradient(embed: Callable, given: Tensor, weights: list[Tensor]) -> Tensor:
        weights = [weight.detach().requires_grad_() for weight in weights]
        return torch.autograd.grad(embed(given, weights, fixed), weights, grad.to(weights[0].dtype))[0]

    return OpCase(
        "patch_embed_backward",
        f"{tiles} tiles, {'rows' if rows else 'planar'}",
        out_rows,
        4 * out_rows * taps * widths.vision,  # the forward pass runs too
        2 * pixels.numel() + (2 * grad.numel() + 2 * weights[0].numel()) * dtype.itemsize,
        ("patch_weight_gradient_kernel_rows" if rows else "patch_weight_gradient_kernel",),
        lambda: gradient(_embedded, pixels, weights),
        lambda: gradient(_convolved, planar, weights),
        lambda: gradient(_embedded, pixels, [weight.double() for weight in weights]),
    )


def patch_embed_rows(tiles: int, dtype: torch.dtype, device: torch.device, widths: Widths) -> OpCase:
    return patch_embed(tiles, dtype, device, widths, rows=True)


def patch_embed_rows_gradients(tiles: int, dtype: torch.dtype, device: torch.device, widths: Widths) -> OpCase:
    return patch_embed_gradients(tiles, dtype, device, widths, rows=True)


def _patches(
    tiles: int, dtype: torch.dtype, device: torch.device, widths: Widths, rows: bool
) -> tuple[Tensor, Tensor, list[Tensor], dict[str, Tensor]]:
    """(pixels in the form asked for, planar pixels, [weight, position, class row], mean and std)."""
    side, patch = widths.tile // widths.patch, widths.patch
    planar = torch.randint(0, 256, (tiles, 3, widths.tile, widths.tile), dtype=torch.uint8, device=device)
    pixels = planar
    if rows:
        pixels = F.unfold(planar.float(), patch, stride=patch).transpose(1, 2).to(torch.uint8)
        pixels = F.pad(pixels, (0, -pixels.shape[2] % 16))
    sizes = ((widths.vision, 3, patch, patch), (side * side + 1, widths.vision), (widths.vision,))
    weights = [torch.randn(size, dtype=dtype, device=device) / patch for size in sizes]
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return pixels, planar, weights, {"mean": torch.tensor(mean, device=device), "std": torch.tensor(std, device=device)}


def _embedded(pixels: Tensor, weights: list[Tensor], fixed: dict[str, Tensor]) -> Tensor:
    return ops.patch_embed(pixels, weights[0], weights[1], class_row=weights[2], **fixed)


def _convolved(planar: Tensor, weights: list[Tensor], fixed: dict[str, Tensor]) -> Tensor:
    """Normalise, convolve, add the rest: as a ViT is written."""
    weight, position, class_row = weights
    mean, std = (fixed[name][:, None, None] for name in ("mean", "std"))
    pixels = ((planar / 255.0 - mean) / std).to(weight.dtype)
    rows = F.conv2d(pixels, weight, stride=weight.shape[-1]).flatten(2).transpose(1, 2)
    return torch.cat([class_row.expand(len(rows), 1, -1), rows], dim=1) + position


def layer_norm(tiles: int, dtype: torch.dtype, device: torch.device, widths: Widths) -> OpCase:
    """A residual add and the LayerNorm after it, as between the parts of a layer."""
    (x, residual), weights = _normed(tiles, dtype, device, widths)

    def run(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.add_layer_norm(x, residual, weight, bias, 1e-5)[1]

    return OpCase(
        "add_layer_norm",
        f"{tiles} tiles",
        len(x),
        9 * x.numel(),
        4 * x.numel() * dtype.itemsize,
        ("layer_norm_kernel",),
        lambda: run(x, residual, *weights[:2]),
        lambda: F.layer_norm(x + residual, x.shape[1:], *weights[:2]),
        lambda: run(x.double(), residual.double(), *(weight.double() for weight in weights[:2])),
    )


def double_layer_norm(tiles: int, dtype: torch.dtype, device: torch.device, widths: Widths) -> OpCase:
    """CLIP's pre-LayerNorm and layer 0's."""
    (x, _), weights = _normed(tiles, dtype, device, widths)

    def run(x: Tensor, weights: list[Tensor]) -> Tensor:
        return ops.double_layer_norm(x, weights[0], weights[1], 1e-5, weights[2], weights[3], 1e-5)[1]

    def plain() -> Tensor:
        return F.layer_norm(F.layer_norm(x, x.shape[1:], *weights[:2]), x.shape[1:], *weights[2:])

    return OpCase(
        "double_layer_norm",
        f"{tiles} tiles",
        len(x),
        16 * x.numel(),
        3 * x.numel() * dtype.itemsize,
        ("double_layer_norm_kernel",),
        lambda: run(x, weights),
        plain,
        lambda: run(x.double(), [weight.double() for weight in weights]),
    )


def double_layer_norm_gradients(tiles: int, dtype: torch.dtype, device: torch.device, widths: Widths) -> OpCase:
    """Both passes of CLIP's two, a gradient coming to either result; what is compared is the gradient of x."""
    (x, grad), weights = _normed(tiles, dtype, device, widths)
    grad_sum = torch.randn_like(x)

    def fused(x: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        return ops.double_layer_norm(x, weights[0], weights[1], 1e-5, weights[2], weights[3], 1e-5)

    def plain(x: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        first = F.layer_norm(x, x.shape[1:], *weights[:2])
        return first, F.layer_norm(first, x.shape[1:], *weights[2:])

    given, grads = [x, *weights], [grad_sum, grad]
    return OpCase(
        "double_layer_norm_backward",
        f"{tiles} tiles",
        len(x),
        39 * x.numel(),
        10 * x.numel() * dtype.itemsize,  # the forward pass runs too
        (),  # layer_norm_backward decides its kernel's configuration
        lambda: first_gradient(fused, given, grads),
        lambda: first_gradient(plain, given, grads),
        lambda: first_gradient(fused, doubled(given), doubled(grads)),
    )


def layer_norm_gradients(tiles: int, dtype: torch.dtype, device: torch.device, widths: Widths) -> OpCase:
    """Both passes; what is compared is the gradient of x."""
    (x, grad), weights = _normed(tiles, dtype, device, widths)

    def fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.layer_norm(x, weight, bias, 1e-5)

    given = [x, *weights[:2]]
    return OpCase(
        "layer_norm_backward",
        f"{tiles} tiles",
        len(x),
        19 * x.numel(),
        5 * x.numel() * dtype.itemsize,  # the forward pass runs too
        ("layer_norm_backward_kernel",),
        lambda: first_gradient(fused, given, [grad]),
        lambda: first_gradient(lambda x, w, b: F.layer_norm(x, x.shape[1:], w, b), given, [grad]),
        lambda: first_gradient(fused, doubled(given), [grad.double()]),
    )


def linear_act(tiles: int, dtype: torch.dtype, device: torch.device, widths: Widths) -> OpCase:
    """The first linear layer of CLIP's MLP with its quick-GELU."""
    x, weight, bias = _linear(tiles, dtype, device, widths)
    moved = (x.numel() + weight.numel() + len(x) * widths.mlp) * dtype.itemsize
    return OpCase(
        "linear_act",
        f"{tiles} tiles",
        len(x),
        2 * x.numel() * widths.mlp,
        moved,
        ("gemm_kernel",),
        lambda: ops.linear_act(x, weight, bias, "quick_gelu"),
        lambda: _quick_gelu(F.linear(x, weight, bias)),
        lambda: ops.linear_act(x.double(), weight.double(), bias.double(), "quick_gelu"),
    )


def linear_act_gradients(tiles: int, dtype: torch.dtype, device: torch.device, widths: Widths) -> OpCase:
    """Both passes; what is compared is the weight's gradient."""
    given = _linear(tiles, dtype, device, widths)
    grad = torch.randn(len(given[0]), widths.mlp, dtype=dtype, device=device)

    def gradient(layer: Callable, given: list[Tensor], grad: Tensor) -> Tensor:
        leaves = [leaf.detach().requires_grad_() for leaf in given]
        return torch.autograd.grad(layer(*leaves), leaves, grad)[1]

    def fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.linear_act(x, weight, bias, "quick_gelu")

    rows, width = given[0].shape
    return OpCase(
        "linear_act_backward",
        f"{tiles} tiles",
        rows,
        6 * rows * width * widths.mlp,
        (3 * rows * width + 3 * given[1].numel() + 5 * grad.numel()) * dtype.itemsize,
        ("weight_gradient_kernel",),
        lambda: gradient(fused, given, grad),
        lambda: gradient(lambda x, w, b: _quick_gelu(F.linear(x, w, b)), given, grad),
        lambda: gradient(fused, [t.double() for t in given], grad.double()),
    )


def assemble_inputs(tiles: int, dtype: torch.dtype, device: torch.device, widths: Widths) -> OpCase:
    """Kept rows through LLaVA-1.5's projector into their places. Plain gathers, projects and places step by step; bare
    is the two products over the kept rows alone, without biases and activation."""
    return _assemble_inputs(tiles, dtype, device, widths, in_bucket=False)


def assemble_inputs_in_bucket(tiles: int, dtype: torch.dtype, device: torch.device, widths: Widths) -> OpCase:
    """The same in a CUDA graph's bucket: a quarter of the kept rows are padding, their number in device memory. Plain
    and bare have none, so that their ratio to assemble_inputs's is what the padding costs."""
    return _assemble_inputs(tiles, dtype, device, widths, in_bucket=True)


def _assemble_inputs(tiles: int, dtype: torch.dtype, device: torch.device, widths: Widths, in_bucket: bool) -> OpCase:
    place, features, kept, layers = _projected(tiles, dtype, device, widths)
    source, row, tables, inverse = place
    weights, biases = layers[:2], layers[2:]
    rows, places = features[kept.long()], inverse.visual_place.long()
    filled, filled_inverse, count = kept, inverse, None
    if in_bucket:
        padding = kept.new_full((len(kept) // 3,), -1)
        filled = torch.cat([kept, padding])
        filled_inverse = inverse._replace(visual_place=torch.cat([inverse.visual_place, padding]))
        count = kept.new_tensor([len(kept)])

    def run(features: Tensor, layers: list[Tensor], embedding: Tensor, constant: Tensor) -> Tensor:
        rest = (source, row, embedding, constant, filled_inverse)
        return ops.assemble_inputs(features, filled, layers[:2], layers[2:], *rest, count=count)

    def plain() -> Tensor:
        hidden = F.gelu(F.linear(features[kept.long()], weights[0], biases[0]))
        out = torch.where((source == 2)[:, None], tables[2], tables[0][torch.where(source == 0, row, 0).long()])
        return out.index_copy_(0, places, F.linear(hidden, weights[1], biases[1]))

    def bare() -> Tensor:
        return torch.mm(torch.mm(rows, weights[0].T), weights[1].T)

    exact_tables = [table.double() for table in (tables[0], tables[2])]
    products = 2 * len(kept) * widths.decoder * (widths.vision + widths.decoder)
    moved = features.numel() + sum(w.numel() for w in weights) + (2 * len(kept) + len(source)) * widths.decoder
    return OpCase(
        "assemble_inputs_in_bucket" if in_bucket else "assemble_inputs",
        f"{tiles} tiles",
        len(kept),
        products,
        moved * dtype.itemsize,
        ("gemm_kernel",),
        lambda: run(features, layers, tables[0], tables[2]),
        plain,
        lambda: run(features.double(), [layer.double() for layer in layers], *exact_tables),
        bare=bare,
    )


def assemble_inputs_gradients(tiles: int, dtype: torch.dtype, device: torch.device, widths: Widths) -> OpCase:
    """Both passes of a trained projector over frozen features; what is compared is the first weight's gradient."""
    place, features, kept, layers = _projected(tiles, dtype, device, widths)
    source, row, tables, inverse = place
    grad = torch.randn(len(source), widths.decoder, dtype=dtype, device=device)

    def gradient(features: Tensor, layers: list[Tensor], tables: list[Tensor], grad: Tensor, plain: bool) -> Tensor:
        leaves = [layer.detach().requires_grad_() for layer in layers]
        if plain:
            hidden = F.gelu(F.linear(features[kept.long()], leaves[0], leaves[2]))
            out, grad = F.linear(hidden, leaves[1], leaves[3]), grad[inverse.visual_place.long()]
        else:
            out = ops.assemble_inputs(
                features, kept, leaves[:2], leaves[2:], source, row, tables[0], tables[2], inverse
            )
        return torch.autograd.grad(out, leaves, grad)[0]

    exact = [[each.double() for each in group] for group in (layers, tables)]
    forward = 2 * len(kept) * widths.decoder * (widths.vision + widths.decoder)
    return OpCase(
        "assemble_inputs_backward",
        f"{tiles} tiles",
        len(kept),
        2 * forward + 2 * len(kept) * widths.decoder**2,
        (2 * features.numel() + 4 * sum(w.numel() for w in layers[:2]) + 4 * grad.numel()) * dtype.itemsize,
        ("weight_gradient_kernel",),
        lambda: gradient(features, layers, tables, grad, False),
        lambda: gradient(features, layers, tables, grad, True),
        lambda: gradient(features.double(), exact[0], exact[1], grad.double(), False),
    )


def _normed(
    tiles: int, dtype: torch.dtype, device: torch.device, widths: Widths
) -> tuple[tuple[Tensor, Tensor], list[Tensor]]:
    """Two tables of rows, and weight and bias of two LayerNorms."""
    rows = tiles * ROWS_PER_TILE
    x, other = (torch.randn(rows, widths.vision, dtype=dtype, device=device) for _ in range(2))
    return (x, other), [torch.randn(widths.vision, dtype=dtype, device=device) for _ in range(4)]


def _linear(tiles: int, dtype: torch.dtype, device: torch.device, widths: Widths) -> list[Tensor]:
    """x, weight, bias of the MLP's first layer."""
    sizes = ((tiles * ROWS_PER_TILE, widths.vision), (widths.mlp, widths.vision), (widths.mlp,))
    x, weight, bias = (torch.randn(size, dtype=dtype, device=device) for size in sizes)
    return [x, weight / widths.vision**0.5, bias]


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _projected(tiles: int, dtype: torch.dtype, device: torch.device, widths: Widths):
    """(placement as of token_pack, features, kept, [weight, weight, bias, bias])."""
    place = _placement(tiles, dtype, device, widths)
    features = torch.randn(tiles * ROWS_PER_TILE, widths.vision, dtype=dtype, device=device)
    kept = torch.arange(tiles * ROWS_PER_TILE).view(tiles, ROWS_PER_TILE)[:, 1:].flatten().int().to(device)
    sizes = ((widths.decoder, widths.vision), (widths.decoder, widths.decoder), (widths.decoder,), (widths.decoder,))
    layers = [torch.randn(size, dtype=dtype, device=device) / size[-1] ** 0.5 for size in sizes]
    return place, features, kept, layers


def _placement(
    tiles: int, dtype: torch.dtype, device: torch.device, widths: Widths
) -> tuple[Tensor, Tensor, list[Tensor], InversePlacement]:
    """(source, row, [embedding, visual, constant], inverse): half the text, every kept row with a newline after each
    line of them, the other half."""
    kept = tiles * KEPT_PER_TILE
    text, lines = [0] * (TEXT // 2), ([1] * LINE + [2]) * (kept // LINE)
    source = torch.tensor(text + lines + text, dtype=torch.int32)
    tokens = torch.randint(0, widths.vocabulary, (TEXT,), dtype=torch.int32)
    row = torch.zeros_like(source)
    row[source == 0] = tokens
    row[source == 1] = torch.arange(kept, dtype=torch.int32)
    text_row = torch.nonzero(source == 0)[:, 0][torch.argsort(tokens, stable=True)]
    distinct, counts = torch.unique(tokens, return_counts=True)
    inverse = (
        text_row,
        distinct,
        torch.cat([torch.zeros(1), counts.cumsum(0)]),
        torch.nonzero(source == 1)[:, 0],
        torch.nonzero(source == 2)[:, 0],
        torch.tensor([0, kept // LINE]),
    )
    sizes = (widths.vocabulary, kept, 1)
    tables = [torch.randn(size, widths.decoder, dtype=dtype, device=device) for size in sizes]
    return source.to(device), row.to(device), tables, InversePlacement(*(column.int().to(device) for column in inverse))


MAKERS: tuple[Callable[..., OpCase], ...] = (
    token_pack,
    token_pack_gradients,
    token_pack_table_gradients,
    mix_rows,
    mix_rows_gradients,
    patch_embed,
    patch_embed_rows,
    patch_embed_gradients,
    patch_embed_rows_gradients,
    layer_norm,
    double_layer_norm,
    layer_norm_gradients,
    double_layer_norm_gradients,
    linear_act,
    linear_act_gradients,
    assemble_inputs,
    assemble_inputs_gradients,
    image_tiles,
    image_patch_rows,
    *DECODER_CASES,
    *QUANTISED_CASES,
)
MEASURED_BESIDE = (
    token_pack_native,
    token_pack_native_gradients,
    token_pack_native_table_gradients,
    assemble_inputs_in_bucket,
    image_tiles_from_host,
)
"""Alternative implementations of the same results. They are measured, but neither tuned nor in the table of floors."""
