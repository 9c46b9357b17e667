"""uint8 pixels into an accelerated model: the same answers as normalised ones, and never in silence."""

import copy
import inspect
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import llava_fast
from llava_fast.accelerated import uint8_pixels
from llava_fast.accelerated.uint8_pixels import NAMES, Normalisation, PixelError
from llava_fast.integrations.collator import Collator
from llava_fast.integrations.processor import FastProcessor
from tests.support import against_stock, tiny
from tests.support.against_stock import (
    assert_same_gradients,
    assert_same_tokens,
    assert_same_visual_outputs,
    fresh,
    gradients,
    shallow,
)
from tests.support.parity import assert_close

FAMILIES = ["llava15", "next", "video", "onevision"]


def processor(name: str) -> SimpleNamespace:
    """What accelerate reads of a processor; frames may be normalised otherwise than images."""
    case = tiny.CASES[name]
    video = tiny.frame_processor(case) if case.kind in ("llava_next_video", "llava_onevision") else None
    return SimpleNamespace(image_processor=tiny.image_processor(case), video_processor=video)


def both(name: str):
    """(stock, accelerated with its processor)."""
    return fresh(name), llava_fast.accelerate(fresh(name), processor(name))


def batch(name: str, labels: bool = False, side: str = "left") -> dict:
    """Normalised pixels, as a stock model takes them."""
    which = "both two film none" if name in ("video", "onevision") else "a none two tall"
    return against_stock.batch(name, which, side, labels)


