"""The compiled decoding step against the modules that it replaces and its own reference, and when it may run."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from llava_fast import _C
from llava_fast.errors import CacheFullError
from llava_fast.models.blocks import native_step
from llava_fast.models.blocks.attention import Spans
from llava_fast.models.decoders.llama import LlamaConfig
from llava_fast.models.decoders.stack import Decoder
from llava_fast.models.paged_cache import BlockTable, PagedCache
from llava_fast.ops import use_backend
from llava_fast.ops.backend import BackendError
from llava_fast.ops.decoder_step import DecoderWeights, decoder_step, native, reference
from llava_fast.ops.decoder_step.weights import LINEARS
from llava_fast.ops.paging import run_views
from llava_fast.ops.quantised_linear import quantise
from tests.support import tiny
from tests.support.rounded_rows import emulated, room

SHAPES = {
    "grouped heads": {},
    "own key heads": {"num_kv_heads": 4},
    "odd widths": {"hidden_size": 52, "head_dim": 18, "intermediate_size": 77, "num_kv_heads": 1},
    "narrower than a vector": {"hidden_size": 3, "head_dim": 2, "intermediate_size": 5, "num_heads": 1},
    "head of 128": {"head_dim": 128, "num_heads": 7, "num_kv_heads": 1},
    "biases": {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "windows": {"sliding_windows": (5, None, 3)},
}
LARGE = {"hidden_size": 704, "intermediate_size": 2046, "num_heads": 11, "num_kv_heads": 11, "head_dim": 64}


def make(options: dict, dtype: torch.dtype = torch.float32) -> Decoder:
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, **options}
    shape["num_kv_heads"] = min(shape["num_kv_heads"], shape["num_heads"])
    config = LlamaConfig(vocab_size=50, num_layers=3, max_positions=256, rms_norm_eps=1e-6, **shape)
    torch.manual_seed(3)
    decoder = Decoder(config)
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.2)
    return decoder.to(dtype).eval()


@pytest.fixture
def native_calls(monkeypatch) -> list[int]:
    """The number of rows of each native step made in a test."""
    calls = []
    run = native.decoder_step

    def spy(x, *rest):
        calls.append(len(x))
        return run(x, *rest)

    monkeypatch.setattr(native, "decoder_step", spy)
    return calls


def one_row_each(before: list[int], tables: tuple = ()) -> Spans:
    return Spans(tuple(range(len(before))), (1,) * len(before), tables, tuple(before))


def tables_for(cache: PagedCache, lengths: list[int]) -> tuple[BlockTable, ...]:
    """Tables with room for these rows, their blocks in turn, so that none has its rows side by side."""
    tables = tuple(BlockTable(cache) for _ in lengths)
    for rows in range(1, max(lengths) + 1):
        for table, length in zip(tables, lengths, strict=True):
            table.reserve(min(rows, length))
    return tables


def decode(decoder: Decoder, lengths: list[int], unused: float = torch.nan, steps: int = 4) -> torch.Tensor:
    """Hidden states [steps, sequences, width] after prompts of these lengths; unused cache rows hold `unused`.
    A sequence's rows depend on its length alone."""
    width, dtype = decoder.config.hidden_size, decoder.norm.weight.dtype
    cache = decoder.new_cache(block_rows=8)
    tables = tables_for(cache, [length + steps for length in lengths])
    for segment in cache.segments:
        segment.fill_(unused)
    rows = [torch.randn(n + steps, width, generator=torch.Generator().manual_seed(n)).to(dtype) for n in lengths]
    outputs = []
    with torch.inference_mode():
        for table, length, row in zip(tables, lengths, rows, strict=True):
            decoder(row[:length], torch.arange(length), Spans((0,), (length,), (table,), (0,)), cache)
        for step in range(steps):
            at = [length + step for length in lengths]
            x = torch.stack([row[i] for i, row in zip(at, rows, strict=True)])
            outputs.append(decoder(x, torch.tensor(at), one_row_each(at, tables), cache))
    return torch.stack(outputs)


