"""Models whose towers and prompts multiply in 8 bits (`load(precision=...)`): errors, merged Linears, graphs, files."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import llava_fast
from llava_fast.errors import BackendError, CheckpointError
from llava_fast.models import eight_bit
from llava_fast.models.decode_graphs import MOST_SEQUENCES
from llava_fast.models.eight_bit import EightBitLinear, EightBitMergedLinear, use_precision
from llava_fast.models.fused import MergedLinear, merge_linears, split_linears
from llava_fast.ops import backend
from llava_fast.ops.rounding import TYPICAL_ERROR
from llava_fast.ops.scaled_linear import unfit_device
from tests.support import tiny
from tests.support.played import PlayedEncoding

FEW_ROWS = eight_bit.FEW_ROWS
CPU = torch.device("cpu")
PRECISIONS = [name for name, codes in eight_bit.PRECISIONS.items() if unfit_device(CPU, codes) is None]
on_precisions = pytest.mark.parametrize("precision", PRECISIONS)


@pytest.fixture(autouse=True)
def any_rows(monkeypatch):
    """Tiny models have few rows."""
    monkeypatch.setattr(eight_bit, "FEW_ROWS", 8)


def rounded(name, precision, dtype=torch.float32, merged=False):
    model = copy.deepcopy(tiny.pair(name).ours).to(dtype).eval()
    if merged:
        merge_linears(model)
    use_precision(model, precision)
    return model


def asked(model):
    pictures = [np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)]
    return model.prepare([{"prompt": "<image>\nWhat is this, and where?", "images": pictures}])


def distance(found, exact):
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def test_decoding_steps_keep_16_bits():
    assert FEW_ROWS == MOST_SEQUENCES


@on_precisions
@pytest.mark.parametrize("name", ["next", "llava15", "next_qwen"])
@pytest.mark.parametrize("merged", [False, True])
@torch.no_grad()
def test_the_error_of_a_model(name, precision, merged, monkeypatch):
    """Against float64: below the root of the sum of the squares of its matrices' errors, as independent errors add."""
    exact = copy.deepcopy(tiny.pair(name).ours).double().eval()
    model = rounded(name, precision, merged=merged)
    linears = {each.weight.data_ptr(): each for each in model.modules() if isinstance(each, EightBitLinear)}
    assert any(isinstance(each, EightBitMergedLinear) for each in linears.values()) is merged
    product, matrices = eight_bit.scaled_linear, []

    def counted(x, weight, *rest):
        matrices.extend(getattr(linears[weight.data_ptr()], "sizes", (1,)))
        return product(x, weight, *rest)

    monkeypatch.setattr(eight_bit, "scaled_linear", counted)
    with backend.noted() as calls:
        found = model(asked(model), logits="all").logits
    assert ("scaled_linear", "eight_bit") in calls
    assert ("scaled_linear", "reference") not in calls
    error = distance(found, exact(asked(exact), logits="all").logits)
    assert 1e-3 < error < TYPICAL_ERROR[eight_bit.PRECISIONS[precision]] * len(matrices) ** 0.5


@on_precisions
def test_gradients_training_and_autocast_have_none_of_it(precision):
    model, plain = rounded("next", precision), copy.deepcopy(tiny.pair("next").ours).eval()
    with backend.noted() as calls:
        assert torch.equal(model(asked(model)).logits, plain(asked(plain)).logits)  # gradients are wanted
        with torch.no_grad():
            assert torch.equal(model.train()(asked(model)).logits, plain.train()(asked(plain)).logits)
            model.eval()
            with torch.autocast("cpu", torch.bfloat16):
                model(asked(model))
            with llava_fast.ops.use_backend("reference"):
                model(asked(model))
    assert ("scaled_linear", "eight_bit") not in calls


def test_codes_follow_the_weight(monkeypatch):
    linear = nn.Linear(32, 16)
    model = EightBitLinear(linear, torch.int8)
    weight = model.weight
    assert weight is linear.weight
    assert model.state_dict().keys() == {"weight", "bias"}

    def check():
        codes, scale = eight_bit.rounded_rows(model.weight.detach(), torch.int8)
        assert torch.equal(model.codes, codes)
        assert torch.equal(model.scale, scale)
        assert model.scale.dtype == torch.float32

    check()
    model.load_state_dict({"weight": weight.detach() * 3, "bias": linear.bias.detach()})
    check()
    model.train()
    with torch.no_grad():
        weight.mul_(torch.rand(16, 32))
    model.eval()
    check()
    model.bfloat16()
    check()
    with torch.no_grad():
        model.weight.add_(1)
        model(torch.rand(32, 32).bfloat16())
        check()
        model.weight.data = model.weight * 2
        model(torch.rand(32, 32).bfloat16())
    check()


