"""Every operator's test on the CPU: its sampled calls are valid, and each compiled backend is correct on them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llava_fast import ops
from llava_fast.ops.mix_rows import InversePooling
from llava_fast.ops.paged_attention import reference
from llava_fast.ops.paging import block_addresses
from llava_fast.ops.quantised_linear import quantise
from llava_fast.ops.selection import proof, samples
from llava_fast.ops.selection.call_class import argument_names, call_class, written_arguments
from llava_fast.ops.selection.decision import current
from llava_fast.ops.selection.verdict import Verdict
from llava_fast.ops.token_pack import InversePlacement

ROWS, WIDTH = 5, 16


def floats(*sizes: int) -> Tensor:
    return torch.randn(sizes, requires_grad=True)


def integers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def layer_norms() -> list[Tensor]:
    x, residual = floats(ROWS, WIDTH), floats(ROWS, WIDTH)
    weight, bias = floats(WIDTH), floats(WIDTH)
    added = ops.add_layer_norm(x, residual, weight, bias, 1e-5)
    double = ops.double_layer_norm(x, weight, bias, 1e-5, weight, bias, 1e-5)
    return [ops.layer_norm(x, weight, bias, 1e-5), *added, *double]


def rms_norms() -> list[Tensor]:
    x, weight = floats(ROWS, WIDTH), floats(WIDTH)
    return [ops.rms_norm(x, weight, 1e-5), *ops.add_rms_norm(x, floats(ROWS, WIDTH), weight, 1e-5)]


def rope() -> list[Tensor]:
    return list(ops.rope(floats(1, 2, ROWS, WIDTH), floats(1, 1, ROWS, WIDTH), *torch.randn(2, 1, ROWS, WIDTH)))


def swiglu() -> list[Tensor]:
    wide = floats(ROWS, 2 * WIDTH)
    return [ops.swiglu(wide[:, :WIDTH], wide[:, WIDTH:])]


def linear_acts() -> list[Tensor]:
    x = floats(1, ROWS, WIDTH)
    return [ops.linear_act(x, floats(8, WIDTH), floats(8), "quick_gelu"), ops.linear_act(x, floats(8, WIDTH))]


def quantised_linears() -> list[Tensor]:
    """On a CPU the native form rounds inputs; where a gradient is needed there are none but Triton's."""
    weight = quantise(torch.randn(8, 64), "int4", 32, symmetric=False)
    with torch.no_grad():
        ops.quantised_linear(floats(1, 2, 64), weight, floats(8))
    return [ops.quantised_linear(floats(rows, 64), weight, floats(8)) for rows in (1, 20)]


def mix_rows() -> list[Tensor]:
    rows, index, weight = floats(ROWS, WIDTH), integers(0, 1, 3, 2).view(2, 2), torch.rand(2, 2)
    inverse = InversePooling(integers(0, 1, 3, 2), integers(0, 1, 2, 3, 4, 4))
    return [ops.mix_rows(rows, index, weight, reduce, inverse) for reduce in ("sum", "max")]


SOURCE, ROW, PLACES = integers(0, 1, 1, 2, -1), integers(2, 1, 0, 0, 0), (1, 0, (2, 1), 3)


def placement() -> InversePlacement:
    return InversePlacement(integers(0), integers(2), integers(0, 1), integers(2, 1), integers(3), integers(0, 1))


def token_pack() -> list[Tensor]:
    tables = floats(9, WIDTH), floats(2, WIDTH), floats(1, WIDTH)
    return [ops.token_pack(SOURCE, ROW, *tables, placement())]


def assemble_inputs() -> list[Tensor]:
    layers = [floats(12, 8), floats(WIDTH, 12)], [floats(12), floats(WIDTH)]
    tables = floats(9, WIDTH), floats(1, WIDTH)
    features, kept = floats(4, 8), integers(3, 1)
    trained = ops.assemble_inputs(features, kept, *layers, SOURCE, ROW, *tables, placement())
    with torch.no_grad():
        ops.assemble_inputs(features, kept, *layers, SOURCE, ROW, *tables, placement(), count=integers(2))
    return [trained]


