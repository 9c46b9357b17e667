"""An accelerated transformers model against the same model as it was: same outputs, gradients, tokens, files."""

import copy
import inspect
import io
import logging
import pickle

import numpy as np
import pytest
import tiny
import torch
from parity import assert_close, assert_same_answer
from torch import nn
from transformers import AutoModelForImageTextToText

import llava_fast
from llava_fast.inputs.anyres import image_rows
from llava_fast.integrations import hf_inputs
from llava_fast.integrations import transformers as integration
from llava_fast.ops import assemble_inputs

NAMES = ["llava15", "llava15_full", "next", "next_first_layer", "next_qwen", "next_biases", "video"]
SIZES = {"a": [(60, 90)], "none": [], "two": [(1, 300), (90, 30)], "tall": [(200, 50)]}
PROMPTS = {
    "a": "<image> what is this, then?",
    "none": "text alone, somewhat longer than the others, no picture",
    "two": "<image> or <image>?",
    "tall": "hello <image>",
}


def fresh(name: str):
    """A model of its own, in eval mode."""
    return tiny.hf_model(tiny.CASES[name])


def batch(name: str, which: str = "a none two tall", side: str = "left", labels: bool = False) -> dict:
    """What transformers' model takes for a padded batch of prompts with different tile counts."""
    pair = tiny.pair(name)
    each = [
        pair.reference_inputs(PROMPTS[key], [tiny.picture(*size, seed) for seed, size in enumerate(SIZES[key])])
        for key in which.split()
    ]
    longest = max(item["input_ids"].shape[1] for item in each)

    def pad(row, value):
        short = longest - len(row)
        return nn.functional.pad(row, (short, 0) if side == "left" else (0, short), value=value)

    inputs = {
        "input_ids": torch.stack([pad(item["input_ids"][0], tiny.PAD_ID) for item in each]),
        "attention_mask": torch.stack([pad(item["attention_mask"][0], 0) for item in each]),
    }
    pixels = [tiles for item in each for tiles in item.get("pixel_values", ())]
    if pixels:
        most = max(len(tiles) for tiles in pixels)
        if pixels[0].dim() == 4:  # AnyRes: every image padded to the most tiles
            pixels = [nn.functional.pad(tiles, (0, 0, 0, 0, 0, 0, 0, most - len(tiles))) for tiles in pixels]
            inputs["image_sizes"] = torch.cat([item["image_sizes"] for item in each if "image_sizes" in item])
        inputs["pixel_values"] = torch.stack(pixels)
    if labels:
        ids = inputs["input_ids"]
        spoken = (ids != tiny.IMAGE_ID) & (inputs["attention_mask"] == 1) & (torch.arange(longest) % 3 > 0)
        inputs["labels"] = torch.where(spoken, ids, -100)
    return inputs


