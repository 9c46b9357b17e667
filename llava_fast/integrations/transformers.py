"""`accelerate(model)`: a Hugging Face LLaVA that is already loaded, faster and in less memory, with the same answers.

Methods of the model and of its parts are replaced, by instance (see `replacement`); classes, parameters and state_dict
keys stay:

- the whole model's forward: with labels, the loss and its gradients are made of supervised rows alone, by
  ops.linear_cross_entropy;
- the inner model's forward: the tower stops at the selected layer, only kept rows of images and videos are projected,
  and every row is put in its place by integers (see `hf_inputs`);
- the inner model's get_image_features and get_video_features: the same, but only while generate encodes ahead of the
  prompt. A direct call still runs the whole tower, for its result shows the last hidden state;
- generate: it leaves out a collator's plan (`llava_plan_*`, see `shipped_plan`), which forward takes;
- prepare_inputs_for_generation: uint8 pixels (see `uint8_pixels`) go to the first step alone, as normalised ones do;
- the forwards of the decoder's RMSNorm, MLP and attention: RMSNorm, SwiGLU and RoPE are one op each where that is the
  faster, and stock elsewhere, without a word in the log (see `hf_decoder`).

A call that another replacement does not serve takes the stock path, and says so once in the log
`llava_fast.integrations`. A graph that torch.compile traces is the stock one.
"""

from __future__ import annotations

import contextvars
import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from llava_fast.errors import ImageError, UnsupportedModelError
from llava_fast.integrations import hf_decoder, hf_inputs, sharded, shipped_plan, uint8_pixels
from llava_fast.integrations.placement import Integers, read_integers, supervised_rows, to_device
from llava_fast.integrations.replacement import (
    TOLD,
    by_name,
    is_replaced,
    logger,
    put_back,
    replace,
    stock,
    stock_signature,
    tell_stock,
)
from llava_fast.models.fused.gate import is_plain
from llava_fast.ops import linear_cross_entropy

SUPPORTED = (
    "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
    "LlavaNextVideoForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration",
)
NEW_NAMES = (*shipped_plan.NAMES, *uint8_pixels.NAMES)
"""Keywords that the whole model's forward takes besides those of the stock one."""
ENCODE = "_prepare_multimodal_encoder_kwargs_for_generation"
SKIPS_LOGITS = "_llava_fast_skips_training_logits"
INTEGERS = "llava_fast_integers"
_encoding: contextvars.ContextVar[dict | None] = contextvars.ContextVar("llava_fast_encoding", default=None)
"""While generate encodes images and videos: what their pixels, by name, still need (see uint8_pixels.take)."""


