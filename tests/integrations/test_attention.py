"""attn_implementation="llava_fast" against "sdpa" and "eager" of transformers: same answers at every real row."""

import copy

import pytest
import torch
from transformers import AttentionInterface

import llava_fast
from llava_fast.integrations import attention
from llava_fast.integrations.attention import register, spans_of
from llava_fast.models.blocks.attention import Spans, attend
from tests.support import tiny
from tests.support.against_stock import assert_same_gradients, batch, fresh, gradients
from tests.support.parity import assert_close, assert_same_answer

NAMES = ["llava15", "next", "next_qwen", "next_llama3", "next_mistral_window", "onevision"]


def models(name: str, stock: str = "sdpa"):
    """The same model twice: transformers' attention, and this package's."""
    reference, model = fresh(name), fresh(name)
    reference.set_attn_implementation(stock)
    model.set_attn_implementation(register())
    return reference, model


def prompts(name: str, side: str, labels: bool = False) -> dict:
    """Padded prompts; OneVision's images are left out (its processor pads elsewhere)."""
    return batch(name, "none" if name == "onevision" else "a none two tall", side, labels)


def real_rows(inputs: dict, values: torch.Tensor) -> torch.Tensor:
    return values[inputs["attention_mask"].bool()]


@pytest.mark.parametrize("stock", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_logits(name, side, stock):
    reference, model = models(name, stock)
    inputs = prompts(name, side)
    with torch.no_grad():
        found, expected = (real_rows(inputs, each(**inputs).logits) for each in (model, reference))
    assert_close("attention alone", found, expected, 1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_without_the_mask_half_padding_is_attended_to(side):
    """What this file's other tests would miss if padding did not matter to them."""
    AttentionInterface.register("llava_fast_without_mask", attention.attention)
    reference, model = models("next")
    model.set_attn_implementation("llava_fast_without_mask")
    inputs = prompts("next", side)
    with torch.no_grad():
        found, expected = (real_rows(inputs, each(**inputs).logits) for each in (model, reference))
    differs = (found - expected).abs().max() > 1e-3 * expected.abs().max()
    assert differs == (side == "left")  # on the right, causality alone hides padding


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["next", "next_llama3"])
def test_gradients(name, side):
    reference, model = models(name)
    inputs = prompts(name, side, labels=True)
    found, expected = gradients(model.train(), inputs)[1], gradients(reference.train(), inputs)[1]
    assert_same_gradients("gradients, attention alone", found, expected)


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("how", [{}, {"cache_implementation": "static"}, {"num_beams": 2}, {"prefill_chunk_size": 7}])
def test_generate(how, accelerated):
    reference, model = models("next_llama3")
    if accelerated:
        llava_fast.accelerate(model)
    inputs = prompts("next_llama3", "left")
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | how
    if "prefill_chunk_size" in how:
        for name in ("pixel_values", "image_sizes"):
            inputs.pop(name)
        inputs["input_ids"][inputs["input_ids"] == tiny.IMAGE_ID] = 20
    outs = [
        each.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
        for each in (model, reference)
    ]
    answers = [out.sequences[:, inputs["input_ids"].shape[1] :].tolist() for out in outs]
    if how.get("num_beams"):
        assert answers[0] == answers[1]
        return
    for row, (found, expected) in enumerate(zip(*answers, strict=True)):
        assert_same_answer(found, expected, torch.stack(outs[1].logits)[:, row])


def test_gaps_four_dimensional_masks_and_no_mask():
    reference, model = models("next")
    inputs = prompts("next", "left")
    gap = inputs["attention_mask"].clone()
    gap[:, -9:-6] = 0
    length = gap.shape[1]
    full = torch.ones(length, length, dtype=torch.bool).tril() & gap[:, None, None].bool()
    full |= torch.eye(length, dtype=torch.bool)
    for given in (gap, full, None):
        changed = inputs | {"attention_mask": given}
        with torch.no_grad():
            found, expected = model(**changed).logits, reference(**changed).logits
        keep = gap.bool() if given is gap else torch.ones_like(gap).bool()
        assert_close("attention alone, other masks", found[keep], expected[keep], 1e-5)


def test_a_later_prefill_on_a_cache():
    """More queries than one, fewer than keys: their last row is the keys' last."""
    reference, model = models("next_llama3")
    ids = torch.randint(20, 60, (2, 24))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    logits = []
    for each in (model, reference):
        with torch.no_grad():
            cache = each(input_ids=ids[:, :16], attention_mask=mask[:, :16], use_cache=True).past_key_values
            logits.append(each(input_ids=ids[:, 16:], attention_mask=mask, past_key_values=cache).logits)
    assert_close("attention alone, on a cache", *logits, 1e-5)


def test_packed_sequences():
    reference, model = models("next")
    ids = torch.randint(20, 60, (1, 20))
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    with torch.no_grad():
        found, expected = (
            each(input_ids=ids, position_ids=positions, use_cache=False).logits for each in (model, reference)
        )
    assert_close("attention alone, packed", found, expected, 1e-5)


def test_gradient_checkpointing_and_a_compiled_model():
    reference, model = models("next")
    inputs = prompts("next", "left", labels=True)
    expected = gradients(reference, inputs)[1]
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    with torch.no_grad():
        found = compiled(**inputs).logits
        assert_close(
            "attention alone, compiled", real_rows(inputs, found), real_rows(inputs, reference(**inputs).logits)
        )
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same_gradients("gradients, attention alone", gradients(model.train(), inputs)[1], expected)


def test_padding_is_not_computed(monkeypatch):
    model = models("next")[1]
    inputs = prompts("next", "left")
    seen = []
    monkeypatch.setattr(attention, "attend", lambda *a: seen.append(a[3]) or attend(*a))
    model(**inputs)
    assert seen
    assert sum(seen[0].lengths) == inputs["attention_mask"].sum()
    assert seen[0].dense is None


def test_spans_of():
    width = 5

    def spans(*rows):
        return spans_of(torch.tensor([[int(c) for c in row] for row in rows]))

    assert spans("11111", "11111") is None
    assert spans("10111", "11111") is None
    assert spans("00111", "11111") == Spans((2, width), (3, 5))
    assert spans("11000", "11110") == Spans((0, width), (2, 4), dense=(2, width))
    assert spans("00110", "00000", "10000") == Spans((2, 2 * width), (2, 1))


def test_from_pretrained_takes_the_name(tmp_path):
    register()
    fresh("next").save_pretrained(tmp_path)
    model = type(fresh("next")).from_pretrained(tmp_path, attn_implementation="llava_fast")
    assert model.config.text_config._attn_implementation == "llava_fast"


@pytest.mark.parametrize("extra", [{"softcap": 30.0}, {"s_aux": torch.zeros(2)}])
def test_what_is_not_computed_is_refused(extra):
    rows = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match=next(iter(extra))):
        attention.attention(torch.nn.Identity(), rows, rows, rows, None, **extra)
    with pytest.raises(ValueError, match="attention_dropout=0"):
        attention.attention(torch.nn.Identity(), rows, rows, rows, Spans((1,), (2,)), dropout=0.1)


def test_another_scale():
    torch.manual_seed(0)
    rows = torch.randn(2, 2, 6, 4)
    mask = torch.ones(2, 6)
    mask[0, :2] = 0
    found, _ = attention.attention(torch.nn.Identity(), rows, rows, rows, spans_of(mask), scaling=0.1)
    tensor = torch.ones(6, 6, dtype=torch.bool).tril() & mask[:, None, None].bool()
    expected, _ = attention.attention(torch.nn.Identity(), rows, rows, rows, tensor, scaling=0.1)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()])
