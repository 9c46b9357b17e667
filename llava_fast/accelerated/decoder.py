"""RMSNorm, SwiGLU and RoPE of a transformers decoder, replaced on instances by ops.

Only for Llama, Mistral and Qwen2, and only for modules of transformers' own classes. The forwards of three kinds of
modules are replaced (see `replacement`). Each checks at every call whether its op supports the call:

- RMSNorm: ops.rms_norm. For the backward pass it saves its input and one number per row; the stock module also saves
  the normalised rows (for 16-bit rows also a float32 copy of them).
- MLP: ops.swiglu between the three projections, which are called unchanged. It saves gate and up; the stock module also
  saves silu(gate). Without gradients the product is computed in place, in silu(gate)'s memory.
- Attention: ops.rope on queries and keys. transformers calls RoPE through a global name of the module, and patching it
  would affect every model of the process. Instead, a copy of the stock forward runs in which only this name is bound to
  ops.rope. It saves the same tensors and allocates one new tensor per operand (the stock code five).

An op runs if a backend has a fused kernel for it. On a CPU without a kernel, the references of rms_norm and rope run
for float32 inputs of at least models.fused.gate.LEAST values, where they are faster than the stock modules. The stock
path runs otherwise: for smaller inputs, in 16 bits and for swiglu's backward pass. Hooks on these modules and wrapped
or quantised projections keep working, since they are called."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from llava_fast.accelerated.replacement import is_replaced
from llava_fast.models.fused.gate import is_plain_parameter, is_untouched, is_worth_asking, takes_for_stock
from llava_fast.ops import rms_norm, rope, swiglu

FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}
SILU = {("torch.nn.modules.activation", "SiLU"), ("transformers.activations", "SiLUActivation")}
ROPE = "apply_rotary_pos_emb"
"""The global name through which transformers' attention calls RoPE."""
CACHES = ("cache", "past_key_values")
"""Names of the attention's cache parameter: since transformers 5.24, and before."""


def replacements(whole: nn.Module) -> Iterator[tuple[nn.Module, str, Callable[..., Any], str]]:
    """(module, method, replacement, description) for the decoder of a LLaVA; empty for an unknown decoder."""
    decoder = getattr(whole.model, "language_model", None)
    for module in decoder.modules() if decoder is not None else ():
        # Also match replaced modules whose class changed later (parametrize), so restore() finds them.
        kinds = type(module).__mro__ if is_replaced(module, "forward") else (type(module),)
        found = next((_PARTS[key] for kind in kinds if (key := (kind.__module__, kind.__name__)) in _PARTS), None)
        if found is not None and (len(kinds) > 1 or _is_stock(kinds[0], found[0])):
            yield module, "forward", *found


def _is_stock(kind: type[nn.Module], function: Callable) -> bool:
    """Whether a class still has transformers' forward, and a supported one."""
    known = function is not attention_forward or _with_rope(kind.forward) is not None
    return known and kind.forward.__module__ == kind.__module__


def rms_norm_forward(module: Any, hidden_states: Tensor) -> Tensor:
    if takes_for_stock("rms_norm", hidden_states) and is_plain_parameter(module.weight):
        return rms_norm(hidden_states, module.weight, module.variance_epsilon)
    return type(module).forward(module, hidden_states)


def _is_silu(module: nn.Module) -> bool:
    kind = type(module)
    return is_untouched(module, kind) and (kind.__module__, kind.__name__) in SILU


def mlp_forward(module: Any, x: Tensor) -> Tensor:
    if not is_worth_asking(x) or not _is_silu(module.act_fn):
        return type(module).forward(module, x)
    gate, up = module.gate_proj(x), module.up_proj(x)
    plain = type(gate) is type(up) is Tensor and gate.dtype == up.dtype
    if plain and takes_for_stock("swiglu", gate):
        return module.down_proj(swiglu(gate, up))
    gate = module.act_fn(gate)
    in_place = plain and not (gate.requires_grad or up.requires_grad)
    return module.down_proj(gate.mul_(up) if in_place else gate * up)


def attention_forward(module: Any, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
    hidden, forward = args[0] if args else kwargs.get("hidden_states"), type(module).forward
    if hidden is not None and takes_for_stock("rope", hidden):
        served = _with_rope(forward)
        if served is not None and not any(name in kwargs and name not in _parameters(served) for name in CACHES):
            forward = served
    return forward(module, *args, **kwargs)


def _rope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return rope(query, key, cos, sin)


@functools.cache
def _with_rope(forward: Callable) -> Callable | None:
    """A stock attention's forward with ops.rope bound to the name ROPE; None if it does not use that name. (Its
    decorators are dropped: they only translate an old name of the cache, see CACHES.)"""
    plain = inspect.unwrap(forward)
    if ROPE not in plain.__code__.co_names:
        return None
    names = {**plain.__globals__, ROPE: _rope}
    made = types.FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__, plain.__closure__)
    made.__kwdefaults__ = plain.__kwdefaults__
    return made


@functools.cache
def _parameters(function: Callable) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


_PARTS = {
    (f"transformers.models.{family}.modeling_{family}", name + part): (function, what)
    for family, name in FAMILIES.items()
    for part, function, what in (
        ("RMSNorm", rms_norm_forward, "the decoder's RMSNorm (one op where a backend fuses it, or rows are many)"),
        ("MLP", mlp_forward, "the decoder's SwiGLU (one op where a backend fuses it)"),
        ("Attention", attention_forward, "the decoder's RoPE (one op where a backend fuses it, or rows are many)"),
    )
}
