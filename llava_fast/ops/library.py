"""How an op becomes a `torch.library` operator, so that autograd, torch.compile and CUDA graphs take it as one node.

Registered by `Library.define` and `impl` rather than by the `custom_op` decorator, whose call costs several times as
much. The implementation chooses its backend when it runs, so a compiled graph still follows `use_backend`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

LIBRARY = torch.library.Library("llava_fast", "FRAGMENT")


def define(
    schema: str,
    run: Callable,
    fake: Callable,
    backward: Callable | None = None,
    save: Callable | None = None,
) -> Callable:
    """Register `run` for every device under `schema` and return the callable `torch.ops.llava_fast.<name>.default`.

    `fake` gives the outputs' shapes and dtypes. `save(ctx, inputs, output)` keeps what `backward(ctx, *gradients)`
    needs; without them the op has no gradient.
    """
    name = schema.split("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"llava_fast::{name}", fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"llava_fast::{name}", backward, setup_context=save, lib=LIBRARY)
    return getattr(torch.ops.llava_fast, name).default