@pytest.mark.parametrize("level", _C.simd_levels())
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lengths", [[9], [40, 11, 2], [3, 19] * 8], ids=["one", "unequal", "sixteen"])
def test_native_is_the_modules(shape, lengths, level, monkeypatch, native_calls):
    monkeypatch.setenv("LLAVA_FAST_SIMD", level)
    got = decode(make(SHAPES[shape]), lengths)
    assert native_calls == [len(lengths)] * 4
    with use_backend("reference"):
        expected = decode(make(SHAPES[shape]), lengths, unused=0.0)
        exact = decode(make(SHAPES[shape], torch.float64), lengths, unused=0.0)
    assert len(native_calls) == 4
    scale = exact.abs().max()
    assert (got - expected).abs().max() <= 1e-5 * scale
    assert (got - exact).abs().max() <= 2 * (expected - exact).abs().max() + 1e-6 * scale


def operands(shape: str, before: list[int], dtype: torch.dtype = torch.float32) -> tuple:
    """x, weights, cos, sin, segments, tables, before for the op, with NaN in every cache row that nothing may read."""
    decoder = make({**SHAPES, "61 MB": LARGE}[shape], dtype)
    cache = decoder.new_cache(block_rows=4)
    tables = tables_for(cache, [at + 1 for at in before] + [9])
    generator = torch.Generator().manual_seed(7)
    for segment in cache.segments:
        segment.fill_(torch.nan)
    for table, at in zip(tables, before, strict=False):
        for row in rows_in(cache.segments, table.runs, at):
            row.copy_(torch.randn(row.shape, generator=generator))
    x = torch.randn(len(before), decoder.config.hidden_size, generator=generator).to(dtype)
    rotation = decoder.rope(torch.tensor(before), dtype, one_row_each(before))
    return x, native_step.weights_of(decoder), *rotation, cache.segments, [t.runs for t in tables[:-1]], tuple(before)


def rows_in(segments, runs: list[int], count: int):
    """Views of the first `count` rows of a table, [layers, 2, K, D] each."""
    return [view[:, :, :, i] for view in run_views(segments, runs) for i in range(view.shape[3])][:count]


@pytest.mark.parametrize("shape", SHAPES)
def test_native_is_its_reference_and_touches_one_cache_row_a_sequence(shape):
    before = [0, 17, 4]
    x, weights, cos, sin, segments, tables, _ = operands(shape, before)
    mine, theirs = copy.deepcopy(segments), copy.deepcopy(segments)
    got = decoder_step(x, weights, cos, sin, mine, tables, before)
    with use_backend("reference"):
        expected = decoder_step(x, weights, cos, sin, theirs, tables, before)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, equal_nan=True)
    for table, at in zip(tables, before, strict=True):
        row = rows_in(mine, table, at + 1)[at]
        assert row.isfinite().all()
        row.fill_(torch.nan)
    for one, initial in zip(mine, segments, strict=True):
        assert torch.equal(one.nan_to_num(99.0), initial.nan_to_num(99.0))


@pytest.mark.parametrize("level", _C.simd_levels())
@pytest.mark.parametrize("shape", ["windows", "odd widths", "head of 128"])
def test_where_the_blocks_lie_changes_no_bit(shape, level, monkeypatch):
    monkeypatch.setenv("LLAVA_FAST_SIMD", level)
    before = [30, 17, 4]
    x, weights, cos, sin, segments, tables, _ = operands(shape, before)
    together = torch.zeros(*segments[0].shape[:3], 3 * 8, 4, segments[0].shape[5])
    for number, table in enumerate(tables):
        for target, source in zip(rows_in([together], [8 * number, 8], 32), rows_in(segments, table, 32), strict=False):
            target.copy_(source)
    apart = decoder_step(x, weights, cos, sin, segments, tables, before)
    assert all(len(table) > 2 for table in tables[:2])
    assert torch.equal(decoder_step(x, weights, cos, sin, [together], [[0, 8], [8, 8], [16, 8]], before), apart)


