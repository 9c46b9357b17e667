"""`accelerate(model)`: a Hugging Face LLaVA that is already loaded, faster and in less memory, with the same answers.

Methods of two modules are replaced, by instance (see `replacement`); classes, parameters and state_dict keys stay:

- the whole model's forward: with labels, the loss and its gradients are made of supervised rows alone, by
  ops.linear_cross_entropy;
- the inner model's forward: the tower stops at the selected layer, only kept rows are projected, and every row is put
  in its place by integers (see `hf_inputs`);
- the inner model's get_image_features: the same, but only while generate encodes images ahead of the prompt. A direct
  call still runs the whole tower, for its result shows the last hidden state;
- generate: it leaves out a collator's plan (`llava_plan_*`, see `shipped_plan`), which forward takes.

The decoder's own layers are left as they are. A call that a replacement does not serve takes the stock path, and says
so once in the log `llava_fast.integrations`. A graph that torch.compile traces is the stock one.
"""

from __future__ import annotations

import contextvars
import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from llava_fast.errors import ImageError, LlavaFastError
from llava_fast.integrations import hf_inputs, shipped_plan
from llava_fast.integrations.placement import Integers, read_integers, supervised_rows, to_device
from llava_fast.integrations.replacement import (
    TOLD,
    by_name,
    is_replaced,
    logger,
    put_back,
    replace,
    stock,
    tell_stock,
)
from llava_fast.models.modules import is_plain
from llava_fast.ops import linear_cross_entropy

SUPPORTED = (
    "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
    "LlavaNextVideoForConditionalGeneration",
)
ENCODE = "_prepare_multimodal_encoder_kwargs_for_generation"
SKIPS_LOGITS = "_llava_fast_skips_training_logits"
INTEGERS = "llava_fast_integers"
_encoding: contextvars.ContextVar[bool] = contextvars.ContextVar("llava_fast_encoding", default=False)


class UnsupportedModelError(LlavaFastError):
    """A model that `accelerate` does not know."""


def accelerate(model: nn.Module, processor=None, *, training_logits: bool = True) -> nn.Module:
    """Speed up a transformers LLaVA in place, and return it. `restore` undoes it.

    model           a Llava, LlavaNext or LlavaNextVideo ForConditionalGeneration, or a wrapper that holds one (PEFT).
                    Videos take the stock path.
    processor       not used yet: for uint8 pixels, which are not served.
    training_logits False: in training mode, a call with labels gives its loss alone, and `logits` is None; the table of
                    logits [B, S, vocabulary] is then never made. True: logits are given, as the stock model does.
    Raises UnsupportedModelError for any other model.
    """
    whole = find(model)
    done = []
    for module, name, function, what in _replacements(whole):
        if replace(module, name, function, shipped_plan.NAMES if function is whole_forward else ()):
            done.append(what)
        else:
            logger.warning("%s stays: its %s was replaced by someone else", what, name)
    vars(whole)[SKIPS_LOGITS] = not training_logits
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
        for name in (TOLD, SKIPS_LOGITS):
            vars(module).pop(name, None)
    return model


def replaced(model: nn.Module) -> list[str]:
    """What of a model is replaced now, in words."""
    return [what for module, name, _, what in _replacements(find(model)) if is_replaced(module, name)]


def _replacements(whole: nn.Module) -> Iterator[tuple]:
    """(module, method, function, what it does in words)."""
    yield whole, "forward", whole_forward, "the loss (supervised rows only)"
    yield whole, "generate", generate, "generate (it leaves out a collator's plan)"
    yield whole.model, "forward", inner_forward, "the tower's run (stops at the selected layer), projection, placement"
    if hasattr(type(whole), ENCODE):
        yield whole, ENCODE, encode_for_generation, "generate's encoding of images"
        yield whole.model, "get_image_features", inner_image_features, "image features for generate"


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
        return type(model).forward(model, *args, **shipped_plan.without(kwargs))
    given = by_name(model, "forward", args, kwargs)
    plan = shipped_plan.find(given)
    if not is_replaced(model.model, "forward"):
        given = shipped_plan.without(given)
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
        integers = read_integers(given.get("input_ids"), _sizes(model.model, given), labels)
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
    if not is_plain(head, nn.Linear) or type(head.weight) is not nn.Parameter:
        return "the output head is hooked, wrapped or not an exact nn.Linear"
    if head.bias is not None and type(head.bias) is not nn.Parameter:
        return "the output head's bias is not an ordinary parameter"
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


