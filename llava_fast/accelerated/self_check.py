"""Tests `accelerate` on a tiny model of the same class against the stock methods.

transformers changes its models between releases: an output field becomes a property, a method is renamed, a forward
gets another argument. So before a model is accelerated, a tiny model with the same model class, tower and decoder is
built, and stock methods and replacements get the same calls. A method whose results differ, which fails or has an
unknown parameter takes the stock path, and `reasons` says why. The check takes about 0.1 s once per process and kind of
model, and runs again if a class or function of the modules involved changes."""

from __future__ import annotations

import contextlib
import contextvars
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from llava_fast.accelerated import encode
from llava_fast.accelerated.decoder import FAMILIES as DECODERS
from llava_fast.accelerated.decoder import attention_forward, replacements
from llava_fast.accelerated.replacement import TOLD, replace
from llava_fast.accelerated.stock import StockModel
from llava_fast.inputs.plan.from_ids import rows_of_images
from llava_fast.inputs.tiling.video import video_rows
from llava_fast.models.fused.gate import LEAST
from llava_fast.ops.backend import use_backend

IMAGE_PATH, LOSS, ENCODING = "the image path", "the loss", "generate's encoding of images"
"""Parts that may take the stock path; in addition, the descriptions of decoder.replacements."""
NAMES = {
    "llava": "Llava",
    "llava_next": "LlavaNext",
    "llava_next_video": "LlavaNextVideo",
    "llava_onevision": "LlavaOnevision",
}
"""Model type -> prefix of its class names."""
TOWERS = {"clip_vision_model": "CLIPVision", "siglip_vision_model": "SiglipVision"}
"""Tower's model type -> prefix of its class names."""
ENCODE = "_prepare_multimodal_encoder_kwargs_for_generation"
FEATURES = (
    "pixel_values",
    "pixel_values_videos",
    "image_sizes",
    "image_sizes_videos",
    "batch_num_images",
    "vision_feature_layer",
    "vision_feature_select_strategy",
    "vision_aspect_ratio",
    "output_hidden_states",
    "kwargs",
)
FORWARD = (
    *FEATURES,
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "cache",
    "use_cache",
    "mm_encoder_outputs",
)
PARAMETERS = {
    IMAGE_PATH: (("inner", "forward", FORWARD),),
    LOSS: (("whole", "forward", (*FORWARD, "labels", "logits_to_keep")),),
    ENCODING: (
        ("whole", ENCODE, ("model_kwargs",)),
        ("inner", "get_image_features", FEATURES),
        ("inner", "get_video_features", FEATURES),
    ),
}
"""Known parameters of the stock methods."""
TEXT, TOWER = 16, 2  # the tiny model's sizes: the decoder's width and vocabulary, the tower's layers
IMAGE_ID, VIDEO_ID = 14, 15

Call: TypeAlias = Callable[[nn.Module], Any]
_found: dict[tuple, tuple[dict[str, str], list]] = {}
_trying: contextvars.ContextVar[bool] = contextvars.ContextVar("llava_fast_trying", default=False)


def in_trial() -> bool:
    """Whether a self-check's tiny model is running, not a caller's model."""
    return _trying.get()


def reasons(inner: StockModel, accelerate: Call, thorough: bool = False) -> Mapping[str, str]:
    """Part -> why it takes the stock path in models of this inner model's class; empty if all results agree.

    accelerate: replaces the methods of a whole model. The check is repeated if the family's module has changed since;
    thorough: also if the tower's or the decoder's has. Empty during a check.
    """
    if in_trial():
        return {}
    tower, decoder = inner.config.vision_config.model_type, inner.config.text_config.model_type
    tower = tower if tower in TOWERS else next(iter(TOWERS))
    decoder = decoder if decoder in DECODERS else "llama"
    kind = inner.config.model_type, tower, decoder
    names = [NAMES[kind[0]], TOWERS[tower], DECODERS[decoder]]
    own = _definitions(names[:1])
    every = _definitions(names) if thorough else own
    key, short = (*kind, thorough, *map(id, every)), (*kind, False, *map(id, own))
    if key not in _found:
        _found[key] = _tried(*kind, accelerate), every  # keep them alive, so that their ids are not reused
    _found[short] = _found[key][0], own
    return _found[key][0]


