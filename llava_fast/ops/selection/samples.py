"""Small calls similar to a given one, for the correctness test: at most ROWS rows, seeded random values.

Values are drawn because those of the call may hide errors: in a new model biases are 0 and norm weights 1, so a kernel
that ignores them would look correct.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from llava_fast.ops.paging import block_addresses
from llava_fast.ops.rounding import TYPICAL_ERROR, rounded_rows

ROWS = 512
SEEDS = 8
Args = dict[str, Any]

NORM_BACKWARD = ("grad", "grad_sum", "x", "mean", "rstd")
ROW_ARGS: dict[str, tuple[str, ...]] = {
    "layer_norm": ("x",),
    "add_layer_norm": ("x", "residual"),
    "double_layer_norm": ("x",),
    "layer_norm_backward": NORM_BACKWARD,
    "rms_norm": ("x",),
    "add_rms_norm": ("x", "residual"),
    "rms_norm_backward": NORM_BACKWARD,
    "swiglu": ("gate", "up"),
    "swiglu_backward": ("grad", "gate", "up"),
    "linear_act": ("x",),
    "linear_act_backward": ("grad", "x", "pre"),
    "scaled_linear": ("x",),
    "quantised_linear": ("x",),
    "quantised_linear_backward": ("grad",),
}
"""Operators with independent rows -> the arguments that have those rows; leading dimensions are all rows."""

IGNORED: dict[str, tuple[str, ...]] = {
    "packed_attention": ("keys", "query_lengths", "key_lengths"),
    "paged_attention": ("segments", "addresses", "layer"),
}
"""Arguments that do not change an operator's class: they only say where rows lie."""


def tolerance(operator: str, args: Args) -> float:
    """The error against float64 that is allowed a call whose operands may be rounded to 8 bits: as the user has asked
    for, or the inputs of a quantised weight on a CPU. Else 0."""
    if operator == "scaled_linear":
        return TYPICAL_ERROR[args["codes"].dtype]
    if operator == "quantised_linear" and args["x"].is_cpu and not args["exact"]:
        return TYPICAL_ERROR[torch.int8]
    return 0.0


def is_known(operator: str) -> bool:
    """Whether an operator's calls can be sampled; otherwise it keeps its default backend."""
    return operator in ROW_ARGS or operator in MAKERS


