"""Linear layers as one product: with the activation after them, or with other Linears of the same input."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from llava_fast.models.fused.gate import is_plain, takes
from llava_fast.ops import linear as linear_op
from llava_fast.ops import linear_act, swiglu
from llava_fast.ops.activations import ACTIVATIONS
from llava_fast.ops.linear import native

L = TypeVar("L", bound=nn.Linear)


def activated(x: Tensor, linear: nn.Module, activation: str) -> Tensor:
    """activation(linear(x)); `activation` is a name of ops.activations."""
    if isinstance(linear, nn.Linear) and takes("linear_act", x, nn.Linear, linear):
        return linear_act(x, linear.weight, linear.bias, activation)
    return ACTIVATIONS[activation](linear(x))


def applied(linear: nn.Module, x: Tensor) -> Tensor:
    """linear(x), by ops.linear for many rows of bfloat16 on a CPU that multiplies them slowly."""
    return linear_op(x, linear.weight, linear.bias) if _by_op(linear, x, nn.Linear) else linear(x)


def _by_op(linear: nn.Module, x: Tensor, kind: type[L]) -> TypeGuard[L]:
    """Whether ops.linear multiplies. In training never, so that passes without gradients compute what others do."""
    return (
        not torch.compiler.is_compiling()  # first: a traced graph must not be specialised to the number of rows
        and x.is_cpu
        and x.dtype == native.DTYPE
        and x.shape[:-1].numel() > native.MAX_ROWS
        and not (linear.training or torch.is_grad_enabled())
        and isinstance(linear, kind)
        and takes("linear", x, kind, linear)
        and native.unfit(x, linear.weight, linear.bias) is None
    )


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (SwiGLU, Shazeer 2020)."""
    return swiglu(gate, up) if takes("swiglu", gate) else nn.functional.silu(gate) * up


class MergedLinear(nn.Linear):
    """Several Linears of one input as one product: x [..., in] to a tuple of their results, which are views.

    It owns one weight [sum of out, in] and one bias, in the order of `names`, the Linears that it replaces. Its state
    dict has their entries, not its own, so that checkpoints look the same with and without it.
    """

    def __init__(self, linears: dict[str, nn.Linear]) -> None:
        first = next(iter(linears.values()))
        options: dict[str, Any] = {
            "bias": first.bias is not None,
            "device": first.weight.device,
            "dtype": first.weight.dtype,
        }
        sizes = tuple(linear.out_features for linear in linears.values())
        super().__init__(first.in_features, sum(sizes), **options)
        self.names, self.sizes = tuple(linears), sizes
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                torch.cat([getattr(linear, name) for linear in linears.values()], out=parameter)
                parameter.requires_grad_(getattr(first, name).requires_grad)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]  # a tuple, unlike a Linear
        return super().forward(x).split(self.sizes, dim=-1)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        for name, rows in self.separated():
            destination[_parent(prefix) + name] = rows if keep_vars else rows.detach()

    def separated(self) -> Iterator[tuple[str, Tensor]]:
        """("q_proj.weight", its rows of the weight) and so on; views."""
        for name, parameter in self.named_parameters():
            for linear, rows in zip(self.names, parameter.split(self.sizes), strict=True):
                yield f"{linear}.{name}", rows


def _parent(prefix: str) -> str:
    """The prefix of the module that holds the one of this prefix: "layers.0.mlp." of "layers.0.mlp.gate_up_proj."."""
    return prefix[:-1].rpartition(".")[0] + "." if "." in prefix[:-1] else ""


