"""Modules with weights in 8 or 4 bits: a Linear and a token embedding; which modules of a model are quantised, and how.

Their state dict has the names and shapes of compressed-tensors' format "pack-quantized" (ops.quantised_linear.packing).
`nn.Module.to` and the like move them, but never round a scale.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor, nn

from llava_fast.errors import QuantisationError
from llava_fast.models.fused import split_linears
from llava_fast.ops.quantised_linear import (
    SCHEMES,
    QuantisedWeight,
    check_scheme,
    dequantise,
    dequantise_rows,
    packing,
    quantise,
    quantised_product,
)

logger = logging.getLogger("llava_fast.quantised")


@dataclass(frozen=True)
class Quantisation:
    """How to quantise a model's weights. Norms, biases and the newline row are never quantised.

    scheme      of the Linears in the decoder's layers: "int8" or "int4".
    group       elements of a row that share a scale: 32, 64 or 128, for int8 also None (the whole row). Default: 32
                for int4, None for int8.
    symmetric   int4: False gives each group a zero point.
    head        "int8" (a scale for each row) or None: not quantised.
    embeddings  the same for the token embedding, which transformers and vLLM read only as None. Where head and
                embedding are one weight, it is quantised only if both are.
    tower       "int8" or None, for the Linears in the vision tower's layers.
    projector   "int8" or None, for the projector's Linears.

    A Linear of the decoder whose row length is not a multiple of the group gets int8 with a scale for each row. It is
    named in the log "llava_fast.quantised" and in saved files. Raises QuantisationError for unsupported combinations.
    """

    scheme: str = "int4"
    group: int | None = None
    symmetric: bool = True
    head: str | None = "int8"
    embeddings: str | None = None
    tower: str | None = None
    projector: str | None = None

    def __post_init__(self) -> None:
        if self.scheme == "int4" and self.group is None:
            object.__setattr__(self, "group", 32)
        check_scheme(self.scheme, self.group or 1, self.group, self.symmetric)
        for name in ("head", "embeddings", "tower", "projector"):
            if getattr(self, name) not in (None, "int8"):
                raise QuantisationError(f"{name} is {getattr(self, name)!r}: use 'int8' or None")

    @overload
    @classmethod
    def of(cls, asked: Quantisation | str) -> Quantisation: ...

    @overload
    @classmethod
    def of(cls, asked: Quantisation | str | None) -> Quantisation | None: ...

    @classmethod
    def of(cls, asked: Quantisation | str | None) -> Quantisation | None:
        """From a scheme's name, with the defaults of the rest. Raises QuantisationError for an unknown one."""
        if asked is None or isinstance(asked, Quantisation):
            return asked
        if asked not in SCHEMES:
            raise QuantisationError(
                f"quantize is {asked!r}: use {', '.join(map(repr, SCHEMES))}, None or a Quantisation(...)"
            )
        return cls(scheme=asked)


@dataclass(frozen=True)
class Rounding:
    """How one weight is quantised: arguments of `ops.quantised_linear.quantise`."""

    scheme: str
    group: int | None = None
    symmetric: bool = True

    def of(self, weight: Tensor) -> QuantisedWeight:
        return quantise(weight, self.scheme, self.group, self.symmetric)

    def bits(self, columns: int) -> float:
        """Bits per value, including its share of scale and zero point."""
        of_group = 32 if self.symmetric else 40
        return (8 if self.scheme == "int8" else 4) + of_group / (self.group or columns)


