"""Versions of transformers with features unknown to accelerate: such calls take the stock path, log why, and raise only
the errors of the stock model. Each test plants a change in the installed version."""

import dataclasses
import functools
import inspect
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode

import llava_fast
from llava_fast.accelerated import patch as integration
from llava_fast.accelerated import self_check, versions
from tests.support.against_stock import assert_close, batch, fresh, gradients, shallow

GREEDY = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
MODULE = sys.modules[transformers.LlavaNextModel.__module__]
CLIP = sys.modules[transformers.CLIPVisionModel.__module__]
LLAMA = sys.modules[transformers.LlamaModel.__module__]
INNER, WHOLE = transformers.LlavaNextModel, transformers.LlavaNextForConditionalGeneration


def pair(name):
    return shallow(name), llava_fast.accelerate(shallow(name))


def read_only_fields(patch):
    """Set once, by the stock forward, as transformers 5.24 has it of image_hidden_states."""
    kind = MODULE.LlavaNextModelOutputWithPast
    made, put = kind.__post_init__, kind.__setitem__

    def seal(self):
        made(self)
        self.__dict__["sealed"] = True

    def refuse(self, name, value):
        if self.__dict__.get("sealed"):
            raise AttributeError(f"property {name!r} of {kind.__name__!r} object has no setter")
        put(self, name, value)

    patch.setattr(kind, "__post_init__", seal)
    patch.setattr(kind, "__setitem__", refuse)


def new_field(patch):
    """One that tells of pixels, which the stock forward does not see."""
    forward = INNER.forward
    kind = dataclasses.make_dataclass("More", [("tiles", object, None)], bases=(MODULE.LlavaNextModelOutputWithPast,))

    @functools.wraps(forward)
    def more(self, *args, **kwargs):
        tiles = kwargs.get("pixel_values")
        return kind(**forward(self, *args, **kwargs), tiles=tiles)

    patch.setattr(INNER, "forward", more)


def new_argument(patch):
    forward = WHOLE.forward

    @functools.wraps(forward)
    def longer(self, *args, scale=1.0, **kwargs):
        out = forward(self, *args, **kwargs)
        out.logits = out.logits * scale
        return out

    added = inspect.Parameter("scale", inspect.Parameter.KEYWORD_ONLY, default=1.0)
    *known, rest = inspect.signature(forward).parameters.values()
    longer.__signature__ = inspect.Signature([*known, added, rest])
    patch.setattr(WHOLE, "forward", longer)


def new_argument_of_the_inner_model(patch):
    forward = INNER.forward

    @functools.wraps(forward)
    def longer(self, *args, shift=0.5, **kwargs):
        out = forward(self, *args, **kwargs)
        out.last_hidden_state = out.last_hidden_state + shift
        return out

    added = inspect.Parameter("shift", inspect.Parameter.KEYWORD_ONLY, default=0.5)
    *known, rest = inspect.signature(forward).parameters.values()
    longer.__signature__ = inspect.Signature([*known, added, rest])
    patch.setattr(INNER, "forward", longer)


def new_class(patch):
    forward = WHOLE.forward

    @dataclasses.dataclass
    class Renamed(MODULE.LlavaNextCausalLMOutputWithPast):
        pass

    @functools.wraps(forward)
    def other(self, *args, **kwargs):
        return Renamed(**forward(self, *args, **kwargs))

    patch.setattr(WHOLE, "forward", other)


def renamed_class(patch):
    kind = MODULE.LlavaNextCausalLMOutputWithPast
    patch.setitem(WHOLE.forward.__globals__, "LlavaNextCausalLMOutputWithPast", kind)
    plain = inspect.unwrap(WHOLE.forward)
    patch.setattr(MODULE, "AnyOutput", kind, raising=False)
    patch.setattr(plain, "__code__", _with_name(plain.__code__, "LlavaNextCausalLMOutputWithPast", "AnyOutput"))
    patch.delattr(MODULE, "LlavaNextCausalLMOutputWithPast")


def _with_name(code, old: str, new: str):
    return code.replace(co_names=tuple(new if name == old else name for name in code.co_names))


