"""Lower bounds on the time of a stage (roofline model), from the floating-point operations and memory traffic of a
LlavaConfig.

A phase takes at least max(flops / measured flops per second, bytes / measured bytes per second). The times of phases
are added. Bytes count each weight once per phase, and the phase's inputs and outputs (tiles, cached keys and values,
logits). Intermediate activations may stay in caches and are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.machine import Ceilings
from llava_fast.models.config import LlavaConfig
from llava_fast.models.decoders.base import DecoderConfig
from llava_fast.models.towers.base import TowerConfig


@dataclass(frozen=True)
class Phase:
    flops: float
    bytes: float


@dataclass(frozen=True)
class Floor:
    """Consecutive phases. Phase i runs `repeats[i]` times."""

    phases: tuple[Phase, ...]

    def seconds(self, ceilings: Ceilings) -> float:
        return sum(max(_arithmetic(phase, ceilings), _traffic(phase, ceilings)) for phase in self.phases)

    def bound(self, ceilings: Ceilings) -> str:
        """Return what bounds most of the time: "arithmetic" or "memory"."""
        arithmetic = sum(
            _arithmetic(phase, ceilings)
            for phase in self.phases
            if _arithmetic(phase, ceilings) > _traffic(phase, ceilings)
        )
        return "arithmetic" if arithmetic > self.seconds(ceilings) / 2 else "memory"


@dataclass(frozen=True)
class Sizes:
    """The sizes of a batch: tiles, projected ViT rows, decoder rows of each sequence, rows with logits."""

    tiles: int
    kept: int
    lengths: tuple[int, ...]
    logits: int


def preprocess_floor(pixels: int, tile_values: int) -> Floor:
    """Read every uint8 pixel once, write every tile value once. Arithmetic is not counted, because the ceiling of
    integer operations is not measured."""
    return Floor((Phase(0, 3 * pixels + tile_values),))


def encode_floor(config: LlavaConfig, sizes: Sizes, itemsize: int) -> Floor:
    rows = sum(sizes.lengths)
    flops = vision_flops(config.vision, sizes.tiles) + 2 * sizes.kept * config.projector.matrix_size
    weights = vision_weights(config.vision) + config.projector.matrix_size
    pixels = sizes.tiles * 3 * config.vision.image_size**2
    return Floor((Phase(flops, pixels + itemsize * (weights + 2 * rows * config.decoder.hidden_size)),))


def prefill_floor(config: LlavaConfig, sizes: Sizes, itemsize: int) -> Floor:
    """Encoding, the decoder over every row, and the logits."""
    decoder = config.decoder
    pairs = sum(n * (n + 1) // 2 for n in sizes.lengths)
    rows = sum(sizes.lengths)
    flops = decoder_flops(decoder, rows, pairs) + head_flops(decoder, sizes.logits)
    moved = decoder_weights(decoder) + head_weights(decoder) + rows * cache_values(decoder)
    return Floor((*encode_floor(config, sizes, itemsize).phases, Phase(flops, itemsize * moved)))


def text_prefill_floor(decoder: DecoderConfig, rows: int, batch: int, itemsize: int, weight_itemsize: float) -> Floor:
    """The decoder over `rows` rows of each sequence and the logits of the last. Arithmetic is as in decode_floor."""
    flops = decoder_flops(decoder, batch * rows, batch * rows * (rows + 1) // 2) + head_flops(decoder, batch)
    weights = decoder_weights(decoder) + head_weights(decoder)
    return Floor((Phase(flops, weight_itemsize * weights + itemsize * batch * rows * cache_values(decoder)),))


def decode_floor(
    decoder: DecoderConfig, context: int, batch: int, tokens: int, itemsize: int, weight_itemsize: float | None = None
) -> Floor:
    """`tokens` steps of one row per sequence. Each reads every weight and the cache. `weight_itemsize` is the size of
    quantised weights in bytes. Their arithmetic is counted in the activation dtype, though int8 products can be
    faster."""
    if weight_itemsize is None:
        weight_itemsize = itemsize
    return Floor(tuple(_step(decoder, context + step, batch, itemsize, weight_itemsize) for step in range(tokens)))


def generate_floor(
    config: LlavaConfig, sizes: Sizes, tokens: int, itemsize: int, weight_itemsize: float | None = None
) -> Floor:
    """Prefill (first token) and decoding steps (the rest). Image preprocessing takes about 0.1 % and is not counted.
    `weight_itemsize` is as in decode_floor. Prefill is counted in the activation dtype."""
    context, batch = max(sizes.lengths), len(sizes.lengths)
    steps = decode_floor(config.decoder, context, batch, tokens - 1, itemsize, weight_itemsize)
    return Floor((*prefill_floor(config, sizes, itemsize).phases, *steps.phases))


def train_floor(config: LlavaConfig, sizes: Sizes, itemsize: int) -> Floor:
    """The forward pass of a frozen tower, and forward and backward passes of the rest (backward: twice the operations),
    with logits of supervised rows only. Both passes read the weights, and gradients are written."""
    decoder = config.decoder
    pairs = sum(n * (n + 1) // 2 for n in sizes.lengths)
    trained = 2 * sizes.kept * config.projector.matrix_size
    trained += decoder_flops(decoder, sum(sizes.lengths), pairs) + head_flops(decoder, sizes.logits)
    flops = vision_flops(config.vision, sizes.tiles) + 3 * trained
    weights = config.projector.matrix_size + decoder_weights(decoder) + head_weights(decoder)
    return Floor((Phase(flops, itemsize * (vision_weights(config.vision) + 3 * weights)),))


def vision_weights(vision: TowerConfig) -> int:
    """The number of weights of the required layers, without biases and norms."""
    return vision.layers_needed * vision.layer_matrix_size + 3 * vision.patch_size**2 * vision.hidden_size


def vision_flops(vision: TowerConfig, tiles: int) -> float:
    return vision.product_flops(tiles) + vision.attention_flops(tiles)


def decoder_weights(decoder: DecoderConfig) -> int:
    return decoder.num_layers * decoder.layer_matrix_size


def decoder_flops(decoder: DecoderConfig, rows: int, pairs: int) -> float:
    """`pairs` is the number of query-key pairs in the causal mask, over all sequences."""
    attention = 2 * decoder.num_layers * decoder.num_heads * decoder.head_dim * pairs
    return 2.0 * (rows * decoder_weights(decoder) + attention)


def head_weights(decoder: DecoderConfig) -> int:
    return decoder.vocab_size * decoder.hidden_size


def head_flops(decoder: DecoderConfig, rows: int) -> float:
    return 2.0 * rows * head_weights(decoder)


def cache_values(decoder: DecoderConfig) -> int:
    """The number of cached values per row."""
    return 2 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim


def _step(decoder: DecoderConfig, context: int, batch: int, itemsize: int, weight_itemsize: float) -> Phase:
    flops = decoder_flops(decoder, batch, batch * (context + 1)) + head_flops(decoder, batch)
    weights = decoder_weights(decoder) + head_weights(decoder)
    return Phase(flops, weight_itemsize * weights + itemsize * batch * context * cache_values(decoder))


def _arithmetic(phase: Phase, ceilings: Ceilings) -> float:
    return phase.flops / ceilings.flops_per_second


def _traffic(phase: Phase, ceilings: Ceilings) -> float:
    return phase.bytes / ceilings.bytes_per_second
