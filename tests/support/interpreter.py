"""Triton's interpreter, in which kernels run without a GPU."""

import numpy as np


def mend():
    """Let a comparison of two scalars be part of a mask. The interpreter gives the result the type of what it compared,
    so `(columns < width) & (kind == 0)` is a mask of int32, which Triton 3.9 refuses."""
    from triton.runtime.interpreter import InterpreterBuilder

    splat = InterpreterBuilder.create_splat

    def create_splat(self, ret_ty, arg):
        made = splat(self, ret_ty, arg)
        if arg.data.dtype == np.bool_:
            made.data = made.data.astype(np.bool_)
        return made

    InterpreterBuilder.create_splat = create_splat
