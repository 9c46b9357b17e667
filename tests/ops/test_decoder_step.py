"""The compiled decoding step against the modules it stands for, in every shape they take."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llava_fast.models.attention import Spans
from llava_fast.models.config import DecoderConfig
from llava_fast.models.decoder import Decoder
from llava_fast.models.native_step import step_weights
from llava_fast.ops import use_backend
from llava_fast.ops.backend import BackendError

SHAPES = {
    "grouped heads": {},
    "own key heads": {"num_kv_heads": 4},
    "odd widths": {"hidden_size": 52, "head_dim": 18, "intermediate_size": 77, "num_kv_heads": 1},
    "biases": {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "windows": {"sliding_windows": (5, None, 3)},
}


def make(options: dict, dtype: torch.dtype = torch.float32) -> Decoder:
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, **options}
    config = DecoderConfig("llama", 50, num_layers=3, max_positions=256, rms_norm_eps=1e-6, **shape)
    torch.manual_seed(3)
    decoder = Decoder(config)
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.2)
    return decoder.to(dtype).eval()


def decode(decoder: Decoder, lengths: list[int], unused: float, steps: int = 4) -> torch.Tensor:
    """Hidden states of some decoding steps after prompts of these lengths; unused cache rows hold `unused`."""
    generator = torch.Generator().manual_seed(5)
    width, count, dtype = decoder.config.hidden_size, len(lengths), decoder.norm.weight.dtype
    cache = decoder.new_cache(count, max(lengths) + steps)
    for table in (*cache.keys, *cache.values):
        table.fill_(unused)
    outputs = []
    with torch.inference_mode():
        for slot, length in enumerate(lengths):
            prompt = torch.randn(length, width, generator=generator).to(dtype)
            decoder(prompt, torch.arange(length), Spans((0,), (length,), (slot,), (0,)), cache)
        cache.lengths = list(lengths)
        for _ in range(steps):
            rows = torch.randn(count, width, generator=generator).to(dtype)
            slots, before = tuple(range(count)), tuple(cache.lengths)
            outputs.append(decoder(rows, torch.tensor(before), Spans(slots, (1,) * count, slots, before), cache))
            cache.advance(slots, (1,) * count)
    return torch.stack(outputs)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lengths", [[9], [4, 11, 2], [3] * 16], ids=["one", "unequal", "sixteen"])
def test_native_is_the_modules(shape, lengths):
    got = decode(make(SHAPES[shape]), lengths, unused=torch.nan)
    with use_backend("reference"):
        expected = decode(make(SHAPES[shape]), lengths, unused=0.0)
        exact = decode(make(SHAPES[shape], torch.float64), lengths, unused=0.0)
    scale = exact.abs().max()
    assert torch.isfinite(got).all()
    assert (got - expected).abs().max() <= 1e-5 * scale
    assert (got - exact).abs().max() <= 2 * (expected - exact).abs().max() + 1e-6 * scale


def test_a_row_is_the_same_bits_whatever_its_neighbours_and_threads():
    decoder = make({})
    together = decode(decoder, [4, 11, 2], unused=torch.nan)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(decode(decoder, [4, 11, 2], unused=torch.nan), together)
    finally:
        torch.set_num_threads(threads)


def plain_weights(decoder: Decoder, rows: int = 1):
    """What decides whether a pass of `rows` rows runs natively: the weights, or None."""
    spans = Spans(tuple(range(rows)), (1,) * rows, tuple(range(rows)), (0,) * rows)
    kinds = frozenset(map(type, decoder.modules()))
    with torch.inference_mode():
        return step_weights(decoder, kinds, torch.zeros(rows, decoder.config.hidden_size), spans)


def test_wrapped_hooked_and_cast_modules_keep_their_own_forward():
    decoder = make({})
    assert plain_weights(decoder) is not None
    assert plain_weights(decoder, rows=1000) is None
    handle = decoder.layers[1].mlp.up_proj.register_forward_hook(lambda module, args, out: out * 2)
    assert plain_weights(decoder) is None
    handle.remove()
    assert plain_weights(decoder) is not None

    kinds = frozenset(map(type, decoder.modules()))
    attention = decoder.layers[0].self_attn
    attention.q_proj = nn.Sequential(attention.q_proj)
    with torch.inference_mode():
        spans = Spans((0,), (1,), (0,), (0,))
        assert step_weights(decoder, kinds, torch.zeros(1, 64), spans) is None
    assert plain_weights(make({}, torch.bfloat16)) is None
    assert step_weights(make({}), kinds, torch.zeros(1, 64), spans) is None  # gradients may be wanted


def test_new_weights_are_seen():
    decoder = make({})
    before = decode(decoder, [5], unused=torch.nan)
    with torch.no_grad():
        decoder.layers[2].mlp.down_proj.weight.mul_(1.5)
    in_place = decode(decoder, [5], unused=torch.nan)
    decoder.layers[2].mlp.down_proj.weight = nn.Parameter(decoder.layers[2].mlp.down_proj.weight / 1.5)
    assert not torch.equal(before, in_place)
    torch.testing.assert_close(decode(decoder, [5], unused=torch.nan), before)


def test_an_unknown_backend_is_refused():
    with pytest.raises(BackendError, match="unknown backend 'cuda'"), use_backend("cuda"):
        pass