def patch_embeds() -> list[Tensor]:
    fixed = {"mean": torch.rand(3), "std": torch.rand(3) + 0.5}
    tiles = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    weight, class_row = floats(WIDTH, 3, 4, 4), floats(WIDTH)
    made = [ops.patch_embed(tiles, weight, floats(5, WIDTH), class_row=class_row, **fixed)]
    rows = torch.randint(0, 256, (2, 4, 48), dtype=torch.uint8)
    with torch.no_grad():
        ops.patch_embed(rows, weight, floats(4, WIDTH), bias=floats(WIDTH), count=integers(1), **fixed)
    return made


def paged_attention() -> list[Tensor]:
    segments = [torch.randn(3, 2, 2, 6, 8, WIDTH)]
    table, before = torch.arange(6, dtype=torch.int32).view(2, 3), integers(20, 3)
    rows = [torch.randn(2, heads, WIDTH) for heads in (4, 2, 2, 1, 1)]
    for layer in range(3):  # of one class
        ops.paged_attention(*rows, segments, block_addresses(segments), table, before, layer)
    return [floats(1)]


CALLS: dict[Callable[[], list[Tensor]], tuple[str, ...]] = {
    layer_norms: ("layer_norm", "add_layer_norm", "double_layer_norm", "layer_norm_backward"),
    rms_norms: ("rms_norm", "add_rms_norm", "rms_norm_backward"),
    rope: ("rope", "rope_backward"),
    swiglu: ("swiglu", "swiglu_backward"),
    linear_acts: ("linear_act", "linear_act_backward"),
    quantised_linears: ("quantised_linear", "quantised_linear_backward"),
    mix_rows: ("mix_rows", "mix_rows_backward"),
    token_pack: ("token_pack", "token_pack_backward"),
    assemble_inputs: ("assemble_inputs", "assemble_inputs_backward", "token_pack", "token_pack_backward"),
    patch_embeds: ("patch_embed", "patch_embed_backward"),
    paged_attention: ("paged_attention",),
}
BY_DEFAULT = {"linear_cross_entropy", "linear_cross_entropy_backward"}


@pytest.mark.parametrize("made", CALLS, ids=lambda made: made.__name__)
def test_each_form_is_right(select, monkeypatch, made):
    verdicts: dict[str, Verdict] = {}
    monkeypatch.setattr(proof.Clock, "in_turn", lambda *_: proof.Times(2.0, 1.0, 0.0))  # then only time refuses
    settings = select(LLAVA_FAST_SELECT="first-use", LLAVA_FAST_SELECT_BUDGET="300")
    settings.heard = verdicts.__setitem__
    outputs = made()
    torch.autograd.backward(outputs, [torch.randn_like(each) for each in outputs])
    assert {name.split()[0] for name in verdicts} == {*CALLS[made]}
    assert made is not paged_attention or len(verdicts) == 1
    for name, verdict in verdicts.items():
        assert verdict is not None, name
        forms = {"triton"} | ({"native"} if "token_pack" in name or "exact=0" in name else set())
        if name.startswith("assemble") or ("linear_act" in name and "activation=quick_gelu" in name):
            forms.add("cublas")
        assert {*verdict.refused} == forms, name
        assert {*verdict.refused.values()} == {"2 ms, the reference 1, spread 0"}, name


def test_every_operator_has_samples_or_keeps_its_default():
    names = (name.split("::") for name in torch._C._dispatch_get_all_op_names())
    defined = {name for library, name in names if library == "llava_fast"}
    elsewhere = {"image_tiles", "packed_attention", "scaled_linear"}  # their own tests prove calls
    known = {name for names in CALLS.values() for name in names} | elsewhere
    assert known | BY_DEFAULT == defined
    assert {*samples.ROW_ARGS, *samples.MAKERS} == known


