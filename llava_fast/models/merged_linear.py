"""Several Linear layers of one input as one matrix product, their weights laid end to end.

Only where backend "triton" is asked for: on a CPU one product of 3 x 1024 columns takes as long as three of 1024, and
no GPU has been measured.
"""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llava_fast.models.modules import is_plain
from llava_fast.ops import backend


class MergingModule(nn.Module):
    """A module that may run Linears of its own as one.

    What is joined of frozen Linears is kept for the next call. It lies outside the module, so that no state dict,
    deepcopy or pickle has it, and is made anew once a weight is another tensor, lies elsewhere or was changed in
    place, or a part of this module was replaced or moved. One change PyTorch does not tell of: values written through
    `weight.data`.
    """

    def run_linears(self, x: Tensor, *linears: nn.Module) -> tuple[Tensor, ...]:
        """The results of `linears` for one x [..., in features]: by one product if all are plain, else (or when
        torch.compile traces) by their calls."""
        if torch.compiler.is_compiling() or backend.requested() != "triton" or not _can_be_joined(linears):
            _forget(self)
            return tuple(linear(x) for linear in linears)
        weights, biases = [linear.weight for linear in linears], [linear.bias for linear in linears]
        parts = weights if biases[0] is None else weights + biases
        captured = x.is_cuda and torch.cuda.is_current_stream_capturing()  # and replayed when what is kept may be gone
        if captured or any(part.requires_grad or part.is_inference() for part in parts):
            _forget(self)
            weight, bias = _join(weights, biases)
        else:
            weight, bias = self._kept(parts, weights, biases)
        return F.linear(x, weight, bias).split([len(part) for part in weights], dim=-1)

    def _kept(self, parts: list[Tensor], weights: list[Tensor], biases: list) -> tuple[Tensor, Tensor | None]:
        state = [(id(part), part._version, part.data_ptr(), part.dtype) for part in parts]
        joined = _joined.get(self)
        if joined is None or joined.state != state:
            with torch.inference_mode(False), torch.no_grad():  # what inference makes, training may not read
                joined = _joined[self] = Joined(parts, state, *_join(weights, biases))
        return joined.weight, joined.bias

    def _apply(self, *args, **options):
        _forget(self)
        return super()._apply(*args, **options)

    def __setattr__(self, name: str, value) -> None:
        _forget(self)
        super().__setattr__(name, value)


class Joined(NamedTuple):
    parts: list[Tensor]  # held, so that their ids stay theirs
    state: list[tuple]
    weight: Tensor
    bias: Tensor | None


_joined: WeakKeyDictionary[MergingModule, Joined] = WeakKeyDictionary()


def _can_be_joined(linears: tuple[nn.Module, ...]) -> bool:
    """Whether all are plain Linears, of ordinary parameters (none sharded or quantised), all or none with a bias."""
    return (
        all(is_plain(linear, nn.Linear) for linear in linears)
        and all(type(linear.weight) is nn.Parameter for linear in linears)
        and {type(linear.bias) for linear in linears} in ({nn.Parameter}, {type(None)})
    )


def _join(weights: list[Tensor], biases: list) -> tuple[Tensor, Tensor | None]:
    return torch.cat(weights), None if biases[0] is None else torch.cat(biases)


def _forget(module: MergingModule) -> None:
    if not torch.compiler.is_compiling() and _joined:
        _joined.pop(module, None)