def renamed_method(patch):
    """generate comes by another method to the same end."""
    features, ahead = INNER.get_image_features, getattr(WHOLE, self_check.ENCODE, None)
    patch.setattr(INNER, "get_picture_features", features, raising=False)
    plain = inspect.unwrap(INNER.forward)
    patch.setattr(plain, "__code__", _with_name(plain.__code__, "get_image_features", "get_picture_features"))
    patch.delattr(INNER, "get_image_features")
    if ahead is not None:

        def encode(self, model_kwargs):
            taken = {name: model_kwargs.pop(name) for name in ("pixel_values", "image_sizes") if name in model_kwargs}
            made = self.model.get_picture_features(**taken, return_dict=True) if taken else None
            return model_kwargs | {"mm_encoder_outputs": {"image": made}}

        patch.setattr(transformers.GenerationMixin, self_check.ENCODE, encode)


def changed_helper(patch):
    """Another order of an image's rows."""
    pack = INNER.pack_image_features

    def turned(self, *args, **kwargs):
        rows, lengths = pack(self, *args, **kwargs)
        return [each.flip(0) for each in rows], lengths

    patch.setattr(INNER, "pack_image_features", turned)


def changed_tower(patch):
    layer = CLIP.CLIPEncoder.forward
    patch.setattr(
        CLIP.CLIPEncoder, "forward", lambda self, inputs_embeds, *a, **k: layer(self, inputs_embeds * 2, *a, **k)
    )


def renamed_attribute(patch):
    """The tower's embeddings lie elsewhere."""
    made = CLIP.CLIPVisionModel.__init__

    def build(self, config):
        made(self, config)
        self.patches = self._modules.pop("embeddings")

    patch.setattr(CLIP.CLIPVisionModel, "__init__", build)
    plain = inspect.unwrap(CLIP.CLIPVisionModel.forward)
    patch.setattr(plain, "__code__", _with_name(plain.__code__, "embeddings", "patches"))


@pytest.mark.parametrize(
    ("plant", "told"),
    [
        (read_only_fields, ("the image path",)),
        (new_field, ("the image path",)),
        (new_argument, ("the loss",)),
        (new_argument_of_the_inner_model, ("the image path",)),
        (new_class, ("the loss",)),
        (renamed_class, ("the loss",)),
        (renamed_method, ("generate's encoding of images",)),
        (changed_helper, ("the image path", "generate's encoding of images")),
        (changed_tower, ("the image path", "generate's encoding of images")),
        (renamed_attribute, ("the image path", "generate's encoding of images", "the loss")),
    ],
)
def test_what_is_not_known_takes_the_stock_path(plant, told, monkeypatch, caplog):
    if plant is renamed_method and not hasattr(WHOLE, self_check.ENCODE):
        pytest.skip("this transformers does not encode before the prompt")
    if not hasattr(WHOLE, self_check.ENCODE):  # then generate comes by the image path alone
        told = tuple(what for what in told if what != self_check.ENCODING)
    with monkeypatch.context() as patch:
        plant(patch)
        stock, model = pair("next")
        inputs = batch("next")
        with torch.no_grad():
            found, expected = model(**inputs), stock(**inputs)
            assert torch.equal(model.generate(**inputs, **GREEDY), stock.generate(**inputs, **GREEDY))
        assert type(found) is type(expected)
        assert list(found) == list(expected)
        assert_close("a changed transformers", found.logits, expected.logits, 1e-5)
        out, expected_out = (gradients(each, batch("next", labels=True))[0] for each in (model, stock))
        assert type(out) is type(expected_out)
        assert list(out) == list(expected_out)
        assert_close("a changed transformers' loss", out.loss, expected_out.loss, 1e-5)
    messages = [record.message for record in caplog.records if "takes the stock path: " in record.message]
    assert {what for what in told if any(message.startswith(what) for message in messages)} == set(told), messages
    assert all(message.partition("path: ")[2] for message in messages)


def test_a_change_after_accelerate_is_seen_at_the_next_call(monkeypatch, caplog):
    stock, model = pair("next")
    inputs = batch("next")
    with torch.no_grad():
        model(**inputs)
        assert not caplog.records
        changed_helper(monkeypatch)
        assert_close("changed since", model(**inputs).logits, stock(**inputs).logits, 1e-5)
    assert "the image path takes the stock path: the answer's" in caplog.text