class Quantised(nn.Module):
    """A module that holds a QuantisedWeight: `codes`, `scale` (always float32) and `zero` or None.

    order  int64 [in] or None: the weight's column j belongs to element order[j] of the input (GPTQ's act-order).
    dtype  the compute dtype if the input does not determine it; follows `module.to(dtype)`.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    order: Tensor | None
    like: Tensor

    def __init__(self, weight: QuantisedWeight, dtype: torch.dtype, order: Tensor | None = None) -> None:
        super().__init__()
        like = torch.empty(0, dtype=dtype, device=weight.scale.device)
        tensors = {"codes": weight.codes, "scale": weight.scale, "zero": weight.zero, "order": order, "like": like}
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)  # a state dict has other names
        self.in_state_dict = True
        """Whether a state dict has the weight. Training checkpoints leave it out, like all frozen weights."""
        self.exact_inputs = False
        """Whether products take their inputs unrounded also where no gradient is needed. Training sets it, so that a
        policy and its reference, or a forward pass and its recomputation, are computed alike."""

    @property
    def quantised(self) -> QuantisedWeight:
        return QuantisedWeight.unchecked(self.codes, self.scale, self.zero)

    @property
    def dtype(self) -> torch.dtype:
        return self.like.dtype

    @property
    def device(self) -> torch.device:
        return self.scale.device

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [out, in] in floating point, its columns in the input's order; a copy."""
        weight = dequantise(self.quantised, dtype or self.dtype)
        return weight if self.order is None else weight[:, self.order.argsort()]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantised:
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != scale.dtype:  # rounded by .to(dtype)
            self.scale = scale.to(self.scale.device)
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.in_state_dict:
            destination.update({prefix + name: tensor for name, tensor in self.stored().items()})

    def _load_from_state_dict(
        self, entries: dict, prefix: str, metadata: dict, strict: bool, missing: list, unexpected: list, errors: list
    ) -> None:
        given = {name: entries.pop(prefix + name) for name in packing.NAMES if prefix + name in entries}
        needed = packing.NAMES[:2] if self.zero is None else (*packing.NAMES[:2], "weight_zero_point")
        if absent := [name for name in needed if name not in given]:
            missing += [prefix + name for name in absent]
        else:
            try:
                weight = packing.unpacked(given, self.quantised.shape)
            except QuantisationError as problem:
                errors.append(f"{prefix.rstrip('.')}: {problem}")
            else:
                for name, part in {"codes": weight.codes, "scale": weight.scale, "zero": weight.zero}.items():
                    setattr(self, name, None if part is None else part.to(self.device))
                self.order = None
        super()._load_from_state_dict(entries, prefix, metadata, strict, missing, unexpected, errors)

    def stored(self) -> dict[str, Tensor]:
        """The weight as compressed-tensors stores it. Raises QuantisationError for one with a column order."""
        if self.order is not None:
            raise QuantisationError(
                "the compressed-tensors format cannot store a weight with GPTQ's act-order (desc_act): keep the "
                "checkpoint it came from"
            )
        return packing.packed(self.quantised, self.dtype)


class QuantisedLinear(Quantised):
    """nn.Linear over a quantised weight: x [.., in] to [.., out] in x's dtype. Gradients flow to x and the bias."""

    bias: nn.Parameter | None

    def __init__(
        self,
        weight: QuantisedWeight,
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        order: Tensor | None = None,
    ) -> None:
        super().__init__(weight, dtype, order)
        self.bias = None if bias is None else bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)

    @property
    def in_features(self) -> int:
        return self.quantised.shape[1]

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def qweight(self) -> Tensor:
        """The codes, under the name by which PEFT finds a quantised layer's device."""
        return self.codes

    def forward(self, x: Tensor) -> Tensor:
        if self.order is not None:
            x = x.index_select(-1, self.order)
        return quantised_product(x, self.codes, self.scale, self.zero, self.bias, exact_inputs=self.exact_inputs)

    def extra_repr(self) -> str:
        return f"{_described(self)}, bias={self.bias is not None}"


class QuantisedEmbedding(Quantised):
    """nn.Embedding over a quantised table: ids [..] to rows [.., width] in the module's dtype."""

    def forward(self, ids: Tensor) -> Tensor:
        return dequantise_rows(self.quantised, ids, self.dtype)

    def project(self, hidden: Tensor) -> Tensor:
        """hidden [.., width] @ table.T, for a head that shares the table."""
        return quantised_product(hidden, self.codes, self.scale, self.zero, exact_inputs=self.exact_inputs)

    def extra_repr(self) -> str:
        return _described(self)