class MergesLinears(nn.Module):
    """A module with Linears that read the same input and can be merged into one MergedLinear: `merges` maps its name to
    theirs, as {"qkv_proj": ("q_proj", "k_proj", "v_proj")}. `by_op`: `applied` runs them, as a decoder's.
    """

    merges: ClassVar[dict[str, tuple[str, ...]]] = {}
    by_op: ClassVar[bool] = False

    def project(self, x: Tensor, name: str) -> tuple[Tensor, ...]:
        """The results for x of the Linears `merges[name]`, by one product where they are merged."""
        if (merged := self._modules.get(name)) is None:
            linears = [self._linear(part) for part in self.merges[name]]
            return tuple(applied(linear, x) if self.by_op else linear(x) for linear in linears)
        if self.by_op and _by_op(merged, x, MergedLinear):
            return linear_op(x, merged.weight, merged.bias).split(merged.sizes, dim=-1)
        return merged(x)

    def _linear(self, name: str) -> nn.Module:
        found = self._modules[name]
        assert found is not None
        return found

    def _load_from_state_dict(self, entries: dict, prefix: str, *rest) -> None:
        for name in self.merges:
            merged = self._modules.get(name)
            for leaf in merged._parameters if merged is not None else ():
                keys = [f"{prefix}{part}.{leaf}" for part in self.merges[name]]
                if all(key in entries for key in keys):
                    entries[f"{prefix}{name}.{leaf}"] = torch.cat([entries.pop(key) for key in keys])
        super()._load_from_state_dict(entries, prefix, *rest)


def merge_linears(model: nn.Module) -> nn.Module:
    """Replace Linears that read the same input by a MergedLinear, for inference; returns the model.

    Linears that are wrapped, hooked or sharded, or of which only some have a bias, stay as they are. One module's
    weights are copied at a time, and the separate ones freed.
    """
    for module in _mergers(model):
        for name, parts in module.merges.items():
            there = {part: module._modules.get(part) for part in parts}
            linears = {part: linear for part, linear in there.items() if isinstance(linear, nn.Linear)}
            if len(linears) == len(parts) and _fit_together(list(linears.values())):
                merged = MergedLinear(linears).train(module.training)
                for part in parts:
                    delattr(module, part)
                setattr(module, name, merged)
    return model


def split_linears(model: nn.Module) -> nn.Module:
    """Undo merge_linears: each Linear gets a weight with its own storage, as training and adapters expect."""
    for module in _mergers(model):
        for name in module.merges:
            if not isinstance(merged := module._modules.get(name), MergedLinear):
                continue
            delattr(module, name)
            made: dict[str, dict[str, nn.Parameter]] = {}
            for key, rows in merged.separated():
                linear, _, leaf = key.rpartition(".")
                made.setdefault(linear, {})[leaf] = nn.Parameter(rows.detach().clone(), rows.requires_grad)
            for linear, parameters in made.items():
                new = nn.Linear(merged.in_features, len(parameters["weight"]), "bias" in parameters, device="meta")
                for leaf, parameter in parameters.items():
                    setattr(new, leaf, parameter)
                setattr(module, linear, new.train(module.training))
    return model


def separate_parameters(model: nn.Module) -> dict[str, Tensor]:
    """All parameters by the names they have in a model without merged Linears; those of merged ones are views."""
    found: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        parent = f"{prefix}." if prefix else ""
        if isinstance(module, MergedLinear):
            found |= {_parent(parent) + name: rows for name, rows in module.separated()}
        else:
            found |= {parent + name: parameter for name, parameter in module.named_parameters(recurse=False)}
    return found


def _mergers(model: nn.Module) -> list[MergesLinears]:
    return [module for module in model.modules() if isinstance(module, MergesLinears)]


def _fit_together(linears: list[nn.Linear]) -> bool:
    """Whether all are plain Linears with the same input size, dtype, device and requires_grad, all or none with a
    bias.
    """
    if not all(is_plain(linear, nn.Linear) for linear in linears):
        return False
    kinds = {(part.dtype, part.device, part.requires_grad) for linear in linears for part in linear.parameters()}
    biases = sum(linear.bias is not None for linear in linears)
    return len(kinds) == 1 and biases in (0, len(linears)) and len({linear.in_features for linear in linears}) == 1