@pytest.mark.parametrize(
    ("name", "part"),
    [("LlamaRMSNorm", "RMSNorm"), ("LlamaMLP", "SwiGLU"), ("LlamaAttention", "RoPE")],
)
def test_a_changed_part_of_the_decoder_is_left(name, part, monkeypatch, caplog):
    kind = getattr(LLAMA, name)
    forward = kind.forward
    code = inspect.unwrap(forward)

    def changed(self, hidden_states, *args, **kwargs):
        return forward(self, hidden_states * 1.5 + 1, *args, **kwargs)

    changed.__module__ = code.__module__
    if part == "RoPE":  # its code is run as it is: so one name in it changes
        rotate = LLAMA.apply_rotary_pos_emb
        monkeypatch.setattr(LLAMA, "apply_rotary_pos_emb", lambda q, k, cos, sin: rotate(q, k, cos, -sin))
    else:
        monkeypatch.setattr(kind, "forward", changed)
    model = llava_fast.accelerate(fresh("llava15"))
    assert not any(part in what for what in integration.replaced(model))
    assert f"{part} " in caplog.text
    assert "takes the stock path: the answer" in caplog.text


def test_a_trial_leaves_no_trace():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    self_check._found.clear()
    with torch.device("meta"), torch.inference_mode():
        llava_fast.accelerate(fresh_on_meta := WHOLE(fresh("next").config))
    torch.manual_seed(7)
    model = fresh("next")
    state = torch.get_rng_state()
    self_check._found.clear()
    llava_fast.accelerate(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(before, state)
    assert next(fresh_on_meta.parameters()).is_meta
    assert torch.get_default_dtype() == torch.float32
    assert not self_check.in_trial()


def test_a_trial_among_fake_tensors_has_values():
    """As memory estimates run: nothing has a value there, and the trial compares values."""
    model = WHOLE(fresh("next").config)
    self_check._found.clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert not self_check.reasons(model.model, integration.accelerate, thorough=True)


def test_what_fails_here_is_tried_by_the_stock_model(monkeypatch, caplog):
    stock, model = pair("next")
    monkeypatch.setattr(integration.encode, "plan_visuals", lambda *_: {}["gone"])
    inputs = batch("next", labels=True)
    (found, _), (expected, _) = gradients(model, inputs), gradients(stock, inputs)
    assert_close("a failure here", found.loss, expected.loss, 1e-5)
    assert "it failed here (KeyError: 'gone')" in caplog.text


def test_a_keyword_without_a_name_takes_the_stock_path(caplog):
    stock, model = pair("llava15")
    inputs = batch("llava15") | {"interpolate_pos_encoding": True}
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, stock(**inputs).logits)
    assert "interpolate_pos_encoding is given, which accelerate does not know" in caplog.text


def test_the_tried_versions_are_those_of_the_metadata():
    root = Path(__file__).parents[2]
    first, last = versions.TRIED
    major, minor = map(int, last.split("."))
    project = (root / "pyproject.toml").read_text()
    assert f'"transformers>={first},<{major + 1}"' in project
    assert f'tried = ["transformers<{major}.{minor + 1}"' in project
    matrix = (root / ".github/workflows/versions.yml").read_text()
    assert {version[:4] for version in re.findall(r'transformers: "?([0-9.]+)', matrix)} == {
        f"{major}.{each}" for each in range(int(first.split(".")[1]), minor + 1)
    }
    assert f"transformers=={first}." in (root / "constraints-oldest.txt").read_text()
    assert f"transformers=={last}." in (root / "constraints.txt").read_text()


@pytest.mark.parametrize(
    ("version", "told"), [("5.16.1", 1), ("5.17.0", 0), ("5.24.3", 0), ("5.25.0", 1), ("6.0.0.dev0", 1)]
)
def test_an_untried_version_is_named_once(version, told, monkeypatch, caplog):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)  # which is put there after the import
    versions.warn_if_untried.cache_clear()
    for _ in range(2):
        versions.warn_if_untried()
    assert caplog.text.count(f"transformers {version} is untested") == told
    versions.warn_if_untried.cache_clear()
