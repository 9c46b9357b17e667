"""Checkpoints that others quantised: AWQ, GPTQ and compressed-tensors, from the tensors that their code stores."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import llava_fast
from llava_fast import CheckpointError, Quantisation
from llava_fast.models.quantised import QuantisedLinear
from llava_fast.ops.quantised_linear import dequantise, quantise
from tests.support import tiny
from tests.support.tiny_checkpoints import edit_json

PICTURE = tiny.picture(60, 80)
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
UP = "language_model.model.layers.1.mlp.up_proj"
OURS = "decoder.layers.1.mlp.up_proj"


def nibbles(values, columns=range(8)):
    """int [rows, 8n] -> int32 [rows, n]: value columns[i] of eight in bits 4i to 4i + 3, written out one by one."""
    words = torch.zeros(len(values), values.shape[1] // 8, dtype=torch.int64)
    for place, column in enumerate(columns):
        words |= values[:, column::8].long() << (4 * place)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def octets(values):
    words = torch.zeros(len(values), values.shape[1] // 4, dtype=torch.int64)
    for place in range(4):
        words |= values[:, place::4].long() << (8 * place)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def drawn(out, columns, group, bits=4):
    codes = torch.randint(0, 2**bits, (out, columns))
    zero = torch.randint(0, 2**bits, (out, columns // group)) if bits == 4 else torch.full((out, columns // group), 128)
    scale = (torch.rand(out, columns // group) + 0.5).half() / 2**bits / 4
    return codes, zero, scale


def awq(out, columns):
    codes, zero, scale = drawn(out, columns, 32)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    stored = {"qweight": nibbles(codes.T, order), "qzeros": nibbles(zero.T, order), "scales": scale.T.contiguous()}
    return stored, dense(codes, zero, scale)


def gptq(out, columns, less=1, bits=4, shuffled=False):
    codes, zero, scale = drawn(out, columns, 32, bits)
    pack = nibbles if bits == 4 else octets
    stored = {
        "qweight": pack(codes).T.contiguous(),
        "qzeros": pack((zero.T - less) % 2**bits),
        "scales": scale.T.contiguous(),
    }
    group_of = torch.arange(columns) // 32
    if shuffled:
        group_of = group_of[torch.randperm(columns)]
    stored["g_idx"] = group_of.int()
    return stored, (codes - zero[:, group_of]).double() * scale.double()[:, group_of]


def dense(codes, zero, scale):
    group = codes.shape[1] // scale.shape[1]
    return (codes - zero.repeat_interleave(group, 1)).double() * scale.double().repeat_interleave(group, 1)


def int_quantized(out, columns):
    values, scale = torch.randint(-128, 128, (out, columns)), (torch.rand(out, 1) + 0.5).bfloat16() / 256
    return {"weight": values.to(torch.int8), "weight_scale": scale}, values.double() * scale.double()


def torchao(out, columns, group=None):
    """An Int8Tensor, or with groups an IntxUnpackedToInt8Tensor, as torchao's safetensors support takes them apart."""
    values = torch.randint(-128, 128, (out, columns)) if group is None else torch.randint(-8, 8, (out, columns))
    scale = (torch.rand(out, columns // (group or columns)) + 0.5).bfloat16() / 256
    stored = {"_weight_qdata": values.to(torch.int8), "_weight_scale": scale}
    if group is not None:
        stored["_weight_zero_point"] = torch.zeros_like(scale, dtype=torch.int8)
    return stored, values.double() * scale.double().repeat_interleave(columns // scale.shape[1], 1)


def compressed(form="int-quantized", bits=8, **more):
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "channel"}
    group = {"targets": ["Linear"], "weights": weights, "format": form, **more}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False}
FORMATS = {
    "awq": (AWQ, awq),
    "gptq": (GPTQ, gptq),
    "gptq_v2": (GPTQ | {"checkpoint_format": "gptq_v2"}, lambda out, columns: gptq(out, columns, less=0)),
    "gptq act-order": (GPTQ, lambda out, columns: gptq(out, columns, shuffled=True)),
    "gptq 8 bits": (GPTQ | {"bits": 8}, lambda out, columns: gptq(out, columns, bits=8)),
    "int-quantized": (compressed(), int_quantized),
    "torchao": ({"quant_method": "torchao"}, torchao),
    "torchao groups": ({"quant_method": "torchao"}, lambda out, columns: torchao(out, columns, 32)),
    "w8a8": (compressed(input_activations={"num_bits": 8, "dynamic": True}), int_quantized),
}


def write(path, config, make, change=lambda tensors: None):
    """A tiny LLaVA-NeXT whose decoder's Linears are stored as `make` stores them; their weights by our names."""
    torch.manual_seed(0)
    tiny.save(tiny.CASES["next"], tiny.pair("next").hf, path)
    tensors, weights = load_file(path / "model.safetensors"), {}
    for key in [key for key in tensors if "language_model.model.layers" in key and key.split(".")[-2] in LINEARS]:
        stored, weight = make(*tensors.pop(key).shape)
        module = key.removesuffix(".weight")
        tensors |= {f"{module}.{name}": tensor for name, tensor in stored.items()}
        weights[module.replace("language_model.model", "decoder")] = weight
    change(tensors)
    save_file(tensors, path / "model.safetensors")
    edit_json(path / "config.json", quantization_config=config)
    return weights


@pytest.mark.parametrize(("config", "make"), FORMATS.values(), ids=FORMATS)
def test_weights_are_those_that_were_stored(tmp_path, config, make):
    weights = write(tmp_path, config, make)
    model = llava_fast.load(tmp_path)
    assert len(weights) == 21
    for name, expected in weights.items():
        module = model.get_submodule(name)
        assert isinstance(module, QuantisedLinear)
        torch.testing.assert_close(module.dense(torch.float64), expected, rtol=1e-12, atol=0)
    x = torch.randn(2, 64, dtype=torch.float64)
    found = model.double().get_submodule(OURS)(x)
    torch.testing.assert_close(found, x @ weights[OURS].T)
    assert model.float().generate([{"prompt": "<image> hi", "images": [PICTURE]}], max_new_tokens=2)[0].token_ids


@pytest.mark.parametrize("name", ["awq", "gptq", "gptq 8 bits", "int-quantized"])
def test_saved_in_our_own_form_they_are_the_same(tmp_path, name):
    weights = write(tmp_path / "theirs", *FORMATS[name])
    llava_fast.save(llava_fast.load(tmp_path / "theirs", dtype="float16"), tmp_path / "ours")
    model = llava_fast.load(tmp_path / "ours")
    for name, expected in weights.items():
        torch.testing.assert_close(model.get_submodule(name).dense(torch.float64), expected, rtol=1e-12, atol=0)


def test_act_order_cannot_be_saved(tmp_path):
    write(tmp_path / "theirs", *FORMATS["gptq act-order"])
    with pytest.raises(CheckpointError, match=r"decoder\.layers\.0\.self_attn\.q_proj has GPTQ's act-order"):
        llava_fast.save(llava_fast.load(tmp_path / "theirs"), tmp_path / "ours")


def test_larger_groups_are_cut(tmp_path):
    """A scale for each row (group_size -1): its groups of 64 or 128 share it."""

    def whole_rows(out, columns):
        codes, zero, scale = drawn(out, columns, columns)
        stored = {"qweight": nibbles(codes).T.contiguous(), "qzeros": nibbles((zero.T - 1) % 16)}
        return stored | {"scales": scale.T.contiguous(), "g_idx": torch.zeros(columns).int()}, dense(codes, zero, scale)

    weights = write(tmp_path, GPTQ | {"group_size": -1}, whole_rows)
    model = llava_fast.load(tmp_path)
    assert model.get_submodule(OURS).quantised.group == 64
    for name, expected in weights.items():
        torch.testing.assert_close(dequantise(model.get_submodule(name).quantised, torch.float64), expected)


def test_gptq_that_says_so_in_a_file_of_its_own(tmp_path):
    weights = write(tmp_path, None, gptq)
    edit = {key: value for key, value in GPTQ.items() if key != "quant_method"}
    (tmp_path / "quantize_config.json").write_text(json.dumps(edit))
    torch.testing.assert_close(llava_fast.load(tmp_path).get_submodule(OURS).dense(torch.float64), weights[OURS])


REFUSED = {
    "method": ({"quant_method": "bitsandbytes"}, r"quantised \(bitsandbytes\); load the unquantised"),
    "no method": ({"bits": 4}, r"quantised \(unknown\)"),
    "awq version": (AWQ | {"version": "gemv"}, "AWQ of 4 bits, version 'gemv' is not supported"),
    "awq bits": (AWQ | {"bits": 3}, "AWQ of 3 bits"),
    "awq type": (AWQ | {"bits": "four"}, "bits: Input should be a valid integer, not 'four'"),
    "gptq bits": (GPTQ | {"bits": 3}, "GPTQ of 3 bits, checkpoint_format 'gptq' is not supported"),
    "gptq form": (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
    "format": (
        compressed("nvfp4-pack-quantized", 4),
        "compressed-tensors format 'nvfp4-pack-quantized' is not supported",
    ),
    "bits": (compressed(bits=2), "compressed-tensors weights of 2 bits, type 'int', strategy 'channel'"),
    "static": (compressed(input_activations={"dynamic": False}), "static scales of activations"),
    "sparse": (compressed() | {"sparsity_config": {"format": "24"}}, "compressed-tensors with sparsity_config"),
    "groups": (compressed() | {"config_groups": 7}, "config_groups: Input should be a valid dictionary"),
}


@pytest.mark.parametrize(("config", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_read_is_refused_by_name(tmp_path, config, message):
    write(tmp_path, config, awq if "awq" in config.values() else gptq)
    with pytest.raises(CheckpointError, match=message) as raised:
        llava_fast.load(tmp_path)
    assert "\n" not in str(raised.value)


def replaced(name, make):
    return lambda tensors: tensors.update({f"{UP}.{name}": make(tensors[f"{UP}.{name}"])})


def removed(name):
    return lambda tensors: tensors.pop(f"{UP}.{name}")


def with_nan(scales):
    scales = scales.clone()
    scales[1, 0] = float("nan")
    return scales


DAMAGED = {
    "no scales": ("awq", removed("scales"), r"up_proj\.qweight' has no 'scales'"),
    "no zeros": ("gptq", removed("qzeros"), r"up_proj\.qweight' has no 'qzeros'"),
    "short": ("awq", replaced("qweight", lambda t: t[:, :-1].clone()), r"up_proj.*qzeros \[2, 16\] does not match it"),
    "short gptq": ("gptq", replaced("qweight", lambda t: t[:-1].clone()), r"up_proj.*g_idx \[64\] does not match it"),
    "fewer groups": ("awq", replaced("scales", lambda t: t[:1].clone()), r"different numbers of groups: \[1, 2\]"),
    "nan": ("awq", replaced("scales", with_nan), r"up_proj.qweight': int4: scale\[0, 1\] is nan"),
    "negative": ("gptq", replaced("scales", lambda t: -t), r"scale\[0, 0\] is -0.0"),
    "order": ("gptq", replaced("g_idx", lambda t: t.clone().fill_(1)), "g_idx does not put 32 columns into each"),
    "floating": ("awq", replaced("qweight", lambda t: t.float()), "is torch.float32 .* not an int32 matrix"),
    "zeros of 8 bits": ("gptq 8 bits", replaced("qzeros", lambda t: t + 1), "8-bit weights with zero points"),
    "torchao zeros": ("torchao groups", replaced("_weight_zero_point", lambda t: t + 1), "with zero points are not"),
    "torchao packed": (
        "torchao",
        replaced("_weight_qdata", lambda t: t.view(torch.uint8)),
        "codes of one byte each are",
    ),
    "scale": ("int-quantized", replaced("weight_scale", lambda t: t[:-1].clone()), "do not match"),
    "another model's": (
        "awq",
        lambda t: t.update({f"{UP}.{name}": part for name, part in awq(64, 64)[0].items()}),
        r"up_proj\.qweight' has shape \[64, 64\], but config.json implies \[128, 64\]",
    ),
}


@pytest.mark.parametrize(("name", "change", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_weights_are_named(tmp_path, name, change, message):
    write(tmp_path, *FORMATS[name], change)
    with pytest.raises(CheckpointError, match=message) as raised:
        llava_fast.load(tmp_path)
    assert "model.safetensors" in str(raised.value)


def test_a_config_without_quantised_weights(tmp_path):
    tiny.save(tiny.CASES["next"], tiny.pair("next").hf, tmp_path)
    edit_json(tmp_path / "config.json", quantization_config=AWQ)
    with pytest.raises(
        CheckpointError, match=r"quantization_config \(awq\) is present, but no stored weight is quantised"
    ):
        llava_fast.load(tmp_path)


PACKED = {
    "no zeros": ("weight_zero_point", None, "has no 'weight_zero_point'"),
    "scale turned": (
        "weight_scale",
        lambda t: t.T.contiguous(),
        r"128 groups of 32 \(group_size\) do not make rows of 64",
    ),
    "fewer groups": (
        "weight_scale",
        lambda t: t[:, :1].clone(),
        r"1 groups of 32 \(group_size\) do not make rows of 64",
    ),
    "fewer scales": ("weight_scale", lambda t: t[:-1].clone(), r"scale \[127, 2\] does not fit a weight of 128 rows"),
    "cut": ("weight_packed", lambda t: t[:, :-1].clone(), r"torch.int32 \[128, 7\] does not hold \[128, 64\]"),
    "bytes": ("weight_packed", lambda t: t.view(torch.uint8), r"weight_packed torch.uint8 \[128, 32\]"),
}


@pytest.mark.parametrize(("name", "change", "message"), PACKED.values(), ids=PACKED)
def test_damaged_compressed_tensors_are_named(tmp_path, name, change, message):
    tiny.save(tiny.CASES["next"], tiny.pair("next").hf, tmp_path / "d")
    zeros = Quantisation("int4", group=32, symmetric=False)
    llava_fast.save(llava_fast.load(tmp_path / "d", quantize=zeros), tmp_path / "q")
    file = tmp_path / "q" / "model.safetensors"
    tensors = load_file(file)
    value = tensors.pop(f"{UP}.{name}")
    if change is not None:
        tensors[f"{UP}.{name}"] = change(value)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=rf"up_proj\.weight_packed'.*{message}"):
        llava_fast.load(tmp_path / "q")


def test_a_weight_that_is_there_twice_is_named(tmp_path):
    tiny.save(tiny.CASES["next"], tiny.pair("next").hf, tmp_path / "d")
    llava_fast.save(llava_fast.load(tmp_path / "d", quantize="int4"), tmp_path / "q")
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    save_file({**tensors, f"{UP}.weight": torch.zeros(128, 64)}, tmp_path / "q" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"up_proj' has 'weight_packed' and 'weight' too"):
        llava_fast.load(tmp_path / "q")


def test_an_order_that_is_unset_is_none(tmp_path):
    """compressed-tensors writes -1 everywhere."""
    from llava_fast.checkpoints.quantised import _ordered
    from llava_fast.errors import QuantisationError

    weight = quantise(torch.randn(8, 64), "int4", 32)
    assert _ordered(weight, torch.full((64,), -1, dtype=torch.int32)) == (weight, None)
    for wrong in (torch.arange(64) // 32 - 1, torch.arange(32) // 32):
        with pytest.raises(QuantisationError, match="does not give each of 64 columns a group"):
            _ordered(weight, wrong)
