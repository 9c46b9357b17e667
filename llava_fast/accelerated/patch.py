"""`accelerate(model)`: makes a loaded Hugging Face LLaVA faster and smaller in memory, with the same answers.

Methods of the model and of its parts are replaced on the instance (see `replacement`). Classes, parameters and
state_dict keys do not change.

- The whole model's forward: with labels, the loss and its gradients are computed from supervised rows only, by
  ops.linear_cross_entropy.
- The inner model's forward: the tower stops at the selected layer, only kept rows of images and videos are projected,
  and every row is placed by integer indices (see `encode`).
- The inner model's get_image_features and get_video_features: the same, but only while generate encodes images before
  the prompt. A direct call runs the whole tower, since its result includes the last hidden state.
- generate: drops a collator's plan (`llava_plan_*`, see `shipped_plan`), which only forward uses.
- prepare_inputs_for_generation: passes uint8 pixels (see `uint8_pixels`) only to the first step, like normalised ones.
- The forwards of the decoder's RMSNorm, MLP and attention: RMSNorm, SwiGLU and RoPE run as one op each if that is
  faster, otherwise as stock, without a log entry (see `decoder`).

A call that another replacement does not support takes the stock path; so does a call that fails here, and every call of
a method that differs in this version of transformers according to a check on a tiny model (see `self_check`). This is
logged once in `llava_fast.integrations`. torch.compile traces the stock methods.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llava_fast.accelerated import decoder, encode, self_check, sharded, shipped_plan, uint8_pixels, versions
from llava_fast.accelerated.encode import Unfit
from llava_fast.accelerated.outputs import KINDS, encoder_outputs, field_names, output_class, show_encoder, with_rows
from llava_fast.accelerated.replacement import (
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
from llava_fast.accelerated.self_check import ENCODE, ENCODING, IMAGE_PATH, LOSS
from llava_fast.accelerated.stock import StockModel
from llava_fast.accelerated.transfer import read_integers
from llava_fast.errors import ImageError, LlavaFastError, UnsupportedModelError
from llava_fast.inputs.plan.from_ids import Integers, supervised_rows
from llava_fast.models.fused.gate import is_plain
from llava_fast.models.placement import to_device
from llava_fast.ops import linear_cross_entropy

SUPPORTED = tuple(KINDS)
NEW_NAMES = (*shipped_plan.NAMES, *uint8_pixels.NAMES)
"""Keywords of the whole model's forward in addition to the stock ones."""
KEYWORDS = (
    "output_attentions output_hidden_states return_dict use_cache cache_position past_key_values logits_to_keep labels "
    "num_items_in_batch cu_seq_lens_q cu_seq_lens_k max_length_q max_length_k seq_idx"
).split()
"""Arguments that callers pass to an inner model beyond its forward's parameters, and that only the decoder reads."""
SKIPS_LOGITS = "_llava_fast_skips_training_logits"
INTEGERS = "llava_fast_integers"
_encoding: contextvars.ContextVar[dict | None] = contextvars.ContextVar("llava_fast_encoding", default=None)
"""While generate encodes images and videos: argument name -> normalisation still needed (see uint8_pixels.take)."""


def accelerate(model: nn.Module, processor=None, *, training_logits: bool = True) -> nn.Module:
    """Speed up a transformers LLaVA in place, and return it. `restore` undoes it.

    model           a Llava, LlavaNext, LlavaNextVideo or LlavaOnevision ForConditionalGeneration, or a wrapper that
                    holds one (PEFT).
    processor       the model's processor, which defines the pixel normalisation. With it the model also accepts the
                    uint8 tiles of FastProcessor(output="uint8") as `pixel_values_uint8` (for videos
                    `pixel_values_videos_uint8`); without it they raise uint8_pixels.PixelError. Do not restore a model
                    that gets uint8 pixels: a stock model's generate raises for these names, but its forward ignores
                    them and answers as if there were no image.
    training_logits False: in training mode, a call with labels returns only its loss and `logits` is None, so that
                    logits [B, S, vocabulary] are never materialised. True: logits are returned as by the stock model.
    Raises UnsupportedModelError for any other model, PixelError for a processor without image settings.
    """
    versions.warn_if_untried()
    whole = find(model)
    done: dict[str, None] = {}  # an ordered set: a decoder's layers repeat descriptions
    stays: dict[str, str] = {}
    unlike = self_check.reasons(whole.model, accelerate, thorough=True)
    for module, name, function, what in _replacements(whole):
        if what in unlike:
            tell_stock(whole, what, unlike[what])
        elif replace(module, name, function, NEW_NAMES if function is whole_forward else ()):
            done[what] = None
        else:
            stays[what] = name
    for what, name in stays.items():
        logger.warning("%s is left unchanged: its %s was replaced by other code", what, name)
    setattr(whole, SKIPS_LOGITS, not training_logits)
    if processor is not None:
        uint8_pixels.remember(whole.model, processor)
    logger.info("%s: replaced %s", type(whole).__name__, "; ".join(done) or "nothing")
    return model