def accelerate(model: nn.Module, processor=None, *, training_logits: bool = True) -> nn.Module:
    """Speed up a transformers LLaVA in place, and return it. `restore` undoes it.

    model           a Llava, LlavaNext, LlavaNextVideo or LlavaOnevision ForConditionalGeneration, or a wrapper that
                    holds one (PEFT).
    processor       the model's processor, which tells how pixels are normalised: with it the model also takes the uint8
                    tiles of FastProcessor(output="uint8"), as `pixel_values_uint8` (of videos,
                    `pixel_values_videos_uint8`). Without it they raise uint8_pixels.PixelError. (A stock or restored
                    model's generate refuses these names; its forward ignores any name it does not know, so that
                    it answers as if there were no image: do not restore a model that is fed them.)
    training_logits False: in training mode, a call with labels gives its loss alone, and `logits` is None; the table of
                    logits [B, S, vocabulary] is then never made. True: logits are given, as the stock model does.
    Raises UnsupportedModelError for any other model, PixelError for a processor without image settings.
    """
    whole = find(model)
    done: dict[str, None] = {}  # in order, each once: a decoder's layers are many
    stays: dict[str, str] = {}
    for module, name, function, what in _replacements(whole):
        if replace(module, name, function, NEW_NAMES if function is whole_forward else ()):
            done[what] = None
        else:
            stays[what] = name
    for what, name in stays.items():
        logger.warning("%s stays: its %s was replaced by someone else", what, name)
    vars(whole)[SKIPS_LOGITS] = not training_logits
    if processor is not None:
        uint8_pixels.remember(whole.model, processor)
    logger.info("%s: replaced %s", type(whole).__name__, "; ".join(done) or "nothing")
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo `accelerate` in place, also on a copy of an accelerated model; return it. A model that is not accelerated
    stays as it is."""
    wholes = [module for module in model.modules() if SKIPS_LOGITS in vars(module)]
    for module, name, _, what in [each for whole in wholes for each in _replacements(whole)]:
        if name in vars(module) and not put_back(module, name):
            logger.warning("%s stays: something has wrapped %s.%s since", what, type(module).__name__, name)
    for module in model.modules():
        for name in (TOLD, SKIPS_LOGITS, uint8_pixels.SETTING):
            vars(module).pop(name, None)
    return model


def replaced(model: nn.Module) -> list[str]:
    """What of a model is replaced now, in words."""
    done = (what for module, name, _, what in _replacements(find(model)) if is_replaced(module, name))
    return list(dict.fromkeys(done))


def _replacements(whole: nn.Module) -> Iterator[tuple]:
    """(module, method, function, what it does in words)."""
    yield whole, "forward", whole_forward, "the loss (supervised rows only)"
    yield whole, "generate", generate, "generate (it leaves out a collator's plan)"
    yield whole, "prepare_inputs_for_generation", prepare_inputs, "the inputs of generate's steps (uint8 pixels)"
    yield whole.model, "forward", inner_forward, "the tower's run (stops at the selected layer), projection, placement"
    if hasattr(type(whole), ENCODE):
        yield whole, ENCODE, encode_for_generation, "generate's encoding of images"
        yield whole.model, "get_image_features", inner_image_features, "image features for generate"
        if hasattr(type(whole.model), "get_video_features"):
            yield whole.model, "get_video_features", inner_video_features, "video features for generate"
    yield from hf_decoder.replacements(whole)


def find(model: nn.Module) -> nn.Module:
    """The whole transformers model that is, or is inside, `model`. Raises UnsupportedModelError."""
    import transformers

    kinds = tuple(getattr(transformers, name) for name in SUPPORTED)
    for module in model.modules():
        if isinstance(module, kinds):
            kind = next(kind for kind in kinds if isinstance(module, kind))
            if type(module).forward is kind.forward:
                return module
    raise UnsupportedModelError(
        f"accelerate does not know {type(model).__name__}: it serves {', '.join(SUPPORTED)} of transformers"
    )


def whole_forward(model: nn.Module, *args, **kwargs):
    """The stock forward; with labels, its loss over supervised rows alone."""
    if torch.compiler.is_compiling():
        return type(model).forward(model, *args, **_as_stock(model.model, kwargs))
    given = by_name(model, "forward", args, kwargs)
    plan = shipped_plan.find(given)
    if not is_replaced(model.model, "forward"):
        given = _as_stock(model.model, given)
    labels = given.get("labels")
    if labels is None:
        return stock(model, "forward", given)
    if why := unfit_for_loss(model, given):
        tell_stock(model, "the loss", why)
        return stock(model, "forward", given)
    inner = {name: value for name, value in given.items() if name not in ("labels", "logits_to_keep", "return_dict")}
    if plan is not None and len(plan["supervised_row"]):
        rows, targets = shipped_plan.supervision(plan, labels)
    else:
        integers = _integers(model.model, given, labels)
        on_host = supervised_rows(integers.labels)
        if not len(on_host[0]) or on_host[1].min() < 0 or on_host[1].max() >= len(model.lm_head.weight):
            return stock(model, "forward", given)  # which gives NaN, or raises
        rows, targets = to_device(dict(zip(("rows", "targets"), on_host, strict=True)), labels.device).values()
        if is_replaced(model.model, "forward"):
            inner[INTEGERS] = integers
    outputs = model.model(**inner, return_dict=True)
    hidden = outputs[0]
    rows, targets = rows.to(hidden.device), targets.to(hidden.device)
    loss = _loss(model.lm_head, hidden.flatten(0, 1)[rows.long()], targets)
    count = given.get("num_items_in_batch")
    loss = loss / (len(rows) if count is None else count.to(loss.device) if isinstance(count, Tensor) else count)
    skips = model.training and torch.is_grad_enabled() and vars(model).get(SKIPS_LOGITS, False)
    parts = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
    return _output_class(model)(loss=loss, logits=None if skips else model.lm_head(hidden), **parts)


def _loss(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """The sum of the rows' losses; under autocast in its dtype, as the head's own product would be."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
    bias = None if head.bias is None else head.bias.to(dtype)
    with torch.autocast(device, enabled=False):
        return linear_cross_entropy(hidden.to(dtype), head.weight.to(dtype), targets, bias).sum()