def samples_of(operator: str, args: Args) -> list[Args]:
    """Small calls similar to the call of `operator` with `args` (by name): one, or up to SEEDS if a call has so few
    rows that its error would depend on chance."""
    first = sample_of(operator, args)
    largest = max(each.shape[0] for each in tree_leaves(first) if isinstance(each, Tensor) and each.dim())
    return [first, *(sample_of(operator, args, seed) for seed in range(1, min(SEEDS, ROWS // largest)))]


def sample_of(operator: str, args: Args, seed: int = 0) -> Args:
    """The arguments, in order, of a small call with the same code path as the call of `operator` with `args`."""
    draw = Draw(next(each for each in args.values() if isinstance(each, Tensor)).device, seed)
    if operator in MAKERS:
        return MAKERS[operator](args, draw)
    return draw.values(_fewer_rows(args, ROW_ARGS[operator], draw))


class Draw:
    """A seeded source of random tensors on a device."""

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self.device = device
        self._generator = torch.Generator(device).manual_seed(seed)

    def normal(self, like: Tensor, *shape: int, name: str = "") -> Tensor:
        """Standard normal values in `like`'s dtype; those of a weight matrix are divided by the square root of its
        number of inputs, so that products have variance about 1."""
        shape = shape or tuple(like.shape)
        values = torch.randn(shape, generator=self._generator, device=self.device)
        if name.startswith("weight") and len(shape) > 1:
            values /= max(values.numel() // max(shape[0], 1), 1) ** 0.5
        return values.to(like.dtype)

    def integers(self, below: int, count: int) -> Tensor:
        """int64 [count] in 0 .. below - 1."""
        return torch.randint(max(below, 1), (count,), generator=self._generator, device=self.device)

    def order(self, count: int) -> Tensor:
        """int64 [count]: 0 .. count - 1 in random order."""
        return torch.randperm(count, generator=self._generator, device=self.device)

    def values(self, args: Args, keep: tuple[str, ...] = ()) -> Args:
        """The arguments with the floating tensors' values redrawn, except those named."""

        def fresh(name: str, arg: Any) -> Any:
            if isinstance(arg, list):
                return [fresh(name, each) for each in arg]
            redraw = isinstance(arg, Tensor) and arg.is_floating_point() and name not in keep
            return self.normal(arg, *arg.shape, name=name) if redraw and arg.dim() else arg

        return {name: fresh(name, arg) for name, arg in args.items()}


def _fewer_rows(args: Args, names: tuple[str, ...], draw: Draw) -> Args:
    """The call with at most ROWS rows of random values."""
    tables = {name: args[name] for name in names if args.get(name) is not None and args[name].numel()}
    chosen = draw.order(next(iter(tables.values())).shape[:-1].numel())[:ROWS]
    return args | {name: table.reshape(-1, table.shape[-1])[chosen] for name, table in tables.items()}


def _norm_backward(args: Args, draw: Draw) -> Args:
    """Uses the statistics of the drawn rows: with others, sums would not cancel and no backend would be accurate."""
    found = draw.values(_fewer_rows(args, NORM_BACKWARD, draw))
    if found["rstd"] is not None and found["rstd"].numel():
        x, dtype = found["x"].float(), found["rstd"].dtype
        mean = x.mean(-1, keepdim=True) if "mean" in found else torch.zeros_like(x[:, :1])
        found["rstd"] = (x - mean).square().mean(-1, keepdim=True).add(1e-6).rsqrt().to(dtype)
        if "mean" in found:
            found["mean"] = mean.to(dtype)
    return found


def _rope(args: Args, draw: Draw) -> Args:
    """[B, heads, S, D] with fewer positions."""
    query = "query" if "query" in args else "grad_query"
    key = "key" if "key" in args else "grad_key"
    batch, _, positions, _ = args[query].shape
    chosen = draw.order(positions)[: max(ROWS // batch, 1)]
    found = args | {name: args[name][:, :, chosen] for name in (query, key)}
    return draw.values(found | {name: args[name][:, chosen] for name in ("cos", "sin")})


def _mix_rows(args: Args, draw: Draw) -> Args:
    """A pooling table over fewer rows, with its inverse."""
    sources, width = args["index"].shape[1], (args["rows"] if "grad" not in args else args["grad"]).shape[1]
    pooled = min(len(args["index"]), max(ROWS // sources, 1))
    rows = min(max(pooled * sources, 1), ROWS)
    index = draw.integers(rows, pooled * sources)
    start = torch.searchsorted(index.sort().values, torch.arange(rows + 1, device=draw.device))
    inverse = [torch.argsort(index, stable=True).int(), start.int()] if args["inverse"] else []
    like = args["grad"] if "grad" in args else args["rows"]
    table = draw.normal(like, rows, width)
    keeps_rows = "grad" not in args or args["reduce"] == "max"
    found = {
        "rows": table if keeps_rows else table[:0],
        "index": index.view(pooled, sources).to(args["index"].dtype),
        "weight": draw.normal(args["weight"], pooled, sources, name="weight"),
        "inverse": inverse,
    }
    if "grad" in args:
        found |= {"grad": draw.normal(like, pooled, width), "source_rows": rows}
    return args | found


def _patch_embed(args: Args, draw: Draw) -> Args:
    """One tile; mean and standard deviation of the pixels are kept."""
    found = dict(args)
    for name in ("tiles", "grad"):
        if args.get(name) is not None:
            found[name] = args[name][:1]
    if args.get("count") is not None:
        found["count"] = torch.ones_like(args["count"])
    if "shape" in args:
        found["shape"] = [1, *args["shape"][1:]]
    return draw.values(found, keep=("mean", "std"))


def _placement(args: Args, draw: Draw, visual: int, constants: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(source, row, inverse) of a sequence in random order: text, each of `visual` visual rows once, constant rows, and
    two padding rows. Indices have the call's dtype."""
    dtype = args["source"].dtype
    text = visual // 4 + 1
    parts = [
        (0, draw.integers(VOCABULARY, text)),
        (1, draw.order(visual)),
        (2, draw.integers(constants, constants and text)),
        (-1, draw.integers(1, 2)),
    ]
    source = torch.cat([torch.full_like(rows, kind) for kind, rows in parts])
    row = torch.cat([rows for _, rows in parts])
    order = draw.order(len(source))
    source, row = source[order], row[order]
    at = [torch.nonzero(source == kind)[:, 0] for kind in range(3)]
    text_row, constant_row = (at[kind][torch.argsort(row[at[kind]], stable=True)] for kind in (0, 2))
    tokens, counts = torch.unique(row[at[0]], return_counts=True)
    place = torch.empty(visual, dtype=torch.int64, device=draw.device)
    place[row[at[1]]] = at[1]
    bounds = torch.arange(constants + 1, device=draw.device)
    inverse = [
        text_row,
        tokens,
        torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
        place,
        constant_row,
        torch.searchsorted(row[constant_row], bounds),
    ]
    return source.to(dtype), row.to(dtype), [part.int() for part in inverse]


VOCABULARY = 1000  # number of token ids of a sample, to keep the embedding small


def _token_pack(args: Args, draw: Draw) -> Args:
    is_backward = "grad" in args
    like = args["grad"] if is_backward else args["embedding"]
    width = like.shape[1]
    given = args["sizes"] if is_backward else [len(args[name]) for name in ("embedding", "visual", "constant")]
    if args["inverse"]:  # a backward pass gets no size of a table without a gradient
        given = [given[0], len(args["inverse"][3]), len(args["inverse"][5]) - 1]
    visual, constants = min(given[1], ROWS // 2), given[2]
    source, row, inverse = _placement(args, draw, visual, constants)
    found = {"source": source, "row": row, "inverse": inverse if args["inverse"] else []}
    sizes = {"embedding": VOCABULARY, "visual": visual, "constant": constants}
    if is_backward:
        return args | found | {"grad": draw.normal(like, len(source), width), "sizes": list(sizes.values())}
    return args | found | {name: draw.normal(args[name], size, width) for name, size in sizes.items()}


def _assemble_inputs(args: Args, draw: Draw) -> Args:
    """Projected rows selected from twice as many features, in random order."""
    is_backward = "grad" in args
    kept = min(len(args["kept"]), ROWS // 2)
    constants = len(args["inverse"][5]) - 1
    source, row, inverse = _placement(args, draw, kept, constants)
    found = draw.values({name: args[name] for name in ("weights", "biases") if name in args})
    found |= {
        "source": source,
        "row": row,
        "inverse": inverse,
        "kept": draw.order(2 * kept)[:kept].to(args["kept"].dtype),
    }
    features = args["features"]
    held = 2 * kept if len(features) else 0
    found["features"] = draw.normal(features, held, features.shape[1])
    if is_backward:
        pres = [draw.normal(pre, kept if len(pre) else 0, pre.shape[1]) for pre in args["pres"]]
        grad = draw.normal(args["grad"], len(source), args["grad"].shape[1])
        return args | found | {"grad": grad, "pres": pres, "feature_rows": 2 * kept}
    for name, size in (("embedding", VOCABULARY), ("constant", constants)):
        found[name] = draw.normal(args[name], size, args[name].shape[1])
    count = args["count"]
    return args | found | {"count": None if count is None else torch.full_like(count, kept)}


def _packed_attention(args: Args, draw: Draw) -> Args:
    """The first sequences, shortened, with as many earlier keys each as there is room for."""
    lengths = list(zip(args["query_lengths"], args["key_lengths"], strict=True))[:4]
    most = ROWS // (2 * len(lengths))
    queries = [min(own, most) for own, _ in lengths]
    earlier = [min(total - own, most) for own, total in lengths]
    keys = [own + before for own, before in zip(queries, earlier, strict=True)]
    rows = {"query": sum(queries), "key": sum(keys), "value": sum(keys)}
    found: Args = {name: draw.normal(args[name], count, *args[name].shape[1:]) for name, count in rows.items()}
    for name, counts in (("queries", queries), ("keys", keys)):
        found[name] = torch.tensor([0, *itertools.accumulate(counts)], dtype=args[name].dtype, device=draw.device)
    return args | found | {"query_lengths": queries, "key_lengths": keys}


def _paged_attention(args: Args, draw: Draw) -> Args:
    """A few sequences of up to three blocks in a cache of one layer."""
    count, width, rows = min(len(args["query"]), 8), 3, args["segments"][0].shape[4]
    names = ("query", "key", "value", "cos", "sin")
    found: Args = {name: draw.normal(args[name], count, *args[name].shape[1:]) for name in names}
    kv_heads, size = args["key"].shape[1:]
    segments = [draw.normal(args["query"], 1, 2, kv_heads, count * width, rows, size)]
    found |= {"segments": segments, "addresses": block_addresses(segments), "layer": 0}
    found["table"] = draw.order(count * width).view(count, width).to(args["table"].dtype)
    found["before"] = draw.integers(width * rows, count).to(args["before"].dtype)
    return args | found


def _scaled_linear(args: Args, draw: Draw) -> Args:
    """The codes are those of the drawn weight."""
    found = draw.values(_fewer_rows(args, ROW_ARGS["scaled_linear"], draw), keep=("codes", "scale"))
    found["codes"], found["scale"] = rounded_rows(found["weight"], args["codes"].dtype)
    return found


def _quantised_linear(args: Args, draw: Draw) -> Args:
    """With the call's own weight, whose scales belong to its codes."""
    operator = "quantised_linear_backward" if "grad" in args else "quantised_linear"
    return draw.values(_fewer_rows(args, ROW_ARGS[operator], draw), keep=("scale",))


def _as_it_is(args: Args, draw: Draw) -> Args:
    """The user's call itself: image bytes and a planner's tables cannot be drawn."""
    return args


MAKERS: dict[str, Callable[[Args, Draw], Args]] = {
    **dict.fromkeys(("layer_norm_backward", "rms_norm_backward"), _norm_backward),
    **dict.fromkeys(("rope", "rope_backward"), _rope),
    **dict.fromkeys(("mix_rows", "mix_rows_backward"), _mix_rows),
    **dict.fromkeys(("patch_embed", "patch_embed_backward"), _patch_embed),
    **dict.fromkeys(("token_pack", "token_pack_backward"), _token_pack),
    **dict.fromkeys(("assemble_inputs", "assemble_inputs_backward"), _assemble_inputs),
    "image_tiles": _as_it_is,
    "packed_attention": _packed_attention,
    "paged_attention": _paged_attention,
    "scaled_linear": _scaled_linear,
    **dict.fromkeys(("quantised_linear", "quantised_linear_backward"), _quantised_linear),
}
