"""Fused ops in place of several modules: one gate decides, and a file for each group of ops consults it."""

from llava_fast.models.fused.gate import is_plain, is_plain_parameter, is_untouched, takes
from llava_fast.models.fused.linears import (
    MergedLinear,
    MergesLinears,
    activated,
    applied,
    gated,
    merge_linears,
    separate_parameters,
    split_linears,
)
from llava_fast.models.fused.norms import RMSNorm, add_norm, norm_norm
from llava_fast.models.fused.rotary import rotated

__all__ = [
    "MergedLinear",
    "MergesLinears",
    "RMSNorm",
    "activated",
    "add_norm",
    "applied",
    "gated",
    "is_plain",
    "is_plain_parameter",
    "is_untouched",
    "merge_linears",
    "norm_norm",
    "rotated",
    "separate_parameters",
    "split_linears",
    "takes",
]