@on_precisions
@torch.no_grad()
def test_answers_decode_in_the_native_step(precision):
    with backend.noted() as calls:
        rounded("next", precision).generate([{"prompt": "hello"}], max_new_tokens=3, ignore_eos=True)
    assert ("decoder_step", "native") in calls


@on_precisions
def test_split_linears_and_wrapped_ones(precision):
    model = rounded("next", precision, merged=True)
    qkv = model.vision_tower.encoder.layers[0].self_attn.qkv_proj
    assert isinstance(qkv, MergedLinear)
    assert qkv.codes.shape == qkv.weight.shape
    entries = model.state_dict()
    assert entries.keys() == tiny.pair("next").ours.state_dict().keys()
    model.load_state_dict(entries)
    split_linears(model)
    assert model.state_dict().keys() == entries.keys()
    assert type(model.vision_tower.encoder.layers[0].self_attn.q_proj) is nn.Linear
    hooked = copy.deepcopy(tiny.pair("next").ours)
    first = hooked.vision_tower.encoder.layers[0].mlp.fc1
    first.register_forward_hook(lambda *args: None)
    use_precision(hooked, precision)
    assert hooked.vision_tower.encoder.layers[0].mlp.fc1 is first


@on_precisions
@torch.no_grad()
def test_graphs_of_encoding_hold_8_bit_products(precision):
    model = rounded("next", precision, merged=True)
    graphs, batch = PlayedEncoding(model), asked(model)
    expected = model.inputs_embeds(batch)
    with backend.noted() as calls:
        for _ in range(3):
            torch.testing.assert_close(graphs.encode(batch), expected, rtol=1e-4, atol=1e-5)
    assert ("scaled_linear", "eight_bit") in calls
    assert (graphs.replays, graphs.unfit, graphs.failed) == (2, None, {})
    (key,) = graphs.graphs.keys
    captured = graphs.graphs.get(key, None, "", "")
    model.vision_tower.encoder.layers[0].mlp.fc1.weight.mul_(2)
    other = graphs.encode(batch)
    assert graphs.graphs.get(key, None, "", "") is not captured  # that one reads the codes as they were
    assert not torch.allclose(other, expected, rtol=1e-2)
    torch.testing.assert_close(other, model.inputs_embeds(batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_load_and_save(tmp_path, precision):
    """Answers come, decoded with the weights as they are; what is saved is what was loaded."""
    if precision not in PRECISIONS:
        pytest.skip("this PyTorch has no such product")
    llava_fast.save(tiny.pair("llava15").ours, tmp_path / "plain")
    model = llava_fast.load(tmp_path / "plain", device="cpu", precision=precision)
    assert not model.training
    answer = {"prompt": "<image>\nhello", "images": [tiny.picture(20, 30)]}
    with backend.noted() as calls:
        (made,) = model.generate([answer], max_new_tokens=3, ignore_eos=True)
    assert len(made.token_ids) == 3
    assert {("scaled_linear", "eight_bit"), ("decoder_step", "native")} <= set(calls)
    llava_fast.save(model, tmp_path / "again")
    for path in sorted((tmp_path / "plain").iterdir()):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_what_is_refused(tmp_path, monkeypatch):
    llava_fast.save(tiny.pair("llava15").ours, tmp_path)
    with pytest.raises(BackendError, match="precision is 'int3': use 'int8', 'fp8' or None"):
        llava_fast.load(tmp_path, device="cpu", precision="int3")
    with pytest.raises(CheckpointError, match="cannot be combined with device_map"):
        llava_fast.load(tmp_path, device_map=["cpu"], precision="int8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    unfit_device.cache_clear()
    with pytest.raises(BackendError, match=r"'fp8' cannot be used on cuda: it needs compute capability 9\.0"):
        eight_bit.check_precision("fp8", torch.device("cuda"), torch.bfloat16)
    unfit_device.cache_clear()
    monkeypatch.setattr(eight_bit, "unfit_device", lambda *args: None)
    with pytest.raises(BackendError, match=r"needs dtype='bfloat16', not torch\.float16"):
        eight_bit.check_precision("fp8", torch.device("cuda"), torch.float16)
