"""FLOPs of a training step, computed from a model's config, and the peak FLOP/s of GPUs.

A product of [m, k] and [k, n] takes 2 m k n FLOPs. Recomputation is not counted, following the definition of model
FLOPs utilisation (MFU) by Chowdhery et al. 2022 (PaLM). Peaks are for dense products, from NVIDIA's data sheets.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple, overload

import numpy as np
import torch

from llava_fast.inputs.plan.plan import TokenPlan
from llava_fast.models.config import LlavaConfig
from llava_fast.models.decoders.base import DecoderConfig
from llava_fast.models.vlm import LlavaModel
from llava_fast.train.parts import is_factor, part_of


class Gpu(NamedTuple):
    """A type of GPU: peak FLOP/s of dense bfloat16, TF32, and float32 (without tensor cores); memory in bytes."""

    bfloat16: float
    tf32: float
    float32: float
    memory: float


_GIB = 2**30
GPUS = {
    "A100-40G": Gpu(312e12, 156e12, 19.5e12, 40 * _GIB),
    "A100-80G": Gpu(312e12, 156e12, 19.5e12, 80 * _GIB),
    "H100": Gpu(989e12, 494e12, 67e12, 80 * _GIB),
    "H100-PCIe": Gpu(756e12, 378e12, 51e12, 80 * _GIB),
    "H200": Gpu(989e12, 494e12, 67e12, 141e9),
}


def known_gpu(device_name: str) -> Gpu | None:
    """A GPU by its CUDA device name ("NVIDIA A100-SXM4-80GB"); None if it is not in the table."""
    name = device_name.upper()
    if "H100" in name:
        return GPUS["H100-PCIe"] if "PCIE" in name else GPUS["H100"] if "NVL" not in name else None
    if "H200" in name:
        return GPUS["H200"] if "NVL" not in name else None
    if "A100" in name:
        return GPUS["A100-40G"] if "40GB" in name else GPUS["A100-80G"]
    return None


@overload
def peak_flops(gpu: Gpu, precision: str, tf32: bool = True) -> float: ...


@overload
def peak_flops(gpu: Gpu | None, precision: str, tf32: bool = True) -> float | None: ...


def peak_flops(gpu: Gpu | None, precision: str, tf32: bool = True) -> float | None:
    """Peak FLOP/s of matrix products in a recipe's precision; None for an unknown GPU."""
    if gpu is None:
        return None
    return gpu.bfloat16 if precision == "bfloat16" else gpu.tf32 if tf32 else gpu.float32


class Forward(NamedTuple):
    """FLOPs of one forward pass, split by what the backward pass may recompute."""

    tower: float  # products with weights
    tower_attention: float
    projector: float
    decoder: float  # products with weights
    decoder_attention: float
    head: float


def forward_flops(
    config: LlavaConfig,
    lengths: Iterable[int],
    tiles: int,
    supervised: int | None = None,
    projected: int | None = None,
    instruction: int = 0,
) -> Forward:
    """FLOPs of a forward pass over sequences of these lengths (decoder rows, including visual ones).

    tiles       number of image tiles for the tower.
    supervised  number of rows for the head; default: all.
    projected   number of rows for the projector; default: all rows of the tower.
    instruction  rows of text that the projector reads with all tiles.
    """
    lengths = list(lengths)
    rows, vision, decoder = sum(lengths), config.vision, config.decoder
    given = tiles * config.projected_per_tile
    return Forward(
        tower=vision.product_flops(tiles),
        tower_attention=vision.attention_flops(tiles),
        projector=2.0 * config.projector.matrix_size * (given if projected is None else projected)
        + 2.0 * config.projector.text_matrix_size * instruction,
        decoder=2.0 * rows * decoder.num_layers * decoder.layer_matrix_size,
        decoder_attention=_attention(decoder, lengths),
        head=2.0 * decoder.vocab_size * decoder.hidden_size * (rows if supervised is None else supervised),
    )


def step_flops(
    config: LlavaConfig,
    lengths: Iterable[int],
    tiles: int,
    trained: Collection[str],
    supervised: int | None = None,
    projected: int | None = None,
    adapters: int = 0,
    instruction: int = 0,
) -> float:
    """FLOPs of a training step, forward and backward, over sequences of these lengths.

    trained   parts with trained weights: "vision_tower", "projector", "decoder". A partly trained part counts as
              trained.
    adapters  number of weights in LoRA adapters of the decoder.
    Other arguments as in `forward_flops`. Parts upstream of every trained part run no backward. Frozen parts downstream
    of one compute input gradients but no weight gradients.
    """
    lengths = list(lengths)
    forward = forward_flops(config, lengths, tiles, supervised, projected, instruction)
    tower, projector, decoder = (part in trained for part in ("vision_tower", "projector", "decoder"))
    through_projector = tower or projector
    through_decoder = float(bool(through_projector or decoder or adapters))
    return (
        forward.tower * (1 + 2 * tower)
        + forward.tower_attention * (1 + 2 * tower)
        + forward.projector * (1 + projector + tower)
        + forward.projector * _after_first(config) * (projector and not tower)
        + (forward.decoder + forward.head) * (1 + through_decoder + decoder)
        + forward.decoder_attention * (1 + 2 * through_decoder)
        + 6.0 * sum(lengths) * adapters
    )


def sequence_flops(config: DecoderConfig, lengths: Iterable[int]) -> np.ndarray:
    """Forward FLOPs of the decoder's layers for each sequence: float64 [sequences]. Attention grows with the square of
    the length."""
    row = 2.0 * config.num_layers * config.layer_matrix_size
    return np.array([row * length + _attention(config, [length]) for length in map(int, lengths)], np.float64)


def _after_first(config: LlavaConfig) -> float:
    """Share of the projector's FLOPs after its first layer; these layers compute input gradients."""
    weights = config.projector.matrix_size
    return 1 - config.projector.first_matrix_size / weights if weights else 0.0


def _attention(config: DecoderConfig, lengths: list[int]) -> float:
    """FLOPs of both products of causal attention: each row with itself and the rows before it, or those in its
    window."""
    pairs = sum(config.pairs(layer, length) for layer in range(config.num_layers) for length in lengths)
    return 4.0 * config.num_heads * config.head_dim * pairs


class Utilisation:
    """Computes a trainer's model FLOPs utilisation (MFU).

    model: the model to train, already frozen; gpus: the number that share a step.
    """

    def __init__(self, model: LlavaModel, device: torch.device, precision: str, tf32: bool, gpus: int) -> None:
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.config = model.config
        self.trained = {part_of(name) for name in trained if not is_factor(name)}
        self.adapters = sum(parameter.numel() for name, parameter in trained.items() if is_factor(name))
        gpu = known_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        peak = peak_flops(gpu, precision, tf32)
        self.peak = None if peak is None else peak * gpus

    def flops(self, plan: TokenPlan) -> float:
        """FLOPs of training on one micro-batch."""
        supervised, projected = len(plan.column("supervised_row")), len(plan.column("kept"))
        told = int((plan.column("instruction") >= 0).sum()) if "instruction" in plan.sections else 0
        return step_flops(
            self.config, plan.lengths, plan.tower_tiles, self.trained, supervised, projected, self.adapters, told
        )

    def share(self, flops: float, seconds: float) -> float | None:
        """MFU of `flops`, over all processes, in `seconds`; None if the peak is unknown."""
        return None if self.peak is None else flops / (seconds * self.peak)
