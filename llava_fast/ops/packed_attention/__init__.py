"""packed_attention: causal attention of sequences of any lengths that lie end to end."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import Tensor

from llava_fast.ops import backend, library
from llava_fast.ops.packed_attention import forms, reference
from llava_fast.ops.selection import tables
from llava_fast.ops.selection.decision import current

logger = logging.getLogger("llava_fast.models")
OP = "packed_attention"
FORMS = {"varlen": forms.flash, "xformers": forms.xformers, "padded": forms.padded}
backend.register(OP, "reference", "any device: a loop over the sequences")
backend.register(OP, "varlen", "CUDA, float16 and bfloat16, torch 2.13", default_on=("cuda",))
backend.register(OP, "xformers", "CUDA, float16 and bfloat16, with xformers", default_on=("cuda",))
backend.register(OP, "padded", "CUDA and CPU")
library.LIBRARY.define(
    "packed_attention(Tensor query, Tensor key, Tensor value, Tensor queries, Tensor keys, int[] query_lengths,"
    " int[] key_lengths, int window) -> Tensor"
)  # for the names that selection reads; autograd goes through the forms' own operators


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Tensor,
    keys: Tensor,
    query_lengths: Sequence[int],
    key_lengths: Sequence[int],
    window: int | None = None,
) -> Tensor:
    """[R, H, D]: each query attends to its sequence's keys up to its own position, of those to the last `window`.

    query [R, H, D]; key, value [T, K, D]; H a multiple of K. queries, keys: int32 [S + 1] on the device, where each
    sequence's rows begin and end; query_lengths, key_lengths: the same on the host, as numbers of rows. A sequence's
    queries are the last of its positions. Gradients flow to query, key and value.
    The form is selection's verdict (proven and timed forward); without one, varlen, else xformers, else a loop over
    the sequences. So is it for a backend that is requested by name and that this op does not have.
    FLOPs: 4 * D * H for each pair of a query and a key that it attends to. Minimum bytes: inputs and output once.
    """
    args = query, key, value, queries, keys, list(query_lengths), list(key_lengths), window or 0
    if backend.requested() in ("triton", "native"):
        return _form(backend.first_fit(OP, query.device.type, _unfit(*args)), args)
    return _selected(*args)


def may_choose(device_type: str) -> bool:
    """Whether selection has, or may find, a verdict for such devices."""
    table = tables.settings().table_on(device_type) if backend.requested() == "auto" else None
    return table is not None and (table.is_asked or table.serves(OP))


def _unfit(query, key, value, queries, keys, query_lengths, key_lengths, window) -> dict[str, str | None]:
    """Why a form cannot run for this call."""
    why = "it needs CUDA" if query.device.type != "cuda" else None
    if why is None and query.element_size() != 2:
        why = f"it takes float16 and bfloat16, not {query.dtype}"
    return {
        "varlen": why or forms.flash_unfit(query.device),
        "xformers": why or forms.xformers_unfit(query),
        "padded": forms.padded_unfit(query_lengths, key_lengths),
    }


def _run(*args) -> Tensor:
    return _form(backend.choose(OP, args[0].device.type, _unfit(*args)), args)


def _form(name: str, args: tuple) -> Tensor:
    if name == "reference":
        return reference.packed_attention(*args[:3], *args[5:])
    try:
        return FORMS[name](*args)
    except (ImportError, NotImplementedError) as error:
        decision = current()
        if name != "xformers" or (decision is not None and decision.is_trial):
            raise
        # Its kernels are built for some GPUs, dtypes and sizes.
        reason = forms.refused[forms.case_of(args[0])] = f"xformers refused: {' '.join(str(error).split())}"
        logger.warning("%s; attention runs sequence by sequence", reason)
        return _form("reference", args)


_selected = library.selected(OP, _run)