def test_a_sample_has_other_values_and_at_most_512_rows():
    x, weight = torch.zeros(2, 700, WIDTH, dtype=torch.float16), torch.ones(8, WIDTH, dtype=torch.float16)
    args = {"x": x, "weight": weight, "bias": torch.zeros(8), "activation": "gelu", "keep": False}
    found = samples.sample_of("linear_act", args)
    assert [*found] == [*args]
    assert found["x"].shape == (512, WIDTH)
    assert found["x"].dtype == torch.float16
    assert found["x"].std() > 0.9
    assert abs(found["weight"].float().std() - WIDTH**-0.5) < 0.1
    assert found["bias"].abs().min() > 0
    again = samples.sample_of("linear_act", args)
    assert torch.equal(found["x"], again["x"])
    assert len(samples.samples_of("linear_act", args)) == 1
    few = samples.samples_of("linear_act", args | {"x": x[0, :5]})
    assert len(few) == samples.SEEDS
    assert not torch.equal(few[0]["x"], few[1]["x"])


def test_classes():
    x, weight = torch.zeros(5, 577, 1000, dtype=torch.bfloat16), torch.zeros(4096, 1000, dtype=torch.bfloat16)
    named = samples.ROW_ARGS["linear_act"]
    found = call_class("linear_act", [x, weight, None, "gelu", False], named)
    assert found == "linear_act x=bf16[4096,1024]~ weight=bf16[4096,1024]~ activation=gelu keep=0"
    assert call_class("linear_act", [x[:, ::2].flatten(0, 1), weight, None, "gelu", False], named) != found
    assert call_class("linear_act", [x.mT, weight, None, "gelu", False], named).split()[1].endswith("*")
    assert call_class("linear_act", [x, weight, weight[0], "gelu", False], named) != found
    assert call_class("linear_act", [x, weight, None, "gelu", True], named) != found
    given = [x, x, torch.float16, [True, False]]
    assert call_class("swiglu_backward", [x, *given], ("grad", "gate", "up")).endswith(" dtype=fp16 needed=1,0")


@pytest.mark.parametrize("fault", ["stores nothing", "stores elsewhere", None])
def test_what_an_op_writes_to_its_arguments_is_compared(monkeypatch, fault):
    """A paged_attention that attends as it should and whose store is missing fails only the next step."""
    segments = [torch.randn(1, 2, 2, 6, 8, WIDTH)]
    rows = [*(torch.randn(2, heads, WIDTH) for heads in (4, 2, 2)), *torch.randn(2, 2, WIDTH)]
    table, before = torch.arange(6, dtype=torch.int32).view(2, 3), integers(20, 3)
    args = [*rows, segments, block_addresses(segments), table, before, 0, 0]

    def run(*given):
        if current().backend == "native" and fault is not None:
            stored = given[5][0].clone()
            found = reference.paged_attention(*given[:5], [stored], *given[7:])
            if fault == "stores elsewhere":
                given[5][0].copy_(stored)
                given[5][0][0, 0, 0, 0, 0] += 1
            return found
        return reference.paged_attention(*given[:6], *given[7:])

    monkeypatch.setattr(proof, "FORMS", ("native",))
    monkeypatch.setattr(proof.Clock, "in_turn", lambda *_: proof.Times(1.0, 2.0, 0.1))
    named = dict(zip(argument_names("paged_attention"), args, strict=True))
    small = [list(each.values()) for each in samples.samples_of("paged_attention", named)]
    verdict = proof.prove(run, args, small, False, written_arguments("paged_attention"))
    said = {"stores nothing": "output 1: not every element is written", "stores elsewhere": "output 1: error", None: ""}
    assert verdict.refused.get("native", "").startswith(said[fault])
    assert (verdict.backend == "native") == (fault is None)
