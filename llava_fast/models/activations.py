"""Activation functions by transformers' names."""

from llava_fast.ops.activations import ACTIVATIONS

__all__ = ["ACTIVATIONS"]