def _sizes(inner: nn.Module, given: dict):
    """image_sizes where they are read: only with pixels, and only AnyRes models do."""
    wanted = given.get("pixel_values") is not None and inner.config.model_type in hf_inputs.ANYRES
    return given.get("image_sizes") if wanted else None


def inner_forward(model: nn.Module, *args, **kwargs):
    """The stock forward of decoder inputs made here from ids and pixels."""
    integers: Integers | None = kwargs.pop(INTEGERS, None)
    if torch.compiler.is_compiling():
        return type(model).forward(model, *args, **shipped_plan.without(kwargs))
    given = by_name(model, "forward", args, kwargs)
    plan, given = shipped_plan.find(given), shipped_plan.without(given)
    if given.get("pixel_values") is None:
        return stock(model, "forward", given)
    why = hf_inputs.unfit(model, given) or (None if given.get("input_ids") is not None else "input_ids are not given")
    if why is None:
        ids, selection = given["input_ids"], hf_inputs.select(model, given)
        table = hf_inputs.reads_table(model.get_input_embeddings())
        try:
            if plan is not None:
                images = shipped_plan.images(model, given, plan, table)
            else:
                integers = integers or read_integers(ids, _sizes(model, given))
                images = hf_inputs.plan_images(model, given["pixel_values"], integers, selection, table)
        except ImageError as error:
            why = str(error)
    if why is not None:
        tell_stock(model, "the image path", why)
        return stock(model, "forward", given)
    embeds = hf_inputs.inputs_embeds(model, ids, images, selection, table)
    rest = given | {"input_ids": None, "pixel_values": None, "image_sizes": None, "inputs_embeds": embeds}
    outputs = stock(model, "forward", rest)
    outputs["image_hidden_states"] = embeds.flatten(0, 1)[images.placement.place.long()]
    return outputs


def generate(model: nn.Module, *args, **kwargs):
    """The stock generate without a plan: it would spread the plan's columns over beams, and take the prompt apart."""
    return type(model).generate(model, *args, **shipped_plan.without(kwargs))


def encode_for_generation(model: nn.Module, *args, **kwargs):
    """The stock step of generate that encodes images ahead, with image features made here."""
    token = _encoding.set(True)
    try:
        return stock(model, ENCODE, by_name(model, ENCODE, args, kwargs))
    finally:
        _encoding.reset(token)


def inner_image_features(model: nn.Module, *args, **kwargs):
    """Within generate, image features alone; elsewhere the stock method, whose result shows the whole tower."""
    if torch.compiler.is_compiling() or not _encoding.get():
        return type(model).get_image_features(model, *args, **kwargs)
    given = by_name(model, "get_image_features", args, kwargs)
    if given.get("pixel_values") is None:
        return stock(model, "get_image_features", given)
    why = hf_inputs.unfit(model, given)
    if why is None:
        selection = hf_inputs.select(model, given)
        try:
            integers = read_integers(None, _sizes(model, given))
            images = hf_inputs.plan_images(model, given["pixel_values"], integers, selection)
        except ImageError as error:
            why = str(error)
    if why is not None:
        tell_stock(model, "the image path", why)
        return stock(model, "get_image_features", given)
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    return BaseModelOutputWithPooling(pooler_output=hf_inputs.image_features(model, images, selection))