@pytest.mark.parametrize("level", _C.simd_levels())
@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_weights_and_cache_are_summed_in_float32(shape, level, monkeypatch):
    monkeypatch.setenv("LLAVA_FAST_SIMD", level)
    before = [0, 17, 4]
    x, weights, cos, sin, segments, tables, _ = operands(shape, before, torch.bfloat16)
    mine, theirs, doubles = copy.deepcopy(segments), copy.deepcopy(segments), [s.double() for s in segments]
    got = decoder_step(x, weights, cos, sin, mine, tables, before)
    rounded = reference.decoder_step(x, weights, cos, sin, theirs, tables, before)
    exact = reference.decoder_step(x.double(), in_float64(weights), cos.double(), sin.double(), doubles, tables, before)
    assert got.dtype == torch.bfloat16
    # The result, keys and values are rounded, and nothing between.
    assert (got - exact).abs().max() <= 2**-7 * exact.abs().max()
    assert (got - exact).abs().mean() <= 0.7 * (rounded - exact).abs().mean()
    for one, other in zip(mine, doubles, strict=True):
        limit = 2**-7 * other.nan_to_num().abs().max().item()
        torch.testing.assert_close(one.double(), other, rtol=0, atol=limit, equal_nan=True)


def in_float64(weights: DecoderWeights) -> DecoderWeights:
    layers = [layer._make(t.double() if isinstance(t, Tensor) else t for t in layer) for layer in weights.layers]
    return DecoderWeights(layers, weights.norm.double(), weights.head_dim, weights.eps, weights.windows)


QUANTISED = {
    "own key heads": ("int8", None, True),
    "grouped heads": ("int4", 32, True),
    "biases": ("int4", 32, False),
    "windows": ("int8", 32, True),
    "odd widths": ("int8", None, True),
}