def _unlike_known(inner: StockModel) -> Mapping[str, str]:
    """Part -> why it takes the stock path in models of this class (see `self_check`)."""
    return self_check.reasons(inner, accelerate)


def restore(model: nn.Module) -> nn.Module:
    """Undo `accelerate` in place, also on a copy of an accelerated model, and return the model. A model that is not
    accelerated does not change."""
    wholes = [module for module in model.modules() if SKIPS_LOGITS in vars(module)]
    for module, name, _, what in [each for whole in wholes for each in _replacements(whole)]:
        if name in vars(module) and not put_back(module, name):
            logger.warning("%s is not restored: other code has wrapped %s.%s since", what, type(module).__name__, name)
    for module in model.modules():
        for name in (TOLD, SKIPS_LOGITS, uint8_pixels.SETTING):
            vars(module).pop(name, None)
    return model


def replaced(model: nn.Module) -> list[str]:
    """Descriptions of what is currently replaced in a model."""
    done = (what for module, name, _, what in _replacements(find(model)) if is_replaced(module, name))
    return list(dict.fromkeys(done))


def _replacements(whole: nn.Module) -> Iterator[tuple]:
    """(module, method, replacement, description)."""
    yield whole, "forward", whole_forward, "the loss (supervised rows only)"
    yield whole, "generate", generate, "generate (it leaves out a collator's plan)"
    yield whole, "prepare_inputs_for_generation", prepare_inputs, "the inputs of generate's steps (uint8 pixels)"
    yield whole.model, "forward", inner_forward, "the tower's run (stops at the selected layer), projection, placement"
    if hasattr(type(whole), ENCODE):
        yield whole, ENCODE, encode_for_generation, "generate's encoding of images"
        if hasattr(type(whole.model), "get_image_features"):
            yield whole.model, "get_image_features", inner_image_features, "image features for generate"
        if hasattr(type(whole.model), "get_video_features"):
            yield whole.model, "get_video_features", inner_video_features, "video features for generate"
    yield from decoder.replacements(whole)


def find(model: nn.Module) -> StockModel:
    """The transformers LLaVA that is `model` or inside it. Raises UnsupportedModelError."""
    import transformers

    kinds = tuple(getattr(transformers, name) for name in SUPPORTED)
    for module in model.modules():
        if isinstance(module, kinds):
            kind = next(kind for kind in kinds if isinstance(module, kind))
            if type(module).forward is kind.forward:
                return module
    raise UnsupportedModelError(
        f"accelerate does not support {type(model).__name__}, only {', '.join(SUPPORTED)} of transformers"
    )


def whole_forward(model: StockModel, *args, **kwargs):
    """The stock forward; with labels, the loss is computed from supervised rows only."""
    if torch.compiler.is_compiling():
        return type(model).forward(model, *args, **_as_stock(model.model, kwargs))
    given = by_name(model, "forward", args, kwargs)
    plan = shipped_plan.find(given)
    if not is_replaced(model.model, "forward"):
        given = _as_stock(model.model, given)
    labels = given.get("labels")
    if labels is None:
        return stock(model, "forward", given)
    made, why = _attempt(model.model, lambda: _rows_of_loss(model, given, plan))
    if why is not None:
        tell_stock(model, LOSS, why)
    if made is None:
        return stock(model, "forward", given)
    rows, targets, kind, inner = made
    outputs = model.model(**inner, return_dict=True)
    hidden = outputs[0]
    rows, targets = rows.to(hidden.device), targets.to(hidden.device)
    loss = _loss(model.lm_head, hidden.flatten(0, 1)[rows.long()], targets)
    count = given.get("num_items_in_batch")
    loss = loss / (len(rows) if count is None else count.to(loss.device) if isinstance(count, Tensor) else count)
    skips = model.training and torch.is_grad_enabled() and vars(model).get(SKIPS_LOGITS, False)
    parts = {name: value for name, value in outputs.items() if name in field_names(kind)}
    return kind(loss=loss, logits=None if skips else model.lm_head(hidden), **parts)