def gradients(model, inputs: dict, **kwargs) -> tuple[torch.Tensor, dict]:
    model.zero_grad()
    out = model(**inputs, **kwargs)
    out.loss.backward()
    return out, {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def assert_same_gradients(what: str, found: dict, expected: dict) -> None:
    """As tests/test_parity_gradients.py has it: relative to each tensor's largest, with a floor; None matches None."""
    floor = 1e-6 * max(g.abs().max().item() for g in expected.values() if g is not None)
    assert found.keys() == expected.keys()
    for name, reference in expected.items():
        gradient = found[name]
        if gradient is None or reference is None:
            # a row or layer that no loss reaches: stock may give zeros where nothing is computed here
            other = gradient if reference is None else reference
            assert other is None or not other.any(), name
        elif reference.abs().max() < floor:
            assert gradient.abs().max() < floor, name
        else:
            assert_close(what, gradient, reference)


def assert_same_outputs(name: str, model, stock, inputs: dict, **kwargs) -> None:
    with torch.no_grad():
        found, expected = model(**inputs, **kwargs), stock(**inputs, **kwargs)
    assert list(found) == list(expected) and type(found) is type(expected)
    assert_close("accelerated logits", found.logits, expected.logits, 1e-5)
    for field in ("image_hidden_states", "loss"):
        if expected.get(field) is not None:
            assert_close(f"accelerated {field}", found[field], expected[field], 1e-5)


@pytest.fixture
def no_fallback(caplog):
    """No call of the test may take the stock path."""
    yield
    assert not [record for record in caplog.records if "stock path" in record.message]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_and_loss(name, side, no_fallback):
    stock, model = fresh(name), llava_fast.accelerate(fresh(name))
    for which in ("a none two tall", "none", "two a"):
        for labels in (False, True):
            assert_same_outputs(name, model, stock, batch(name, which, side, labels))


@pytest.mark.parametrize("layer", [-3, -2, -1, 1, 3])
@pytest.mark.parametrize("name", ["llava15", "next"])
def test_feature_layers(name, layer, no_fallback):
    stock, model = fresh(name), llava_fast.accelerate(fresh(name))
    assert_same_outputs(name, model, stock, batch(name), vision_feature_layer=layer)


def test_later_layers_do_not_run():
    model = llava_fast.accelerate(fresh("next"))
    ran = []
    for number, layer in enumerate(model.model.vision_tower.encoder.layers):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    inputs = batch("next")
    model(**inputs)
    assert ran == [0, 1]
    model.generate(**inputs, max_new_tokens=2, pad_token_id=0)
    assert ran == [0, 1, 0, 1]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients(name, side, no_fallback):
    stock, model = fresh(name), llava_fast.accelerate(fresh(name))
    inputs = batch(name, side=side, labels=True)
    for extra in ({}, {"num_items_in_batch": torch.tensor(7)}):
        expected_out, expected = gradients(stock, inputs, **extra)
        out, found = gradients(model, inputs, **extra)
        assert_close("accelerated loss", out.loss, expected_out.loss, 1e-5)
        assert_close("accelerated logits", out.logits, expected_out.logits, 1e-5)
        assert_same_gradients("accelerated gradients", found, expected)


@pytest.mark.parametrize("part", ["vision_tower", "language_model", "multi_modal_projector"])
def test_frozen_parts(part):
    stock, model = fresh("next"), llava_fast.accelerate(fresh("next"))
    for each in (stock, model):
        getattr(each.model, part).requires_grad_(False)
    inputs = batch("next", labels=True)
    assert_same_gradients("accelerated gradients", gradients(model, inputs)[1], gradients(stock, inputs)[1])


def test_text_only_training():
    stock, model = fresh("next"), llava_fast.accelerate(fresh("next"))
    inputs = batch("next", "none", labels=True)
    assert_same_gradients("accelerated gradients", gradients(model, inputs)[1], gradients(stock, inputs)[1])


def test_training_without_logits():
    stock, model = fresh("next").train(), llava_fast.accelerate(fresh("next"), training_logits=False).train()
    inputs = batch("next", labels=True)
    out, found = gradients(model, inputs)
    expected_out, expected = gradients(stock, inputs)
    assert out.logits is None
    assert_close("accelerated loss", out.loss, expected_out.loss, 1e-5)
    assert_same_gradients("accelerated gradients", found, expected)
    assert_same_outputs("next", model.eval(), stock.eval(), inputs)
    with torch.no_grad():
        assert model.train()(**inputs).logits is not None


def test_labels_without_a_supervised_row_give_what_stock_gives():
    stock, model = fresh("next"), llava_fast.accelerate(fresh("next"))
    inputs = batch("next", "a", labels=True)
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    assert model(**inputs).loss.isnan() and stock(**inputs).loss.isnan()


@pytest.mark.parametrize("how", [{}, {"cache_implementation": "static"}, {"num_beams": 2}, {"do_sample": True}])
@pytest.mark.parametrize("name", ["llava15", "next", "video"])
def test_generate(name, how, no_fallback):
    stock, model = fresh(name), llava_fast.accelerate(fresh(name))
    inputs = batch(name)
    kwargs = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | how
    answers = []
    for each in (model, stock):
        torch.manual_seed(0)
        out = each.generate(**inputs, **kwargs, return_dict_in_generate=True, output_logits=True)
        answers.append(out.sequences[:, inputs["input_ids"].shape[1] :])
    if how.get("num_beams") or how.get("do_sample"):
        assert answers[0].tolist() == answers[1].tolist()
        return
    for row, (found, expected) in enumerate(zip(*(answer.tolist() for answer in answers), strict=True)):
        assert_same_answer(found, expected, torch.stack(out.logits)[:, row])


def test_flat_tiles():
    """Tiles of all images end to end, without padding tiles."""
    stock, model = fresh("next"), llava_fast.accelerate(fresh("next"))
    inputs = batch("next", "two")
    pixels, sizes = inputs["pixel_values"], inputs["image_sizes"]
    geometry = tiny.pair("next").ours.processor.geometry
    counts = [image_rows(geometry, *map(int, size)).tiles for size in sizes]
    inputs["pixel_values"] = torch.cat([tiles[:n] for tiles, n in zip(pixels, counts, strict=True)])
    assert_same_outputs("next", model, stock, inputs)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), "torch.save"])