def _output_class(model: nn.Module):
    """The class that the stock forward returns: it lies beside the model's own, which FSDP may have subclassed."""
    for kind in type(model).__mro__:
        if kind.__name__ in SUPPORTED:
            return getattr(
                sys.modules[kind.__module__],
                kind.__name__.removesuffix("ForConditionalGeneration") + "CausalLMOutputWithPast",
            )
    raise UnsupportedModelError(f"{type(model).__name__} is not served")


def unfit_for_loss(model: nn.Module, given: dict) -> str | None:
    """Why the loss of this call of a whole model must take the stock path, or None."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    head, labels, ids = model.lm_head, given["labels"], given.get("input_ids")
    if not is_plain(head, nn.Linear):
        return "the output head is hooked, wrapped, sharded or not an exact nn.Linear"
    if model.loss_function is not ForCausalLMLoss:
        return "the model has a loss function of its own"
    for name in ("shift_labels", "ignore_index"):
        if given.get(name) is not None:
            return f"{name} is given"
    keep = given.get("logits_to_keep", 0)
    if isinstance(keep, Tensor) or keep:
        return "logits_to_keep is given"
    return_dict = given.get("return_dict")
    if not (model.config.return_dict if return_dict is None else return_dict):
        return "a tuple is asked for (return_dict=False)"
    if labels.dim() != 2 or ids is not None and ids.shape != labels.shape:
        return f"labels of shape {tuple(labels.shape)}"
    return None


def _integers(inner: nn.Module, given: dict, labels: Tensor | None = None) -> Integers:
    """What is read of a call: image_sizes and batch_num_images only with pixels, and where the model reads them."""
    family = inner.config.model_type
    tiled = any(given.get(name) is not None for name in ("pixel_values", "pixel_values_uint8"))
    sizes = given.get("image_sizes") if tiled and family in hf_inputs.ANYRES else None
    counts = given.get("batch_num_images") if tiled and family == "llava_onevision" else None
    return read_integers(given.get("input_ids"), sizes, labels, counts)


def _as_stock(inner: nn.Module, given: dict) -> dict:
    """The arguments of a call as a stock model takes them: no plan, and pixels normalised."""
    return uint8_pixels.normalise(*uint8_pixels.take(inner, shipped_plan.without(given)))


def inner_forward(model: nn.Module, *args, **kwargs):
    """The stock forward of decoder inputs made here from ids and pixels."""
    integers: Integers | None = kwargs.pop(INTEGERS, None)
    if torch.compiler.is_compiling():
        return type(model).forward(model, *args, **_as_stock(model, kwargs))
    given = by_name(model, "forward", args, kwargs)
    plan, (given, uint8) = shipped_plan.find(given), uint8_pixels.take(model, shipped_plan.without(given))
    pixels = [name for name in uint8_pixels.NAMES.values() if given.get(name) is not None]
    if not pixels:
        if sharded.waited_for(model, given):
            given = given | {"input_ids": None, "inputs_embeds": sharded.embeds_of_text(model, given)}
        return stock(model, "forward", given)
    why = hf_inputs.unfit(model, given) or (None if given.get("input_ids") is not None else "input_ids are not given")
    if why is None:
        ids, selection = given["input_ids"], hf_inputs.select(model, given)
        table = hf_inputs.reads_table(model.get_input_embeddings())
        try:
            if plan is not None:
                visuals = shipped_plan.visuals(model, given, plan, table)
            else:
                integers = integers or _integers(model, given)
                told = given | {"vision_aspect_ratio": None}  # the stock forward goes by the config, whatever is given
                visuals = hf_inputs.plan_visuals(model, told, integers, selection, table)
        except ImageError as error:
            why = str(error)
    if why is not None:
        tell_stock(model, "the image path", why)
        return stock(model, "forward", uint8_pixels.normalise(given, uint8))
    embeds = hf_inputs.inputs_embeds(model, ids, visuals, selection, table, uint8)
    gone = dict.fromkeys(("input_ids", "image_sizes", *pixels))
    outputs = stock(model, "forward", given | gone | {"inputs_embeds": embeds})
    at, rows = visuals.placement, embeds.flatten(0, 1)
    if "pixel_values" in pixels:
        outputs["image_hidden_states"] = rows[at.place.long()]
    if "pixel_values_videos" in pixels:
        found = rows[at.video_place.long()]
        outputs["video_hidden_states"] = found.flatten() if _flattens_videos(model) else found
    return outputs


def generate(model: nn.Module, *args, **kwargs):
    """The stock generate without a plan: it would spread the plan's columns over beams, and take the prompt apart."""
    return type(model).generate(model, *args, **shipped_plan.without(kwargs))