def _attempt(inner: StockModel, make: Callable[[], Any]) -> tuple[Any, str | None]:
    """(the result of `make`, None), or (None, why the stock path must run, which then raises its own error).

    Errors about plans, uint8 pixels and backends are raised, since no stock model has these. For a sharded model all
    errors are raised: other processes wait for this one, so the call cannot run again."""
    try:
        return make(), None
    except Unfit as found:
        return None, str(found)
    except ImageError as error:
        return None, str(error)
    except (LlavaFastError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if sharded.is_sharded(inner):
            raise
        return None, f"it failed here ({type(error).__name__}: {error})"


def _rows_of_loss(model: StockModel, given: dict, plan: dict | None) -> tuple | None:
    """(rows with a label, their targets, the output class, the inner model's arguments); None if the stock model gives
    NaN or raises. Raises Unfit."""
    labels, kind = given["labels"], output_class(model)
    if why := _unlike_known(model.model).get(LOSS) or unfit_for_loss(model, given):
        raise Unfit(why)
    inner = {name: value for name, value in given.items() if name not in ("labels", "logits_to_keep", "return_dict")}
    if plan is not None and len(plan["supervised_row"]):
        return *shipped_plan.supervision(plan, labels), kind, inner
    integers = _integers(model.model, given, labels)
    assert integers.labels is not None
    on_host = supervised_rows(integers.labels)
    if not len(on_host[0]) or on_host[1].min() < 0 or on_host[1].max() >= len(model.lm_head.weight):
        return None
    if is_replaced(model.model, "forward"):
        inner[INTEGERS] = integers
    rows, targets = to_device(dict(zip(("rows", "targets"), on_host, strict=True)), labels.device).values()
    return rows, targets, kind, inner


def _loss(head: nn.Linear, hidden: Tensor, targets: Tensor) -> Tensor:
    """The sum of the rows' losses; under autocast in autocast's dtype, like the head's own product."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
    bias = None if head.bias is None else head.bias.to(dtype)
    with torch.autocast(device, enabled=False):
        return linear_cross_entropy(hidden.to(dtype), head.weight.to(dtype), targets, bias).sum()


def unfit_for_loss(model: StockModel, given: dict) -> str | None:
    """Why the loss of this call of a whole model must be computed by the stock path, or None."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    head, labels, ids = model.lm_head, given["labels"], given.get("input_ids")
    if not is_plain(head, nn.Linear):
        return "the output head is hooked, wrapped, sharded or not an exact nn.Linear"
    if model.loss_function is not ForCausalLMLoss:
        return "the model has its own loss function"
    for name in ("shift_labels", "ignore_index"):
        if given.get(name) is not None:
            return f"{name} is given"
    keep = given.get("logits_to_keep", 0)
    if isinstance(keep, Tensor) or keep:
        return "logits_to_keep is given"
    return_dict = given.get("return_dict")
    if not (model.config.return_dict if return_dict is None else return_dict):
        return "a tuple is asked for (return_dict=False)"
    if labels.dim() != 2 or (ids is not None and ids.shape != labels.shape):
        return f"labels of shape {tuple(labels.shape)}"
    return None


def _integers(inner: StockModel, given: dict, labels: Tensor | None = None) -> Integers:
    """The integers of a call: image_sizes and batch_num_images only with pixels, and only if the model uses them."""
    family = inner.config.model_type
    tiled = any(given.get(name) is not None for name in ("pixel_values", "pixel_values_uint8"))
    sizes = given.get("image_sizes") if tiled and family in encode.ANYRES else None
    counts = given.get("batch_num_images") if tiled and family == "llava_onevision" else None
    return read_integers(given.get("input_ids"), sizes, labels, counts)


def _as_stock(inner: StockModel, given: dict) -> dict:
    """The arguments of a call for a stock model: without a plan and with normalised pixels."""
    return uint8_pixels.normalise(*uint8_pixels.take(inner, shipped_plan.without(given)))


def inner_forward(model: StockModel, *args, **kwargs):
    """The stock forward, with decoder inputs computed here from ids and pixels."""
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
    made, why = _attempt(model, lambda: _embedded(model, given, plan, uint8, integers))
    if why is not None:
        tell_stock(model, IMAGE_PATH, why)
        return stock(model, "forward", uint8_pixels.normalise(given, uint8))
    gone = dict.fromkeys(("input_ids", "image_sizes", *pixels))
    return with_rows(model, stock(model, "forward", given | gone | {"inputs_embeds": made.embeds}), made)


def _embedded(
    model: StockModel, given: dict, plan: dict | None, uint8: dict, integers: Integers | None
) -> encode.Embedded:
    """The decoder's inputs and their sources. Raises Unfit, ImageError."""
    why = _unlike_known(model).get(IMAGE_PATH) or encode.unfit(model, given) or _unknown_keyword(model, given)
    if why or given.get("input_ids") is None:
        raise Unfit(why or "input_ids are not given")
    selection = encode.select(model, given)
    if plan is not None:
        visuals = shipped_plan.visuals(model, given, plan)
    else:
        integers = integers or _integers(model, given)
        told = given | {"vision_aspect_ratio": None}  # the stock forward always uses the config's
        visuals = encode.plan_visuals(model, told, integers, selection)
    return encode.decoder_inputs(model, given["input_ids"], visuals, selection, uint8, show_encoder(model))


def _unknown_keyword(inner: StockModel, given: dict) -> str | None:
    """Why unknown keywords need the stock path, or None: a stock forward may pass them to the tower, as LLaVA's does
    since transformers 5.24."""
    named = stock_signature(type(inner), "forward").parameters
    new = [name for name in given if given[name] is not None and name not in named and name not in KEYWORDS]
    return f"{', '.join(new)} is given, which accelerate does not know" if new else None


def generate(model: StockModel, *args, **kwargs):
    """The stock generate without a plan, because it would repeat the plan's columns for beams and split the prompt."""
    return type(model).generate(model, *args, **shipped_plan.without(kwargs))


def prepare_inputs(model: StockModel, *args, **kwargs) -> dict:
    """The stock prepare_inputs_for_generation, which treats uint8 pixels like normalised ones."""
    came = [name for name in uint8_pixels.NAMES if kwargs.get(name) is not None]
    given = {name: value for name, value in kwargs.items() if name not in came}
    given |= {uint8_pixels.NAMES[name]: kwargs[name] for name in came}
    made = type(model).prepare_inputs_for_generation(model, *args, **given)
    return made | {name: made.pop(uint8_pixels.NAMES[name], None) for name in came}


def encode_for_generation(model: StockModel, *args, **kwargs):
    """The stock step of generate that encodes images and videos before the prompt, with features computed here."""
    if why := _unlike_known(model.model).get(ENCODING):
        tell_stock(model, ENCODING, why)
        return getattr(type(model), ENCODE)(model, *args, **kwargs)
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


def inner_image_features(model: StockModel, *args, **kwargs):
    """Image features, if called by generate; otherwise the stock method, whose result includes all of the tower's
    outputs.
    """
    return _features(model, "get_image_features", args, kwargs)


def inner_video_features(model: StockModel, *args, **kwargs):
    """Video features, if called by generate; otherwise the stock method."""
    return _features(model, "get_video_features", args, kwargs)


def _features(model: StockModel, method: str, args: tuple, kwargs: dict):
    encoding = _encoding.get()
    if torch.compiler.is_compiling() or encoding is None:
        return getattr(type(model), method)(model, *args, **kwargs)
    given = by_name(model, method, args, kwargs)
    uint8 = {name: normalisation for name, normalisation in encoding.items() if name in given}

    def make() -> Any:
        if why := encode.unfit(model, given):
            raise Unfit(why)
        selection = encode.select(model, given)
        visuals = encode.plan_visuals(model, given, _integers(model, given), selection)
        rows = encode.feature_list(model, visuals, selection, uint8)
        return encoder_outputs(rows if method == "get_image_features" else torch.stack(rows))

    made, why = _attempt(model, make)
    if why is not None:
        tell_stock(model, IMAGE_PATH, why)
        return stock(model, method, uint8_pixels.normalise(given, uint8))
    return made