def test_copies_use_their_own_weights(copier):
    def saved(model):
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    model = llava_fast.accelerate(fresh("next"))
    twin = saved(model) if copier == "torch.save" else copier(model)
    assert integration.replaced(twin) == integration.replaced(model) != []
    inputs = batch("next")
    with torch.no_grad():
        before = model(**inputs).logits
        for parameter in twin.parameters():
            parameter.mul_(0.9)
        assert_close("a copy", model(**inputs).logits, before, 1e-6)
        expected = fresh("next")
        for parameter in expected.parameters():
            parameter.mul_(0.9)
        assert_close("a copy", twin(**inputs).logits, expected(**inputs).logits, 1e-5)
        llava_fast.restore(twin)
        assert integration.replaced(twin) == [] and integration.replaced(model) != []
        assert_close("a copy", twin(**inputs).logits, expected(**inputs).logits, 1e-6)


def test_restore_leaves_nothing():
    model = fresh("next")
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    kinds = {name: type(module) for name, module in model.named_modules()}
    keys = list(model.state_dict())
    assert llava_fast.accelerate(model) is model
    assert llava_fast.accelerate(model) is model  # a second time changes nothing
    assert list(model.state_dict()) == keys
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    model(**batch("next", "a"), output_hidden_states=True)
    llava_fast.restore(model)
    after = {name: set(vars(module)) - {"_output_capturing_hooks_installed"} for name, module in model.named_modules()}
    assert after == before
    assert llava_fast.restore(model) is model


def test_signatures_stay():
    model, stock = llava_fast.accelerate(fresh("next")), fresh("next")
    for found, expected in ((model, stock), (model.model, stock.model)):
        for name in ("forward", "get_image_features"):
            parameters = [inspect.signature(getattr(each, name)).parameters for each in (found, expected)]
            assert [name for name in parameters[0] if name not in integration.NEW_NAMES] == list(parameters[1])


def test_save_and_reload(tmp_path):
    model, stock = llava_fast.accelerate(fresh("next")), fresh("next")
    model.save_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "stock")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "stock" / file).read_bytes()
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours").eval()
    assert integration.SKIPS_LOGITS not in vars(loaded)
    assert_same_outputs("next", llava_fast.accelerate(loaded), stock, batch("next"))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    stock, model = fresh("next").train(), llava_fast.accelerate(fresh("next").train())
    inputs = batch("next", labels=True)
    expected = gradients(stock, inputs)[1]
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_same_gradients("accelerated gradients, checkpointed", gradients(model, inputs)[1], expected)


@pytest.mark.parametrize("where", ["multi_modal_projector", "multi_modal_projector.linear_1", "vision_tower"])
def test_hooks_run_and_change_what_they_change(where):
    stock, model = fresh("next"), llava_fast.accelerate(fresh("next"))
    seen: list[list] = [[], []]
    for each, shapes in zip((stock, model), seen, strict=True):

        def hook(module, args, output, record=shapes):
            record.append(args[0].shape)
            return output * 1.5 if isinstance(output, torch.Tensor) else output

        each.model.get_submodule(where).register_forward_hook(hook)
    assert_same_outputs("next", model, stock, batch("next"))
    assert seen[0] == seen[1] != []


def test_a_hook_on_the_embedding_and_the_head():
    stock, model = fresh("next"), llava_fast.accelerate(fresh("next"))
    for each in (stock, model):
        each.get_input_embeddings().register_forward_hook(lambda module, args, output: output * 1.1)
        each.lm_head.register_forward_hook(lambda module, args, output: output * 0.5)
    inputs = batch("next", labels=True)
    assert_same_outputs("next", model, stock, inputs)
    assert_same_gradients("accelerated gradients", gradients(model, inputs)[1], gradients(stock, inputs)[1])


@pytest.mark.parametrize(
    "asked, phrase",
    [
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"output_attentions": True}, "output_attentions"),
        ({"vision_feature_layer": [-2]}, "a list of feature layers"),
    ],
)
def test_the_stock_path_is_taken_and_told_once(asked, phrase, caplog):
    stock, model = fresh("next"), llava_fast.accelerate(fresh("next"))
    for each in (stock, model):
        each.set_attn_implementation("eager")
    inputs = batch("next", "a")
    with torch.no_grad():
        found, expected = model(**inputs, **asked), stock(**inputs, **asked)
        model(**inputs, **asked)
    assert list(found) == list(expected)
    assert torch.equal(found.logits, expected.logits)
    told = [record for record in caplog.records if record.levelno == logging.WARNING and phrase in record.message]
    assert len(told) == 1


@pytest.mark.parametrize("labels", [False, True])
def test_a_tuple_is_what_stock_gives(labels):
    stock, model = fresh("next"), llava_fast.accelerate(fresh("next"))
    inputs = batch("next", "a", labels=labels)
    with torch.no_grad():
        found, expected = model(**inputs, return_dict=False), stock(**inputs, return_dict=False)
    assert isinstance(found, tuple) and len(found) == len(expected)
    assert_close("a tuple", found[int(labels)], expected[int(labels)], 1e-5)


def test_wrong_counts_raise_what_stock_raises():
    stock, model = fresh("next"), llava_fast.accelerate(fresh("next"))
    inputs = batch("next", "a")
    inputs["input_ids"][0, -1] = tiny.IMAGE_ID
    for each in (stock, model):
        with pytest.raises(ValueError, match="do not match"):
            each(**inputs)


def test_direct_image_features_are_stock():
    stock, model = fresh("next"), llava_fast.accelerate(fresh("next"))
    inputs = batch("next", "two")
    with torch.no_grad():
        found, expected = (
            each.get_image_features(inputs["pixel_values"], inputs["image_sizes"]) for each in (model, stock)
        )
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)


def test_bfloat16_and_autocast():
    stock, model = fresh("next"), llava_fast.accelerate(fresh("next"))
    exact = copy.deepcopy(stock).double()
    inputs = batch("next", labels=True)
    with torch.no_grad():
        truth = exact(**inputs | {"pixel_values": inputs["pixel_values"].double()})
        for cast in (True, False):
            if not cast:
                stock, model = stock.bfloat16(), model.bfloat16()
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                found, expected = model(**inputs), stock(**inputs)
            assert found.logits.dtype == expected.logits.dtype
            errors = [(out.logits.double() - truth.logits).abs().max() for out in (found, expected)]
            assert errors[0] <= 2 * errors[1]
            assert (found.loss - truth.loss).abs() <= 2 * (expected.loss - truth.loss).abs() + 1e-2


def test_what_it_says(caplog):
    with caplog.at_level(logging.INFO, "llava_fast.integrations"):
        model = llava_fast.accelerate(fresh("next"))
    assert "LlavaNextForConditionalGeneration: replaced the loss" in caplog.text
    model.model.forward = model.model.forward.func  # someone else's
    llava_fast.restore(model)
    assert "something has wrapped LlavaNextModel.forward since" in caplog.text


def test_other_models_are_refused_by_name():
    with pytest.raises(integration.UnsupportedModelError, match="Linear: it serves LlavaForConditionalGeneration"):
        llava_fast.accelerate(nn.Linear(2, 2))


def test_projector_and_placement_as_one_op(monkeypatch, no_fallback):
    """assemble_inputs, which a GPU's kernel serves; here its reference."""
    stock, model = fresh("next"), llava_fast.accelerate(fresh("next"))
    taken = []
    monkeypatch.setattr(hf_inputs, "_fuses", lambda *_: True)
    monkeypatch.setattr(hf_inputs, "assemble_inputs", lambda *a: taken.append(1) or assemble_inputs(*a))
    inputs = batch("next", labels=True)
    assert_same_outputs("next", model, stock, inputs)
    assert_same_gradients("accelerated gradients, one op", gradients(model, inputs)[1], gradients(stock, inputs)[1])
    assert len(taken) == 2


def test_a_compiled_graph_is_the_stock_one(no_fallback):
    stock, model = fresh("next"), llava_fast.accelerate(fresh("next"))
    inputs = batch("next", "none a", labels=True)
    compiled = torch.compile(model, backend="eager")
    assert_same_outputs("next", compiled, stock, inputs)
    compiled = llava_fast.accelerate(torch.compile(fresh("next"), backend="eager"))
    assert_same_outputs("next", compiled, stock, inputs)


def test_backends_agree():
    """The reference ops give the same as what "auto" takes."""
    model = llava_fast.accelerate(fresh("next"))
    inputs = batch("next", labels=True)
    expected_out, expected = gradients(model, inputs)
    with llava_fast.ops.use_backend("reference"):
        out, found = gradients(model, inputs)
    assert np.isclose(out.loss.item(), expected_out.loss.item(), rtol=1e-6)
    assert_same_gradients("accelerated gradients, reference", found, expected)