def _described(module: Quantised) -> str:
    weight = module.quantised
    out, columns = weight.shape
    group = "" if weight.group == columns else f", group={weight.group}"
    zeros = "" if weight.zero is None else ", zero points"
    return f"{columns}, {out}, {weight.scheme}{group}{zeros}"


def table_of(embedding: nn.Embedding | Quantised) -> Tensor:
    """The table that an embedding reads."""
    return embedding.codes if isinstance(embedding, Quantised) else embedding.weight


def like(module: nn.Embedding | nn.Linear | Quantised) -> Tensor:
    """A tensor with the dtype and device of an embedding's or a Linear's weight."""
    return module.like if isinstance(module, Quantised) else module.weight


def plan(model: nn.Module, quantisation: Quantisation) -> dict[str, Rounding]:
    """Module name -> how its weight is quantised, for a LlavaModel that may be on the meta device. Logs weights whose
    row length is not a multiple of the group.
    """
    asked = Rounding(quantisation.scheme, quantisation.group, quantisation.symmetric)
    whole_rows = Rounding("int8")
    config: Any = model.config  # a LlavaConfig
    decoder = config.decoder
    found: dict[str, Rounding] = {}
    undivided = []
    for name, linear in _linears(model, f"decoder.{decoder.layers_name}"):
        divides = asked.group is None or linear.in_features % asked.group == 0
        found[name] = asked if divides else whole_rows
        if not divides:
            undivided.append(f"{name} ({linear.in_features})")
    if undivided:
        more = f" and {len(undivided) - 4} more" if len(undivided) > 4 else ""
        logger.warning(
            "group %s does not divide the rows of %s%s: int8 with a scale for each row",
            asked.group,
            ", ".join(undivided[:4]),
            more,
        )
    tied = decoder.tie_embeddings
    if quantisation.embeddings and (quantisation.head or not tied):
        found[f"decoder.{decoder.embedding_name}"] = whole_rows
    if quantisation.head and not tied:
        found["decoder.lm_head"] = whole_rows
    for part, wanted in (("vision_tower", quantisation.tower), ("projector", quantisation.projector)):
        if wanted:
            found |= {name: whole_rows for name, _ in _linears(model, part)}
    return found


def _linears(model: nn.Module, part: str) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in model.get_submodule(part).named_modules(prefix=part):
        if type(module) is nn.Linear:
            yield name, module


def put(model: nn.Module, name: str, weight: QuantisedWeight, dtype: torch.dtype, order: Tensor | None = None) -> None:
    """Replace the model's Linear or embedding of that name by a quantised module, which keeps its bias."""
    parent, _, leaf = name.rpartition(".")
    old = model.get_submodule(name)
    if isinstance(old, nn.Embedding):
        new: Quantised = QuantisedEmbedding(weight, dtype, order)
    else:
        assert isinstance(old, nn.Linear)
        new = QuantisedLinear(weight, old.bias, dtype, order)
    setattr(model.get_submodule(parent), leaf, new.train(old.training))


def quantise_model(model: nn.Module, quantisation: Quantisation | str) -> nn.Module:
    """Quantise the modules of a LlavaModel in place, one weight at a time; returns it. Raises QuantisationError.

    Linears that were merged (models.fused.merge_linears) are split first, and stay so. A model loaded with `precision`
    is refused.
    """
    check_no_precision(model)
    split_linears(model)
    for name, rounding in plan(model, Quantisation.of(quantisation)).items():
        old = model.get_submodule(name)
        assert isinstance(old, (nn.Linear, nn.Embedding))
        put(model, name, rounding.of(old.weight.detach()), old.weight.dtype)
    return model


def check_no_precision(model: nn.Module) -> None:
    """Raise QuantisationError for a model whose Linears multiply in 8 bits (models.eight_bit)."""
    if any(isinstance(module, nn.Linear) and "codes" in module._buffers for module in model.modules()):
        raise QuantisationError("the model was loaded with precision: load it without, then quantise it")


def is_quantised(model: nn.Module) -> bool:
    return any(isinstance(module, Quantised) for module in model.modules())
