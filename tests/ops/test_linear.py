"""linear: its native form against float64 at every instruction set, when it runs, and a decoder's head through it."""

import platform
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from llava_fast import _C
from llava_fast.models import fused
from llava_fast.models.decoders.llama import DecoderAttention, DecoderMLP, LlamaConfig
from llava_fast.models.decoders.stack import Decoder
from llava_fast.ops import linear, use_backend
from llava_fast.ops.backend import BackendError
from llava_fast.ops.linear import native


def operands(rows: int, columns: int = 77, out: int = 131) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    shapes = ((rows, columns), (out, columns), (out,))
    return tuple(torch.randn(shape, generator=generator).bfloat16() for shape in shapes)


def error_bound(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A rounding in float32 for each addition, then one to bfloat16."""
    x, weight, bias = x.double(), weight.double(), bias.double()
    terms = F.linear(x.abs(), weight.abs(), bias.abs())
    return F.linear(x, weight, bias).abs() * 2**-8 + terms * (x.shape[1] + 1) * 2**-24 * (1 + 2**-8)


@pytest.mark.parametrize("level", _C.simd_levels())
@pytest.mark.parametrize("rows", [1, 3, native.MAX_ROWS])
def test_native_sums_in_float32(rows, level, monkeypatch):
    monkeypatch.setenv("LLAVA_FAST_SIMD", level)
    x, weight, bias = operands(rows)
    with use_backend("native"):
        found = linear(x, weight, bias)
        alone = [linear(row[None], weight, bias) for row in x]
    exact = F.linear(x.double(), weight.double(), bias.double())
    assert found.dtype == torch.bfloat16
    assert ((found - exact).abs() <= error_bound(x, weight, bias)).all()
    assert torch.equal(torch.cat(alone), found)


@pytest.mark.parametrize("biased", [True, False])
def test_many_rows_are_widened_where_bfloat16_is_slow(biased, monkeypatch):
    monkeypatch.setattr(native, "BLOCK_BYTES", 4 * 77 * 40)  # four blocks of 131 rows
    x, weight, bias = operands(native.MAX_ROWS + 1)
    exact = F.linear(x.double(), weight.double(), bias.double() if biased else None)
    for fast in (False, True):
        monkeypatch.setattr(_C, "fast_bfloat16", lambda fast=fast: fast)
        assert (native.unfit(x, weight, bias) is None) != fast
    found = native.many_rows(x, weight, bias if biased else None)
    assert found.dtype == torch.bfloat16
    assert ((found - exact).abs() <= error_bound(x, weight, bias if biased else torch.zeros(131))).all()


def test_autocast_does_not_round_widened_blocks():
    x, weight = torch.full((native.MAX_ROWS + 1, 64), 1e5).bfloat16(), torch.full((8, 64), 300.0).bfloat16()
    with torch.autocast("cpu", torch.float16):  # which holds no 1e5
        found = native.many_rows(x, weight, None)
    assert torch.equal(found, F.linear(x.float(), weight.float()).bfloat16())


@pytest.mark.skipif(platform.machine() != "x86_64", reason="elsewhere PyTorch's products are taken")
def test_where_bfloat16_is_fast(monkeypatch):
    """As Linux says, and not where instructions are limited."""
    if (cpu := Path("/proc/cpuinfo")).exists():
        monkeypatch.delenv("LLAVA_FAST_SIMD", raising=False)
        assert _C.fast_bfloat16() == ("avx512_bf16" in cpu.read_text())
    monkeypatch.setenv("LLAVA_FAST_SIMD", "scalar")
    assert not _C.fast_bfloat16()


def widened(monkeypatch) -> list[int]:
    """Rows of the calls of many_rows, on a CPU where bfloat16 is slow."""
    calls, run = [], native.many_rows
    monkeypatch.setattr(native, "many_rows", lambda x, *rest: calls.append(x.shape[:-1].numel()) or run(x, *rest))
    monkeypatch.setattr(_C, "fast_bfloat16", lambda: False)
    return calls


def test_a_decoder_widens_many_rows_where_bfloat16_is_slow(monkeypatch):
    calls = widened(monkeypatch)
    layer = torch.nn.Linear(64, 48).bfloat16().eval()
    x = torch.randn(40, 64).bfloat16()
    with torch.no_grad():
        found = fused.applied(layer, x)
        assert calls == [40]
        fused.applied(layer, x[:32])  # few
        with use_backend("reference"):
            fused.applied(layer, x)
        with torch.autocast("cpu", torch.bfloat16):
            fused.applied(layer, x)
        hook = layer.register_forward_hook(lambda *_: None)
        fused.applied(layer, x)
        hook.remove()
        fused.applied(layer.train(), x)  # as with gradients
        layer.eval()
        monkeypatch.setattr(_C, "fast_bfloat16", lambda: True)
        fused.applied(layer, x)
    fused.applied(layer, x)  # a gradient
    assert calls == [40]
    torch.testing.assert_close(found, layer(x))


@pytest.mark.parametrize("merged", [False, True])
def test_linears_of_one_input_are_widened_in_decoders_alone(merged, monkeypatch):
    class Gate(fused.MergesLinears):
        merges: ClassVar = {"gate_up": ("gate", "up")}

        def __init__(self):
            super().__init__()
            self.gate, self.up = torch.nn.Linear(64, 48), torch.nn.Linear(64, 32)

    class Layer(Gate):
        by_op = True

    calls = widened(monkeypatch)
    x = torch.randn(2, 20, 64).bfloat16()
    with torch.no_grad():
        for kind in (Gate, Layer):
            module = kind().bfloat16().eval()
            expected = [F.linear(x, linear.weight, linear.bias) for linear in (module.gate, module.up)]
            if merged:
                fused.merge_linears(module)
            torch.testing.assert_close(list(module.project(x, "gate_up")), expected)
            assert calls == ([] if kind is Gate else [40] if merged else [40, 40])
    assert DecoderAttention.by_op
    assert DecoderMLP.by_op


def test_a_compiled_decoder_has_one_graph_for_few_and_many_rows():
    counter, layer = CompileCounter(), torch.nn.Linear(16, 8).bfloat16().eval()
    compiled = torch.compile(lambda x: fused.applied(layer, x), backend=counter, dynamic=True)
    with torch.no_grad():
        for rows in (native.MAX_ROWS + 8, 8):
            compiled(torch.randn(rows, 16).bfloat16())
    assert counter.frame_count == 1


def test_when_the_native_form_runs(monkeypatch):
    x, weight, bias = operands(4)
    assert linear(x[None], weight).shape == (1, 4, 131)
    assert linear(x[:0], weight, bias).shape == (0, 131)
    assert linear(x, weight.requires_grad_()).requires_grad
    with use_backend("native"):
        with pytest.raises(BackendError, match="it has no gradients"):
            linear(x, weight)
        monkeypatch.setattr(_C, "fast_bfloat16", lambda: True)
        with pytest.raises(BackendError, match=r"it takes up to 32 rows on this processor, .* x has 33"):
            linear(operands(33)[0], weight.detach())
        with pytest.raises(BackendError, match=r"it takes bfloat16, got torch\.float32"):
            linear(x.float(), weight.float())
        with pytest.raises(BackendError, match="not contiguous"):
            linear(x[:, :64], weight[:, :64])
    with pytest.raises(ValueError, match="must be"):
        linear(x[:, 1:], weight)
    with pytest.raises(ValueError, match="one entry for each row"):
        linear(x, weight, bias[1:])


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_of_a_decoder_in_bfloat16(tied, monkeypatch):
    calls = []
    run = native.linear
    monkeypatch.setattr(native, "linear", lambda x, *rest: calls.append(len(x)) or run(x, *rest))
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    config = LlamaConfig(vocab_size=50, num_layers=1, max_positions=64, rms_norm_eps=1e-6, tie_embeddings=tied, **sizes)
    decoder = Decoder(config).bfloat16().eval()
    weight = (decoder.embed_tokens if tied else decoder.lm_head).weight
    rows = torch.randn(2, 64).bfloat16()
    assert decoder.logits(rows[:1]).requires_grad
    with torch.no_grad():
        decoder.logits(rows)  # more than one row
        with torch.autocast("cpu", torch.bfloat16):
            decoder.logits(rows[:1])
        with use_backend("reference"):
            decoder.logits(rows[:1])
        assert not calls
        found = decoder.logits(rows[:1])
        assert calls == [1]
        bound = error_bound(rows[:1], weight, torch.zeros(50))
        assert ((found - rows[:1].double() @ weight.double().T).abs() <= bound).all()
        if not tied:
            decoder.lm_head.register_forward_hook(lambda module, args, out: out * 0)
            assert not decoder.logits(rows[:1]).any()
            assert calls == [1]