FLOAT32 = 16 * 2**-24
"""Most that float32 moves an entry of a row of activations, as a part of the row's largest: 16 roundings, five on the
way through each of three layers (norm, product, attention or activation, product, addition) and that of the last norm.
Keys and values of every layer, and the result, are held to it."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("level", _C.simd_levels())
@pytest.mark.parametrize("shape", QUANTISED)
def test_quantised_layers_in_the_step_are_their_arithmetic_in_float64(shape, level, dtype, monkeypatch):
    """Of the rows in which float32 cannot turn a code: an entry that nears the middle between two codes may get either.
    Keys and values are compared with those in the cache, and these used, so that their rounding is no difference."""
    monkeypatch.setenv("LLAVA_FAST_SIMD", level)
    before = [7 * row % 23 for row in range(32)]
    x, weights, cos, sin, segments, tables, _ = operands(shape, before, dtype)
    quantised = [
        layer._replace(**{name: quantise(getattr(layer, name), *QUANTISED[shape]) for name in LINEARS})
        for layer in weights.layers
    ]
    weights = DecoderWeights(quantised, weights.norm, weights.head_dim, weights.eps, weights.windows)
    with use_backend("native"), torch.no_grad():
        got = decoder_step(x, weights, cos, sin, segments, tables, before)

    clear, excess = torch.ones(len(before), dtype=torch.bool), []
    rounding = 0 if dtype == torch.float32 else 2**-8  # half of the last bit's value

    def product(x, weight, bias):
        # Both an entry and the largest of its group, which gives the scale, may be off.
        clear.logical_and_((room(x) > 2 * FLOAT32 * x.abs().amax(1, keepdim=True)).all(1))
        return emulated(x, weight, bias)

    def compare(runs, at, row):
        stored = torch.cat(runs, 2)[:, :, at]
        excess.append(((stored - row).abs() - rounding * row.abs() - FLOAT32 * row.abs().max()).max())

    monkeypatch.setattr(reference, "quantised_linear", product)
    monkeypatch.setattr(reference, "_store", compare)
    cache = [segment.double() for segment in segments]
    exact = reference.decoder_step(x.double(), in_float64(weights), cos.double(), sin.double(), cache, tables, before)
    assert clear.sum() >= len(before) / 4
    assert (torch.stack(excess).view(-1, len(before))[:, clear] <= 0).all()
    limit = rounding * exact.abs() + FLOAT32 * exact.abs().amax(1, keepdim=True)
    assert ((got - exact).abs() <= limit)[clear].all()


def test_a_quantised_layer_of_another_shape_is_refused():
    _, weights, *_ = operands("grouped heads", [3])
    layers = list(weights.layers)
    layers[1] = layers[1]._replace(o=quantise(torch.randn(32, 64), "int8"))
    with pytest.raises(ValueError, match=r"layer 1's o must be \[64, 64\], got \[32, 64\]"):
        DecoderWeights(layers, weights.norm, 16, 1e-6)


def test_reference_runs_in_float64():
    got = reference.decoder_step(*operands("windows", [0, 17, 4]))
    exact = reference.decoder_step(*operands("windows", [0, 17, 4], torch.float64))
    assert exact.dtype == torch.float64
    assert (got - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize("level", _C.simd_levels())
def test_a_row_is_the_same_bits_whatever_its_neighbours(level, monkeypatch):
    monkeypatch.setenv("LLAVA_FAST_SIMD", level)
    decoder = make(SHAPES["odd widths"])
    lengths = [4, 11, 2, 7, 30, 9, 8]
    together = decode(decoder, lengths)
    for place, length in enumerate(lengths):
        assert torch.equal(decode(decoder, [length])[:, 0], together[:, place])


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_do_not_change_a_bit(threads):
    # Weights of 61 MB: a thread is started only for 16 MB of them.
    x, weights, cos, sin, *cache, before = operands("61 MB", [4, 11, 2])
    here = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = decoder_step(x, weights, cos, sin, *copy.deepcopy(cache), before)
        torch.set_num_threads(threads)
        for _ in range(5):
            assert torch.equal(decoder_step(x, weights, cos, sin, *copy.deepcopy(cache), before), alone)
    finally:
        torch.set_num_threads(here)


def wrap(decoder: Decoder) -> None:
    decoder.layers[0].self_attn.q_proj = nn.Sequential(decoder.layers[0].self_attn.q_proj)


def subclass(decoder: Decoder) -> None:
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    decoder.layers[2].mlp.down_proj.__class__ = Doubled


def replace_forward(decoder: Decoder) -> None:
    norm = decoder.layers[1].input_layernorm
    norm.forward = lambda x: x * norm.weight


DISTURBANCES = {
    "wrapped": wrap,
    "subclass": subclass,
    "forward replaced": replace_forward,
    "forward hook": lambda d: d.layers[1].mlp.up_proj.register_forward_hook(lambda m, args, out: out * 2),
    "pre-hook": lambda d: d.layers[0].mlp.register_forward_pre_hook(lambda m, args: (args[0] * 2,)),
    "parametrised": lambda d: parametrizations.weight_norm(d.layers[0].self_attn.o_proj),
}


@pytest.mark.parametrize("what", DISTURBANCES)
def test_a_disturbed_module_keeps_its_own_forward(what, native_calls):
    decoder, expected = make({}), make({})
    undisturbed = decode(decoder, [5, 2])
    assert native_calls
    native_calls.clear()
    for either in (decoder, expected):
        DISTURBANCES[what](either)
    got = decode(decoder, [5, 2], unused=0.0)
    with use_backend("reference"):
        assert torch.equal(got, decode(expected, [5, 2], unused=0.0))
    assert not native_calls
    if what not in ("wrapped", "parametrised"):
        assert not torch.allclose(got, undisturbed)


def test_a_module_restored_runs_natively_again(native_calls):
    decoder = make({})
    handle = decoder.layers[1].register_forward_hook(lambda m, args, out: out * 2)
    parametrizations.weight_norm(decoder.layers[0].mlp.gate_proj)
    decode(decoder, [5], unused=0.0)
    handle.remove()
    decode(decoder, [5], unused=0.0)
    assert not native_calls
    parametrize.remove_parametrizations(decoder.layers[0].mlp.gate_proj, "weight")
    decode(decoder, [5])
    assert native_calls


def test_gradients_autocast_other_dtypes_and_many_rows_take_the_modules(native_calls):
    decoder = make({})

    def step(decoder: Decoder, rows: int = 1) -> torch.Tensor:
        x = torch.randn(rows, 64, dtype=decoder.norm.weight.dtype)
        at = [0] * rows
        cache = decoder.new_cache()
        return decoder(x, torch.tensor(at), one_row_each(at, tables_for(cache, [1] * rows)), cache)

    assert step(decoder).requires_grad
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        step(decoder)
    with torch.no_grad():
        step(make({}, torch.float16))
        step(make({}, torch.float64))
        step(decoder, native_step.MAX_ROWS + 1)
        assert not native_calls
        step(decoder, native_step.MAX_ROWS)
    assert native_calls == [native_step.MAX_ROWS]


def test_weights_that_change_or_move_are_followed(native_calls):
    decoder = make({})
    first = decode(decoder, [5])
    down = decoder.layers[2].mlp.down_proj
    with torch.no_grad():
        down.weight.mul_(1.5)
    in_place = decode(decoder, [5])
    assert not torch.allclose(first, in_place)
    down.weight.data = down.weight.data / 1.5
    torch.testing.assert_close(decode(decoder, [5]), first)
    down.weight = nn.Parameter(down.weight.detach() * 1.5)
    torch.testing.assert_close(decode(decoder, [5]), in_place)
    decoder.to(torch.float64).to(torch.float32)
    torch.testing.assert_close(decode(decoder, [5]), in_place)
    decoder.load_state_dict(make({}).state_dict(), assign=True)
    torch.testing.assert_close(decode(decoder, [5]), first)
    assert len(native_calls) == 6 * 4


def test_a_full_cache_is_refused():
    decoder = make({})
    cache = decoder.new_cache(max_bytes=1, block_rows=4)  # one block, for less would be none
    at = (BlockTable(cache),)
    with torch.inference_mode():
        decoder(torch.randn(1, 64), torch.tensor([3]), one_row_each([3], at), cache)
        with pytest.raises(CacheFullError, match="1 blocks are needed, 0 are free and 0 can be added"):
            decoder(torch.randn(1, 64), torch.tensor([4]), one_row_each([4], at), cache)


def test_operands_that_do_not_fit_are_refused():
    x, weights, cos, sin, segments, tables, before = operands("grouped heads", [0, 17, 4])
    with pytest.raises(ValueError, match=r"x \[3, 63\] must be"):
        decoder_step(x[:, 1:], weights, cos, sin, segments, tables, before)
    with pytest.raises(ValueError, match="cos"):
        decoder_step(x, weights, cos[:2], sin, segments, tables, before)
    for wrong in ([], [segments[0][:2]], [segments[0], segments[0][:, :, :, :, :3]], [segments[0][0]]):
        with pytest.raises(ValueError, match=r"every segment|is outside its table"):
            decoder_step(x, weights, cos, sin, wrong, tables, before)
    with pytest.raises(ValueError, match="2 tables of blocks for 3 sequences"):
        decoder_step(x, weights, cos, sin, segments, tables[:2], before)
    with pytest.raises(ValueError, match="row 20 is outside its table of 5 blocks of 4 rows"):
        decoder_step(x, weights, cos, sin, segments, tables, (0, 20, 4))
    with pytest.raises(ValueError, match="row -1 is outside"):
        decoder_step(x, weights, cos, sin, segments, tables, (0, -1, 4))
    for backend in ("native", "reference"):
        for runs in ([-1, 9], [0, 1 << 40], [1 << 40, 9], [0, -1, 0, 9]):
            with use_backend(backend), pytest.raises(ValueError, match="do not lie in one segment"):
                decoder_step(x, weights, cos, sin, segments, [tables[0], runs, tables[2]], before)
    with pytest.raises(ValueError, match=r"must be torch.float32"):
        decoder_step(x.double(), weights, cos, sin, segments, tables, before)
    layers = list(weights.layers)
    layers[1] = layers[1]._replace(o_bias=torch.zeros(9))
    with pytest.raises(ValueError, match=r"layer 1's o_bias must be \[64\], got \[9\]"):
        DecoderWeights(layers, weights.norm, 16, 1e-6)
    with pytest.raises(ValueError, match="whole groups of heads"):
        DecoderWeights(weights.layers, weights.norm, 17, 1e-6)


def test_the_native_backend_says_what_it_cannot_take(monkeypatch):
    x, weights, *rest = operands("grouped heads", [3], torch.float64)
    assert decoder_step(x, weights, *rest).dtype == torch.float64
    with use_backend("native"), pytest.raises(BackendError, match="it takes float32 and bfloat16 on the CPU"):
        decoder_step(x, weights, *rest)
    with use_backend("triton"), pytest.raises(BackendError, match="does not serve the op 'decoder_step'"):
        decoder_step(x, weights, *rest)
    x, weights, cos, sin, segments, tables, before = operands("grouped heads", [3])
    segments[0] = segments[0].transpose(4, 5).contiguous().transpose(4, 5)
    expected = decoder_step(x, weights, cos, sin, copy.deepcopy(segments), tables, before)
    with use_backend("native"), pytest.raises(BackendError, match="not contiguous"):
        decoder_step(x, weights, cos, sin, segments, tables, before)
    assert expected.isfinite().all()
    monkeypatch.setenv("LLAVA_FAST_SIMD", "mmx")
    with pytest.raises(ValueError, match="LLAVA_FAST_SIMD is mmx"):
        decoder_step(*operands("grouped heads", [3]))


def test_an_unknown_backend_is_refused():
    with pytest.raises(BackendError, match="unknown backend 'cuda'"), use_backend("cuda"):
        pass


@pytest.mark.parametrize("name", ["next", "next_mistral_window", "next_qwen"])
def test_generate_gives_the_same_tokens_with_and_without(name, native_calls):
    model = tiny.pair(name).ours
    requests = [
        {"prompt": "<image>hello there", "images": [tiny.picture(60, 90)]},
        {"prompt": "hello, and no picture at all"},
        {"prompt": "a <image> b", "images": [tiny.picture(30, 200)]},
    ]
    got = model.generate(requests, max_new_tokens=24, ignore_eos=True)
    assert native_calls == [3] * 23
    with use_backend("reference"):
        assert model.generate(requests, max_new_tokens=24, ignore_eos=True) == got
    assert len(native_calls) == 23


def test_a_weight_that_was_turned_in_place_is_noticed():
    """Same address, size and dtype, other strides."""
    x, weights, cos, sin, segments, tables, before = operands("grouped heads", [3])
    decoder_step(x, weights, cos, sin, copy.deepcopy(segments), tables, before)
    assert weights.unfit is None
    with torch.no_grad():
        weights.layers[0].q.t_()
    found = decoder_step(x, weights, cos, sin, copy.deepcopy(segments), tables, before)
    assert weights.unfit is not None
    with use_backend("reference"):
        expected = decoder_step(x, weights, cos, sin, copy.deepcopy(segments), tables, before)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