def _definitions(names: list[str]) -> list:
    """The global names and objects of the modules that define the models, and the attributes of their classes."""
    import transformers

    values: list = []
    for name in names:
        module = getattr(transformers, name + "Model").__module__
        for key, value in vars(sys.modules[module]).items():
            values += key, value
            if isinstance(value, type) and value.__module__ == module:
                for pair in vars(value).items():
                    values += pair
    return values


def _tried(family: str, tower: str, decoder: str, accelerate: Call) -> dict[str, str]:
    with _alone():
        try:
            whole = _tiny(family, tower, decoder)
            inputs = _inputs(whole.model)
        except Exception as error:
            why = f"no tiny model of its class can be built for the check ({_named(error)})"
            return dict.fromkeys((IMAGE_PATH, LOSS, ENCODING), why)
        found = {what: unknown for what in PARAMETERS if (unknown := _unknown(whole, what)) is not None}
        for what, call in _calls(inputs).items():
            if what not in found and (differs := _differs(whole, call, accelerate, what != LOSS)) is not None:
                found[what] = differs
        return found | _decoder(whole)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Isolate the block from the modes, random state and devices of the process."""
    token, dtype = _trying.set(True), torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with (
            _disable_current_modes(),  # such as FakeTensorMode, in which tensors have no values
            torch.random.fork_rng(devices=[]),
            torch.device("cpu"),
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
            use_backend("auto"),
        ):
            yield
    finally:
        torch.set_default_dtype(dtype)
        _trying.reset(token)


def _tiny(family: str, tower: str, decoder: str) -> nn.Module:
    import transformers

    sizes = {"hidden_size": TEXT, "intermediate_size": TEXT, "num_attention_heads": 2}
    text = {"model_type": decoder, "num_hidden_layers": 1, "num_key_value_heads": 2, "vocab_size": TEXT, **sizes}
    vision = {"model_type": tower, "num_hidden_layers": TOWER, "image_size": 16, "patch_size": 8, **sizes}
    options: dict[str, Any] = {"image_token_index": IMAGE_ID, "image_token_id": IMAGE_ID, "vision_feature_layer": -2}
    if tower == "siglip_vision_model":
        vision["vision_use_head"], options["vision_feature_select_strategy"] = False, "full"
    if family != "llava":
        options["image_grid_pinpoints"] = [[16, 32], [32, 16]]
    if family in ("llava_next_video", "llava_onevision"):
        options |= {"video_token_index": VIDEO_ID, "video_token_id": VIDEO_ID}
    kind = getattr(transformers, NAMES[family] + "ForConditionalGeneration")
    whole = kind(kind.config_class(text_config=text, vision_config=vision, **options)).eval()
    for parameter in whole.parameters():
        parameter.requires_grad_(False).normal_(0, 0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    return whole


def _inputs(inner: StockModel) -> dict[str, Tensor]:
    """A prompt with an image, and a video if the model supports it."""
    config = inner.config
    has_class_row = hasattr(inner.vision_tower.embeddings, "class_embedding")
    shape = encode.geometry(config, encode.select(inner, {}).skipped, has_class_row)
    anyres = config.model_type in encode.ANYRES
    sizes = torch.tensor([[20, 30]])
    rows = rows_of_images(shape, sizes.numpy() if anyres else None, 1)[0]
    ids = [5, *[IMAGE_ID] * len(rows), 6]
    made = {"pixel_values": torch.randn(*[1] * anyres, rows.tiles, 3, 16, 16)}
    if anyres:
        made["image_sizes"] = sizes
    if hasattr(inner, "get_video_features") and (not has_class_row or encode.select(inner, {}).skipped):
        ids += [*[VIDEO_ID] * len(video_rows(shape, 2)), 7]
        made["pixel_values_videos"] = torch.randn(1, 2, 3, 16, 16)
    made["input_ids"] = torch.tensor([ids])
    return made | {"attention_mask": torch.ones_like(made["input_ids"])}


def _calls(inputs: dict[str, Tensor]) -> dict[str, Call]:
    text = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "labels": torch.tensor([[-100, 6, -100, 8]])}
    how = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "output_logits": True}
    return {
        IMAGE_PATH: lambda whole: [whole.model(**inputs), whole(**inputs)],
        LOSS: lambda whole: whole(**text),
        ENCODING: lambda whole: whole.generate(**inputs, **how, return_dict_in_generate=True),
    }


def _unknown(whole: nn.Module, what: str) -> str | None:
    for part, method, known in PARAMETERS[what]:
        found = getattr(type(whole if part == "whole" else whole.model), method, None)
        new = (
            [] if found is None else [name for name in [*inspect.signature(found).parameters][1:] if name not in known]
        )
        if new:
            return f"transformers' {method} has the parameter {', '.join(new)}, which accelerate does not know"
    return None


def _differs(whole: nn.Module, call: Call, accelerate: Call, with_images: bool = False) -> str | None:
    """How a call of the accelerated model differs from the stock one, or why the stock path ran; else None."""
    try:
        expected = call(whole)
    except Exception as error:
        return f"the stock model itself fails on a tiny example ({_named(error)})"
    found, why = _accelerated(whole, call, accelerate, with_images)
    return why or _unlike(found, expected, "the answer")


def _accelerated(whole: nn.Module, call: Call, accelerate: Call, with_images: bool) -> tuple:
    """(the result of a call with replaced methods, None), or (None, why it cannot be used)."""
    before = {module: dict(vars(module)) for module in whole.modules()}
    runs: list[int] = []
    token = encode.TOWER_RUNS.set(runs)
    try:
        accelerate(whole)
        found = call(whole)
    except Exception as error:
        return None, f"with this version of transformers it fails ({_named(error)})"
    finally:
        encode.TOWER_RUNS.reset(token)
        told = [why for module in whole.modules() for _, why in vars(module).get(TOLD, ())]
        for module, names in before.items():
            vars(module).clear()
            vars(module).update(names)
    if told or (with_images and not runs):
        return None, next(iter(told), "this version of transformers does not call the methods that are replaced")
    return found, None


def _decoder(whole: nn.Module) -> dict[str, str]:
    """Replacement -> why it takes the stock path, for the decoder, each kind of module separately."""
    hidden, found = torch.randn(LEAST // (8 * TEXT), 8, TEXT), {}  # large enough for the replacements to run on a CPU
    parts = list(replacements(whole))
    for what, function in {what: function for _, _, function, what in parts}.items():
        some = [each[:3] for each in parts if each[-1] == what]

        def call(whole: StockModel, some=some, through_decoder=function is attention_forward) -> Any:
            if through_decoder:  # which computes the attention's other arguments
                return whole.model.language_model(inputs_embeds=hidden).last_hidden_state
            return [module(hidden) for module, *_ in some]

        def put(_: nn.Module, some=some) -> None:
            for each in some:
                replace(*each)

        why = _differs(whole, call, put)
        if why is not None:
            found[what] = why
    return found


def _unlike(found: Any, expected: Any, what: str) -> str | None:
    """A description of how two results differ; None if they agree."""
    if type(found) is not type(expected):
        return f"{what} is a {type(found).__name__}, and transformers gives a {type(expected).__name__}"
    if isinstance(expected, Tensor):
        if found.shape != expected.shape or found.dtype != expected.dtype:
            return f"{what} is {found.dtype} {tuple(found.shape)}, and of transformers {tuple(expected.shape)}"
        close = torch.allclose(found.double(), expected.double(), 1e-4, 1e-4 * expected.double().abs().max().item())
        return None if close else f"{what} has other values than transformers'"
    if isinstance(expected, Mapping):
        if list(found) != list(expected):
            return f"{what} has the fields {', '.join(found)}, and of transformers {', '.join(expected)}"
        differing = (_unlike(found[name], expected[name], f"{what}'s {name}") for name in expected)
    elif isinstance(expected, (list, tuple)):
        if len(found) != len(expected):
            return f"{what} has {len(found)} parts, and of transformers {len(expected)}"
        differing = (_unlike(*pair, what) for pair in zip(found, expected, strict=True))
    else:
        return None
    return next((why for why in differing if why is not None), None)


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