def _flattens_videos(model: nn.Module) -> bool:
    """Whether video_hidden_states has one dimension, as LLaVA-NeXT-Video's has since generate encodes ahead."""
    ahead = "mm_encoder_outputs" in stock_signature(type(model), "forward").parameters
    return ahead and model.config.model_type == "llava_next_video"


def prepare_inputs(model: nn.Module, *args, **kwargs) -> dict:
    """The stock step of generate that says what forward takes: uint8 pixels come and go as normalised ones do."""
    came = [name for name in uint8_pixels.NAMES if kwargs.get(name) is not None]
    given = {name: value for name, value in kwargs.items() if name not in came}
    given |= {uint8_pixels.NAMES[name]: kwargs[name] for name in came}
    made = type(model).prepare_inputs_for_generation(model, *args, **given)
    return made | {name: made.pop(uint8_pixels.NAMES[name], None) for name in came}


def encode_for_generation(model: nn.Module, *args, **kwargs):
    """The stock step of generate that encodes images and videos ahead, with features made here."""
    given = by_name(model, ENCODE, args, kwargs)
    options, uint8 = uint8_pixels.take(model.model, given["model_kwargs"])
    for name, method in (("pixel_values", "get_image_features"), ("pixel_values_videos", "get_video_features")):
        if name in uint8 and not is_replaced(model.model, method):
            options |= uint8_pixels.normalise(options, {name: uint8.pop(name)})
    token = _encoding.set(uint8)
    try:
        return stock(model, ENCODE, given | {"model_kwargs": options})
    finally:
        _encoding.reset(token)


def inner_image_features(model: nn.Module, *args, **kwargs):
    """Within generate, image features alone; elsewhere the stock method, whose result shows the whole tower."""
    return _features(model, "get_image_features", args, kwargs)


def inner_video_features(model: nn.Module, *args, **kwargs):
    """Within generate, video features alone; elsewhere the stock method."""
    return _features(model, "get_video_features", args, kwargs)


def _features(model: nn.Module, method: str, args: tuple, kwargs: dict):
    encoding = _encoding.get()
    if torch.compiler.is_compiling() or encoding is None:
        return getattr(type(model), method)(model, *args, **kwargs)
    given = by_name(model, method, args, kwargs)
    uint8 = {name: normalisation for name, normalisation in encoding.items() if name in given}
    why = hf_inputs.unfit(model, given)
    if why is None:
        selection = hf_inputs.select(model, given)
        try:
            visuals = hf_inputs.plan_visuals(model, given, _integers(model, given), selection)
        except ImageError as error:
            why = str(error)
    if why is not None:
        tell_stock(model, "the image path", why)
        return stock(model, method, uint8_pixels.normalise(given, uint8))
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    rows: list[Tensor] | Tensor = hf_inputs.feature_list(model, visuals, selection, uint8)
    return BaseModelOutputWithPooling(pooler_output=rows if method == "get_image_features" else torch.stack(rows))
