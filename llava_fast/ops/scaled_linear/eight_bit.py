"""Products of operands in 8 bits by PyTorch (cuBLASLt and CUTLASS on CUDA): torch._int_mm sums int8 exactly in int32,
torch._scaled_mm sums float8_e4m3fn in float32."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from llava_fast.ops.rounding import rounded_rows

MULTIPLE = 16  # of both sizes of the weight
FEW = 16  # rows that torch._int_mm refuses on CUDA
LEAST = {torch.int8: (8, 0), torch.float8_e4m3fn: (9, 0)}  # compute capability; below 9.0 float8 has no scales by row


@functools.cache
def unfit_device(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a device has no 8-bit products of a code dtype; None if it has. Tries one."""
    if device.type not in ("cuda", "cpu"):
        return f"it runs on CUDA and on a CPU, not on {device.type}"
    if device.type == "cuda":
        least, found = LEAST[dtype], torch.cuda.get_device_capability(device)
        if torch.version.hip is not None:
            return "it needs an NVIDIA GPU"
        if found < least:
            return f"it needs compute capability {least[0]}.{least[1]}, this GPU has {found[0]}.{found[1]}"
    try:
        codes = torch.ones(32, 32, device=device).to(dtype)
        scaled_linear(torch.ones(32, 32, dtype=torch.bfloat16, device=device), codes, codes.float()[:, :1], None)
    except (RuntimeError, AttributeError) as error:
        return f"torch {torch.__version__} has no such product here ({' '.join(str(error).split())[:100]})"
    return None


def unfit(x: Tensor, codes: Tensor) -> str | None:
    """Why this call has no 8-bit product; None if it has."""
    out, columns = codes.shape
    if out % MULTIPLE or columns % MULTIPLE:
        return f"a weight of {out} x {columns} is not of multiples of {MULTIPLE}"
    if x.is_cuda and x.shape[:-1].numel() <= FEW:
        return f"on CUDA it takes more than {FEW} rows"
    if x.is_cuda and x.dtype != torch.bfloat16 and codes.dtype == torch.float8_e4m3fn:
        return f"on CUDA float8 products are bfloat16, x is {x.dtype}"
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"it takes bfloat16, float16 and float32, x is {x.dtype}"
    return unfit_device(x.device, codes.dtype)


def scaled_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x [n, in] times codes [out, in] with scale [out, 1], plus bias, in x's dtype."""
    own, own_scale = rounded_rows(x.contiguous(), codes.dtype)  # CUDA's products take rows alone
    if codes.dtype == torch.int8:
        products = torch._int_mm(own, codes.t()) * own_scale  # float32
        if bias is None:
            return (products * scale.t()).to(x.dtype)
        return torch.addcmul(bias.float(), products, scale.t()).to(x.dtype)
    return torch._scaled_mm(own, codes.t(), own_scale, scale.t().contiguous(), bias=bias, out_dtype=x.dtype)
