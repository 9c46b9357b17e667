"""RMSNorm, SwiGLU and RoPE of a transformers decoder, replaced by instance where an op serves the call.

Of Llama, Mistral and Qwen2 only, and only modules of transformers' own classes. Forwards of three kinds of module are
replaced (see `replacement`), and each asks at every call whether it may:

- RMSNorm: ops.rms_norm. For the backward pass it keeps its input and a number for each row, where the stock one keeps
  the normalised rows too (for half-precision rows also a float32 copy of them);
- MLP: ops.swiglu between the three projections, which are called as they are. It keeps gate and up, where the stock one
  keeps silu(gate) too. Without gradients the product is made in silu(gate)'s own memory;
- attention: ops.rope on queries and keys. transformers calls RoPE by a module's global name, and a patch of that would
  reach every model of the process; so the attention's forward is stated anew, on the same attention interface. It
  keeps nothing more or less, but makes one new tensor of each where the stock one makes five.

An op is taken where a backend fuses it. On a CPU, where no kernel serves, the references of rms_norm and rope are
faster than the stock modules for float32 from models.fused.gate.LEAST values on; below that, in half precision, and for
swiglu's backward pass, they are not, and the stock path runs. Hooks on these modules, and wrapped or quantised
projections, work as ever: they are called.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from llava_fast.integrations.replacement import is_replaced
from llava_fast.models.fused.gate import is_plain_parameter, is_untouched, is_worth_asking, takes_for_stock
from llava_fast.ops import rms_norm, rope, swiglu

FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}
SILU = {("torch.nn.modules.activation", "SiLU"), ("transformers.activations", "SiLUActivation")}
ATTENTION = ("hidden_states", "position_embeddings", "attention_mask", "past_key_values", "kwargs")
"""Parameters of the attention that is stated anew here; one with others is left as it is."""


def replacements(whole: nn.Module) -> Iterator[tuple[nn.Module, str, Callable[..., Any], str]]:
    """(module, method, function, what it does in words) for the decoder of a LLaVA; nothing for one that is unknown."""
    decoder = getattr(whole.model, "language_model", None)
    for module in decoder.modules() if decoder is not None else ():
        # One that was replaced and has changed its class since (a parametrisation) is still to be found and restored.
        kinds = type(module).__mro__ if is_replaced(module, "forward") else (type(module),)
        found = next((_PARTS[key] for kind in kinds if (key := (kind.__module__, kind.__name__)) in _PARTS), None)
        if found is not None and (len(kinds) > 1 or _is_stock(kinds[0], found[0])):
            yield module, "forward", *found


def _is_stock(kind: type[nn.Module], function: Callable) -> bool:
    """Whether a class has the forward that transformers gave it, and one that is known here."""
    known = function is not attention_forward or tuple(inspect.signature(kind.forward).parameters)[1:] == ATTENTION
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


def attention_forward(
    module: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    past_key_values=None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    if position_embeddings is None or not takes_for_stock("rope", hidden_states):
        given = (position_embeddings, attention_mask, past_key_values)
        return type(module).forward(module, hidden_states, *given, **kwargs)
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    batch_and_rows = hidden_states.shape[:-1]
    query, key, value = (
        project(hidden_states).view(*batch_and_rows, -1, module.head_dim).transpose(1, 2)
        for project in (module.q_proj, module.k_proj, module.v_proj)
    )
    query, key = rope(query, key, *position_embeddings)
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, module.layer_idx)
    family = _family(module)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(
        module.config._attn_implementation, sys.modules[family].eager_attention_forward
    )
    if family.endswith("mistral"):
        kwargs["sliding_window"] = getattr(module.config, "sliding_window", None)
    elif family.endswith("qwen2"):
        kwargs["sliding_window"] = module.sliding_window
    dropout = module.attention_dropout if module.training else 0.0
    out, weights = attend(module, query, key, value, attention_mask, dropout=dropout, scaling=module.scaling, **kwargs)
    return module.o_proj(out.reshape(*batch_and_rows, -1).contiguous()), weights


def _family(module: nn.Module) -> str:
    """The name of the Python module that an attention's class comes from."""
    return next(kind.__module__ for kind in type(module).__mro__ if (kind.__module__, kind.__name__) in _PARTS)


_PARTS = {
    (f"transformers.models.{family}.modeling_{family}", name + part): (function, what)
    for family, name in FAMILIES.items()
    for part, function, what in (
        ("RMSNorm", rms_norm_forward, "the decoder's RMSNorm (one op where a backend fuses it, or rows are many)"),
        ("MLP", mlp_forward, "the decoder's SwiGLU (one op where a backend fuses it)"),
        ("Attention", attention_forward, "the decoder's RoPE (one op where a backend fuses it, or rows are many)"),
    )
}
