"""token_pack by csrc/pack: up to torch.get_num_threads() threads on the CPU, the current stream on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

import llava_fast._C as _C

CPU_SUMS = (torch.float32, torch.float64)
CUDA_SUMS = (torch.float32, torch.float16, torch.bfloat16)


def unfit(tensor: Tensor) -> str | None:
    """Why csrc cannot pack rows on this tensor's device; None if it can."""
    if tensor.device.type == "cpu" or (tensor.device.type == "cuda" and _C.has_cuda()):
        return None
    return f"csrc was not built for {tensor.device.type}, or there is no usable device (see llava-fast doctor)"


def unfit_sum(grad: Tensor) -> str | None:
    """Why csrc cannot sum these gradients; None if it can."""
    served = CUDA_SUMS if grad.device.type == "cuda" else CPU_SUMS
    if grad.dtype not in served:
        return f"it sums {', '.join(str(dtype) for dtype in served)} on {grad.device.type}, not {grad.dtype}"
    return unfit(grad)


def token_pack(source: Tensor, row: Tensor, embedding: Tensor, visual: Tensor, constant: Tensor) -> Tensor:
    out = embedding.new_empty(len(source), embedding.shape[1])
    pointers = [tensor.data_ptr() for tensor in (source, row, embedding, visual, constant, out)]
    _call("pack_rows", out, *pointers, len(out), _row_bytes(out))
    return out


def visual_gradient(grad: Tensor, visual_place: Tensor) -> Tensor:
    out = grad.new_empty(len(visual_place), grad.shape[1])
    _call("take_rows", out, grad.data_ptr(), visual_place.data_ptr(), out.data_ptr(), len(out), _row_bytes(out))
    return out


def embedding_gradient(
    grad: Tensor, text_row: Tensor, text_token: Tensor, text_segment: Tensor, vocabulary: int
) -> Tensor:
    out = grad.new_zeros(vocabulary, grad.shape[1])
    _sum(grad, text_row, text_segment, text_token, out, len(text_token), None)
    return out


def constant_gradient(grad: Tensor, constant_row: Tensor, constant_segment: Tensor, constants: int) -> Tensor:
    out = grad.new_empty(constants, grad.shape[1])
    scratch = None
    if grad.device.type == "cuda":
        size = (constants, _C.PACK_CONSTANT_PARTS, grad.shape[1])
        scratch = torch.empty(size, dtype=torch.float32, device=grad.device)
    _sum(grad, constant_row, constant_segment, None, out, constants, scratch)
    return out


def _sum(
    grad: Tensor,
    order: Tensor,
    first: Tensor,
    target: Tensor | None,
    out: Tensor,
    count: int,
    scratch: Tensor | None,
) -> None:
    pointers = [0 if t is None else t.data_ptr() for t in (grad, order, first, target, out)]
    dtype = str(grad.dtype).removeprefix("torch.")
    extra = [0 if scratch is None else scratch.data_ptr()] if grad.device.type == "cuda" else []
    _call("sum_segments", out, *pointers, count, grad.shape[1], dtype, *extra)


def _call(name: str, out: Tensor, *arguments) -> None:
    """Call the CPU function, or the CUDA one on the current stream. ops.library made the tensors' GPU current."""
    if out.device.type == "cpu":
        getattr(_C, name)(*arguments, torch.get_num_threads())
    else:
        getattr(_C, f"{name}_cuda")(*arguments, torch.cuda.current_stream().cuda_stream)


def _row_bytes(table: Tensor) -> int:
    return table.shape[1] * table.element_size()
