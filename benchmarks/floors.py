"""The least work a stage can do: floating-point operations and bytes that must move, from a LlavaConfig alone.

A phase takes at least max(flops / measured flops a second, bytes / measured bytes a second); phases add up. Bytes
count each weight once a phase, and what a phase must read and write (tiles, cached keys and values, logits);
activations in between may stay in caches, so they cost nothing here. A floor is a bound, not a promise.
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
    """Phases in turn; `repeats[i]` times phase i."""

    phases: tuple[Phase, ...]

    def seconds(self, ceilings: Ceilings) -> float:
        return sum(max(_arithmetic(phase, ceilings), _traffic(phase, ceilings)) for phase in self.phases)

    def bound(self, ceilings: Ceilings) -> str:
        """Which ceiling most of the floor's time is spent at: "arithmetic" or "memory"."""
        arithmetic = sum(
            _arithmetic(phase, ceilings)
            for phase in self.phases
            if _arithmetic(phase, ceilings) > _traffic(phase, ceilings)
        )
        return "arithmetic" if arithmetic > self.seconds(ceilings) / 2 else "memory"


@dataclass(frozen=True)
class Sizes:
    """A batch in numbers: tiles, projected (kept) ViT rows, decoder rows of each sequence, rows that get logits."""

    tiles: int
    kept: int
    lengths: tuple[int, ...]
    logits: int


def preprocess_floor(pixels: int, tile_values: int) -> Floor:
    """Read every uint8 pixel once, write every tile value once. Arithmetic is not counted: integer multiply-adds have
    no ceiling here."""
    return Floor((Phase(0, 3 * pixels + tile_values),))


def encode_floor(config: LlavaConfig, sizes: Sizes, itemsize: int) -> Floor:
    rows = sum(sizes.lengths)
    flops = vision_flops(config.vision, sizes.tiles) + 2 * sizes.kept * config.projector.matrix_size
    weights = vision_weights(config.vision) + config.projector.matrix_size
    pixels = sizes.tiles * 3 * config.vision.image_size**2
    return Floor((Phase(flops, pixels + itemsize * (weights + 2 * rows * config.decoder.hidden_size)),))


def prefill_floor(config: LlavaConfig, sizes: Sizes, itemsize: int) -> Floor:
    """Encoding, then the decoder over every row, then logits of the rows that need them."""
    decoder = config.decoder
    pairs = sum(n * (n + 1) // 2 for n in sizes.lengths)
    rows = sum(sizes.lengths)
    flops = decoder_flops(decoder, rows, pairs) + head_flops(decoder, sizes.logits)
    moved = decoder_weights(decoder) + head_weights(decoder) + rows * cache_values(decoder)
    return Floor((*encode_floor(config, sizes, itemsize).phases, Phase(flops, itemsize * moved)))


def text_prefill_floor(decoder: DecoderConfig, rows: int, batch: int, itemsize: int, weight_itemsize: float) -> Floor:
    """The decoder over `rows` rows of each sequence, then logits of the last; arithmetic as in decode_floor."""
    flops = decoder_flops(decoder, batch * rows, batch * rows * (rows + 1) // 2) + head_flops(decoder, batch)
    weights = decoder_weights(decoder) + head_weights(decoder)
    return Floor((Phase(flops, weight_itemsize * weights + itemsize * batch * rows * cache_values(decoder)),))


def decode_floor(
    decoder: DecoderConfig, context: int, batch: int, tokens: int, itemsize: int, weight_itemsize: float | None = None
) -> Floor:
    """`tokens` steps of one row a sequence, each reading every weight and the cache so far. `weight_itemsize`: of
    quantised weights, whose arithmetic is counted as the dtype's: products in 8 bits can be faster than that."""
    if weight_itemsize is None:
        weight_itemsize = itemsize
    return Floor(tuple(_step(decoder, context + step, batch, itemsize, weight_itemsize) for step in range(tokens)))


def generate_floor(
    config: LlavaConfig, sizes: Sizes, tokens: int, itemsize: int, weight_itemsize: float | None = None
) -> Floor:
    """Prefill gives the first token, the rest are steps. Reading the images is left out (it is a thousandth).
    `weight_itemsize`: as in decode_floor; prefill is counted in the dtype."""
    context, batch = max(sizes.lengths), len(sizes.lengths)
    steps = decode_floor(config.decoder, context, batch, tokens - 1, itemsize, weight_itemsize)
    return Floor((*prefill_floor(config, sizes, itemsize).phases, *steps.phases))


def train_floor(config: LlavaConfig, sizes: Sizes, itemsize: int) -> Floor:
    """A frozen tower forward, the rest forward and twice that backward, logits of supervised rows only; weights read
    by both passes, gradients written."""
    decoder = config.decoder
    pairs = sum(n * (n + 1) // 2 for n in sizes.lengths)
    trained = 2 * sizes.kept * config.projector.matrix_size
    trained += decoder_flops(decoder, sum(sizes.lengths), pairs) + head_flops(decoder, sizes.logits)
    flops = vision_flops(config.vision, sizes.tiles) + 3 * trained
    weights = config.projector.matrix_size + decoder_weights(decoder) + head_weights(decoder)
    return Floor((Phase(flops, itemsize * (vision_weights(config.vision) + 3 * weights)),))


def vision_weights(vision: TowerConfig) -> int:
    """Weights of the layers that must run, biases and norms left out."""
    return vision.layers_needed * vision.layer_matrix_size + 3 * vision.patch_size**2 * vision.hidden_size


def vision_flops(vision: TowerConfig, tiles: int) -> float:
    return vision.product_flops(tiles) + vision.attention_flops(tiles)


def decoder_weights(decoder: DecoderConfig) -> int:
    return decoder.num_layers * decoder.layer_matrix_size


def decoder_flops(decoder: DecoderConfig, rows: int, pairs: int) -> float:
    """`pairs`: query-key pairs that causality allows, over all sequences."""
    attention = 2 * decoder.num_layers * decoder.num_heads * decoder.head_dim * pairs
    return 2.0 * (rows * decoder_weights(decoder) + attention)


def head_weights(decoder: DecoderConfig) -> int:
    return decoder.vocab_size * decoder.hidden_size


def head_flops(decoder: DecoderConfig, rows: int) -> float:
    return 2.0 * rows * head_weights(decoder)


def cache_values(decoder: DecoderConfig) -> int:
    """Cached numbers a row."""
    return 2 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim


def _step(decoder: DecoderConfig, context: int, batch: int, itemsize: int, weight_itemsize: float) -> Phase:
    flops = decoder_flops(decoder, batch, batch * (context + 1)) + head_flops(decoder, batch)
    weights = decoder_weights(decoder) + head_weights(decoder)
    return Phase(flops, weight_itemsize * weights + itemsize * batch * context * cache_values(decoder))


def _arithmetic(phase: Phase, ceilings: Ceilings) -> float:
    return phase.flops / ceilings.flops_per_second


def _traffic(phase: Phase, ceilings: Ceilings) -> float:
    return phase.bytes / ceilings.bytes_per_second
