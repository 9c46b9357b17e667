"""Where weights lie in memory."""

from __future__ import annotations

from torch import Tensor

import llava_fast._C as _C


def in_huge_pages(tensor: Tensor) -> Tensor:
    """The tensor, which must not have been written yet: on a CPU in pages of 2 MiB, where the system gives them.
    A weight is read up to a third faster from those."""
    if tensor.is_cpu:
        _C.prefer_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor
