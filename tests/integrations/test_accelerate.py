"""An accelerated transformers model against the same model as it was: what it keeps, falls back to, copies and saves.

The answers themselves, over all kinds of models and batches, are in test_matrix.py."""

import copy
import inspect
import io
import logging
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText

import llava_fast
from llava_fast.accelerated import patch
from llava_fast.inputs.tiling.anyres import image_rows
from llava_fast.models import encode
from llava_fast.ops import assemble_inputs
from tests.support import tiny
from tests.support.against_stock import assert_same_gradients, assert_same_outputs, batch, fresh, gradients, shallow
from tests.support.parity import assert_close


def test_later_layers_do_not_run():
    model = llava_fast.accelerate(fresh("next"))
    ran = []
    for number, layer in enumerate(model.model.vision_tower.encoder.layers):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    inputs = batch("next")
    out = model(**inputs)
    # an answer that holds the tower's last hidden state needs the last layer
    assert ran == ([0, 1, 2] if "image_outputs" in out else [0, 1])
    ran.clear()
    model.generate(**inputs, max_new_tokens=2, pad_token_id=0)
    assert ran == [0, 1]


@pytest.mark.parametrize("count", [7, torch.tensor(7)])
def test_a_loss_over_the_tokens_of_several_batches(count, no_fallback):
    stock, model = fresh("next"), llava_fast.accelerate(fresh("next"))
    inputs = batch("next", "a none", labels=True)
    expected_out, expected = gradients(stock, inputs, num_items_in_batch=count)
    out, found = gradients(model, inputs, num_items_in_batch=count)
    assert_close("accelerated loss", out.loss, expected_out.loss, 1e-5)
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
    assert_same_outputs(model.eval(), stock.eval(), inputs)
    with torch.no_grad():
        assert model.train()(**inputs).logits is not None


def test_labels_without_a_supervised_row_give_what_stock_gives():
    stock, model = fresh("next"), llava_fast.accelerate(fresh("next"))
    inputs = batch("next", "a", labels=True)
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    assert model(**inputs).loss.isnan()
    assert stock(**inputs).loss.isnan()


def test_flat_tiles():
    """Tiles of all images end to end, without padding tiles."""
    stock, model = fresh("next"), llava_fast.accelerate(fresh("next"))
    inputs = batch("next", "two")
    pixels, sizes = inputs["pixel_values"], inputs["image_sizes"]
    geometry = tiny.pair("next").ours.processor.geometry
    counts = [image_rows(geometry, *map(int, size)).tiles for size in sizes]
    inputs["pixel_values"] = torch.cat([tiles[:n] for tiles, n in zip(pixels, counts, strict=True)])
    assert_same_outputs(model, stock, inputs)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), "torch.save"])
def test_copies_use_their_own_weights(copier):
    def saved(model):
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    model = llava_fast.accelerate(fresh("next"))
    twin = saved(model) if copier == "torch.save" else copier(model)
    assert patch.replaced(twin) == patch.replaced(model) != []
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
        assert patch.replaced(twin) == []
        assert patch.replaced(model) != []
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
            assert [name for name in parameters[0] if name not in patch.NEW_NAMES] == list(parameters[1])
    # transformers' own tests ask these annotations whether a model can return attentions
    assert [inspect.signature(each.forward).parameters["kwargs"].annotation for each in (model, stock)] == [
        inspect.signature(type(stock).forward).parameters["kwargs"].annotation
    ] * 2


def test_save_and_reload(tmp_path):
    model, stock = llava_fast.accelerate(fresh("next")), fresh("next")
    model.save_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "stock")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "stock" / file).read_bytes()
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours").eval()
    assert patch.SKIPS_LOGITS not in vars(loaded)
    assert_same_outputs(llava_fast.accelerate(loaded), stock, batch("next"))


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
    assert_same_outputs(model, stock, batch("next"))
    assert seen[0] == seen[1] != []


def test_a_hook_on_the_embedding_and_the_head():
    stock, model = fresh("next"), llava_fast.accelerate(fresh("next"))
    for each in (stock, model):
        each.get_input_embeddings().register_forward_hook(lambda module, args, output: output * 1.1)
        each.lm_head.register_forward_hook(lambda module, args, output: output * 0.5)
    inputs = batch("next", labels=True)
    assert_same_outputs(model, stock, inputs)
    assert_same_gradients("accelerated gradients", gradients(model, inputs)[1], gradients(stock, inputs)[1])


@pytest.mark.parametrize(
    ("asked", "phrase"),
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
    assert isinstance(found, tuple)
    assert len(found) == len(expected)
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


def test_autocast():
    stock, model = fresh("next"), llava_fast.accelerate(fresh("next"))
    exact = copy.deepcopy(stock).double()
    inputs = batch("next", labels=True)
    with torch.no_grad():
        truth = exact(**inputs | {"pixel_values": inputs["pixel_values"].double()})
        with torch.autocast("cpu", torch.bfloat16):
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
    assert "other code has wrapped LlavaNextModel.forward since" in caplog.text


def test_other_models_are_refused_by_name():
    with pytest.raises(
        patch.UnsupportedModelError, match="does not support Linear, only LlavaForConditionalGeneration"
    ):
        llava_fast.accelerate(nn.Linear(2, 2))


def test_projector_and_placement_as_one_op(monkeypatch, no_fallback):
    """assemble_inputs, which a GPU's kernel serves; here its reference."""
    stock, model = fresh("next"), llava_fast.accelerate(fresh("next"))
    taken = []
    monkeypatch.setattr(encode, "takes", lambda *_, **__: True)
    monkeypatch.setattr(encode, "assemble_inputs", lambda *a: taken.append(1) or assemble_inputs(*a))
    inputs = batch("next", labels=True)
    assert_same_outputs(model, stock, inputs)
    assert_same_gradients("accelerated gradients, one op", gradients(model, inputs)[1], gradients(stock, inputs)[1])
    assert len(taken) == 2


def test_a_compiled_graph_is_the_stock_one(no_fallback):
    stock, model = shallow("next"), llava_fast.accelerate(shallow("next"))
    inputs = batch("next", "none a", labels=True)
    compiled = torch.compile(model, backend="eager")
    assert_same_outputs(compiled, stock, inputs)
    compiled = llava_fast.accelerate(torch.compile(shallow("next"), backend="eager"))
    assert_same_outputs(compiled, stock, inputs)


def test_backends_agree():
    """The reference ops give the same as what "auto" takes."""
    model = llava_fast.accelerate(fresh("next"))
    inputs = batch("next", labels=True)
    expected_out, expected = gradients(model, inputs)
    with llava_fast.ops.use_backend("reference"):
        out, found = gradients(model, inputs)
    assert np.isclose(out.loss.item(), expected_out.loss.item(), rtol=1e-6)
    assert_same_gradients("accelerated gradients, reference", found, expected)