def as_uint8(inputs: dict, name: str) -> dict:
    """The same batch with the pixels before normalisation."""
    parts = processor(name)
    out = dict(inputs)
    for uint8, stands in NAMES.items():
        if stands in out:
            part = parts.image_processor if stands == "pixel_values" else parts.video_processor
            mean, std = (torch.tensor(values).view(3, 1, 1) for values in (part.image_mean, part.image_std))
            out[uint8] = ((out.pop(stands) * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return out


@pytest.mark.parametrize("factor", [1 / 255, 1 / 127.5])
def test_a_table_of_levels_gives_the_processors_own_bits(factor):
    made = tiny.image_processor(tiny.CASES["next"])
    normalisation = Normalisation(factor, tuple(made.image_mean), tuple(made.image_std))
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 20, 20), dtype=np.uint8)
    pixels[0, :, 0, :] = np.arange(20)
    expected = [made.normalize(made.rescale(image, factor), made.image_mean, made.image_std) for image in pixels]
    assert np.array_equal(normalisation.normalised(torch.from_numpy(pixels)).numpy(), np.stack(expected))
    mean, std = (np.array(part).reshape(3, 1, 1) for part in normalisation.folded())
    np.testing.assert_allclose((pixels / 255 - mean) / std, np.stack(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_loss_and_gradients(name, side, no_fallback):
    stock, model = both(name)
    inputs = batch(name, labels=True, side=side)
    (found_out, found), (expected_out, expected) = gradients(model, as_uint8(inputs, name)), gradients(stock, inputs)
    assert list(found_out) == list(expected_out)
    for field in ("logits", "loss"):
        assert_close(f"uint8 {field}", found_out[field], expected_out[field], 1e-5)
    assert_same_visual_outputs("uint8", found_out, expected_out)
    assert_same_gradients("uint8 gradients", found, expected)


@pytest.mark.parametrize("where", ["embeddings", "embeddings.patch_embedding", "embeddings.position_embedding"])
@pytest.mark.parametrize("name", ["next", "onevision"])
def test_wrapped_embeddings_get_normalised_pixels(name, where):
    stock, model = both(name)
    seen: list[list] = [[], []]
    for each, got in zip((stock, model), seen, strict=True):
        each.model.vision_tower.get_submodule(where).register_forward_hook(
            lambda module, args, output, got=got: got.append(args[0]) or output * 1.25
        )
    inputs = batch(name)
    with torch.no_grad():
        found, expected = model(**as_uint8(inputs, name)), stock(**inputs)
    assert_close("uint8, hooked", found.logits, expected.logits, 1e-5)
    if where != "embeddings.position_embedding":  # which is called with numbers
        assert seen[0]
        assert torch.equal(seen[0][0], seen[1][0][: len(seen[0][0])])


@pytest.mark.parametrize("asked", [{"output_hidden_states": True}, {"output_attentions": True}])
def test_the_stock_path_gets_normalised_pixels(asked):
    stock, model = both("next")
    for each in (stock, model):
        each.set_attn_implementation("eager")
    inputs = batch("next")
    with torch.no_grad():
        found, expected = model(**as_uint8(inputs, "next"), **asked), stock(**inputs, **asked)
    assert_close("uint8, stock path", found.logits, expected.logits, 1e-6)


def test_a_compiled_graph_gets_normalised_pixels():
    stock, model = shallow("next"), llava_fast.accelerate(shallow("next"), processor("next"))
    inputs = batch("next", labels=True)
    with torch.no_grad():
        found = torch.compile(model, backend="eager")(**as_uint8(inputs, "next"))
        assert_close("uint8, compiled", found.logits, stock(**inputs).logits, 1e-6)


def test_an_inner_model_that_someone_else_wrapped_gets_normalised_pixels():
    stock, model = both("next")
    model.model.forward = type(model.model).forward.__get__(model.model)
    inputs = batch("next", labels=True)
    with torch.no_grad():
        assert_close("uint8, wrapped", model(**as_uint8(inputs, "next")).loss, stock(**inputs).loss, 1e-5)


@pytest.mark.parametrize("how", [{}, {"num_beams": 2}, {"do_sample": True}, {"use_cache": False}])
@pytest.mark.parametrize("name", FAMILIES)
def test_generate(name, how, no_fallback):
    inputs = batch(name)
    stock, model = both(name)
    assert_same_tokens(model, stock, inputs, as_uint8(inputs, name), **how)


def test_generates_steps_after_the_first_get_no_pixels():
    _, model = both("next")
    inputs = as_uint8(batch("next"), "next")
    for first in (True, False):
        made = model.prepare_inputs_for_generation(**inputs, is_first_iteration=first, use_cache=True)
        assert (made["pixel_values_uint8"] is not None) == first
        assert made.get("pixel_values") is None


def test_the_signature_names_them_so_that_trainer_keeps_them():
    _, model = both("next")
    assert set(NAMES) < set(inspect.signature(model.forward).parameters)
    assert not set(NAMES) & set(inspect.signature(fresh("next").forward).parameters)


def test_bfloat16_errs_at_most_twice_as_much():
    stock, model = both("next")
    inputs = batch("next")
    with torch.no_grad():
        truth = copy.deepcopy(stock).double()(**inputs | {"pixel_values": inputs["pixel_values"].double()}).logits
        found = model.bfloat16()(**as_uint8(inputs, "next")).logits
        expected = stock.bfloat16()(**inputs).logits
    assert found.dtype == expected.dtype
    errors = [(logits.double() - truth).abs().max() for logits in (found, expected)]
    assert errors[0] <= 2 * errors[1]


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_know_the_normalisation(copier):
    _, model = both("next")
    inputs = as_uint8(batch("next"), "next")
    with torch.no_grad():
        assert torch.equal(copier(model)(**inputs).logits, model(**inputs).logits)


def test_without_a_processor_they_are_refused():
    model = llava_fast.accelerate(fresh("next"))
    inputs = as_uint8(batch("next", labels=True), "next")
    for call in (model, model.model, lambda **given: model.generate(**given, max_new_tokens=2)):
        with pytest.raises(PixelError, match=r"pixel_values_uint8 is given, but .*accelerate\(model, processor\)"):
            call(**{name: value for name, value in inputs.items() if name != "labels"})
    with pytest.raises(PixelError, match="pixel_values_uint8 is given"):
        model(**inputs)
    llava_fast.accelerate(model, processor("next"))  # may follow later
    assert model(**inputs).loss.isfinite()


def test_a_restored_model_knows_nothing_of_them():
    stock, model = both("next")
    llava_fast.restore(model)
    assert uint8_pixels.SETTING not in vars(model.model)
    for each in (stock, model):
        with pytest.raises(ValueError, match=r"not used by the model: .'pixel_values_uint8'"):
            each.generate(**as_uint8(batch("next"), "next"), max_new_tokens=2)
        # forward ignores what it does not know, which docs/huggingface.md warns of
        without = {key: value for key, value in batch("next").items() if "pixel" not in key}
        with torch.no_grad():
            assert torch.equal(each(**as_uint8(batch("next"), "next")).logits, each(**without).logits)


def test_what_is_wrong_is_said():
    _, model = both("next")
    inputs = batch("next")
    with pytest.raises(PixelError, match=r"must be uint8, got torch.float32: normalised pixels go under pixel_values"):
        model(**{**as_uint8(inputs, "next"), "pixel_values_uint8": inputs["pixel_values"]})
    with pytest.raises(PixelError, match="pixel_values_uint8 and pixel_values were both given"):
        model(**inputs, pixel_values_uint8=as_uint8(inputs, "next")["pixel_values_uint8"])
    with pytest.raises(PixelError, match="has no image processor: give the checkpoint's own"):
        llava_fast.accelerate(fresh("next"), tiny.tokenizer())
    plain = tiny.image_processor(tiny.CASES["next"])
    plain.do_normalize = False
    with pytest.raises(PixelError, match="with a processor that rescales and normalises"):
        llava_fast.accelerate(fresh("next"), plain)(**as_uint8(inputs, "next"))


@pytest.mark.parametrize("name", ["llava15", "next"])
def test_from_collator_to_loss(name, tmp_path, no_fallback):
    """With the plan of the batch, made from the shapes of uint8 tiles."""
    tiny.hf_config(tiny.CASES[name]).save_pretrained(tmp_path)
    tiny.hf_processor(tiny.CASES[name]).save_pretrained(tmp_path)
    fast, plain = (FastProcessor.from_pretrained(tmp_path, output=output) for output in ("uint8", "float32"))
    stock, model = fresh(name), llava_fast.accelerate(fresh(name), fast)
    samples = [{"prompt": "<image> a", "answer": "b", "images": [tiny.picture(40, 90)]}]
    samples += [{"prompt": "no picture", "answer": "c"}]
    given, expected = (Collator(made, stock.config, plan=made is fast)(samples) for made in (fast, plain))
    assert "llava_plan_place" in given
    assert given["pixel_values_uint8"].dtype == torch.uint8
    assert_close("uint8 loss", model(**given).loss, stock(**expected).loss, 1e-5)


@pytest.mark.parametrize("name", ["llava15", "next"])
def test_from_fast_processor_to_answer(name, tmp_path):
    tiny.hf_config(tiny.CASES[name]).save_pretrained(tmp_path)
    tiny.hf_processor(tiny.CASES[name]).save_pretrained(tmp_path)
    fast, plain = (FastProcessor.from_pretrained(tmp_path, output=output) for output in ("uint8", "float32"))
    stock, model = fresh(name), llava_fast.accelerate(fresh(name), fast)
    options = {"images": [tiny.picture(40, 90), tiny.picture(70, 30)], "text": ["<image> a", "<image> b"]}
    options |= {"padding": True, "return_tensors": "pt"}
    with torch.no_grad():
        found, expected = model(**fast(**options)), stock(**plain(**options))
    assert_close("uint8 logits", found.logits, expected.logits, 1e-5)
