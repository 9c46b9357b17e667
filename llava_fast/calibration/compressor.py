"""GPTQ and AWQ by llm-compressor, on transformers' model of the decoder.

Only the decoder is given to llm-compressor, with this package's inputs_embeds as its inputs. Its sequential pipeline
traces a model to cut it into layers; tower, projector and placement, which differ with each family, are then not
traced, and every family whose decoder transformers has can be calibrated, in the original layouts too.

Source: vllm-project/llm-compressor 0.14 (entrypoints/oneshot, modifiers/gptq, modifiers/transform/awq).
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llava_fast.errors import MissingPackageError, QuantisationError
from llava_fast.models.blocks.attention import Spans
from llava_fast.models.decoders.base import BaseDecoder
from llava_fast.models.quantised import Rounding
from llava_fast.ops.quantised_linear import QuantisedWeight, packing
from llava_fast.ops.quantised_linear.reference import pack
from llava_fast.storage.files import one_line

Method = Literal["gptq", "awq"]
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""How far hidden states of transformers' decoder and this package's may differ by rounding, relative to their norm."""


def check_installed() -> None:
    """Raises MissingPackageError without llm-compressor."""
    try:
        import llmcompressor  # noqa: F401
    except ImportError:
        otherwise = ", in an environment of its own if it asks for another transformers (docs/quantisation.md)"
        raise MissingPackageError("calibration", "llmcompressor", "calibrate", otherwise) from None


@torch.no_grad()
def compress(
    decoder: BaseDecoder, roundings: Mapping[str, Rounding], rows: list[Tensor], method: Method
) -> tuple[dict[str, QuantisedWeight], dict[str, Tensor]]:
    """(quantised weights of the modules named in `roundings`, the layers' other parameters, which AWQ changes), by
    their names in the decoder. rows: inputs_embeds [rows, width] of each sample.

    Raises QuantisationError for too few rows and for a decoder that llm-compressor cannot run.
    """
    family, count = decoder.config.family, sum(map(len, rows))
    linears: list[Any] = [decoder.get_submodule(name) for name in roundings]
    widest = max(linear.in_features for linear in linears)
    if method == "gptq" and count < widest:
        raise QuantisationError(
            f"{len(rows)} samples give {count} rows, fewer than the {widest} inputs of the widest Linear, which do not "
            "determine GPTQ's Hessian: give more samples"
        )
    try:
        model = _transformers_model(decoder)
    except (AttributeError, KeyError, ValueError) as problem:
        said = f"transformers has no {family} decoder with these weights ({one_line(problem)[:200]})"
        raise QuantisationError(f"{said}, and llm-compressor calibrates its models alone") from problem
    _check_same(model, decoder, rows[0])
    prefix = f"{model.base_model_prefix}."
    try:
        layers: Any = model.get_submodule(prefix + decoder.config.layers_name)
        _run(model, type(layers[0]).__name__, {prefix + name: each for name, each in roundings.items()}, rows, method)
    except Exception as problem:  # many unrelated types: tracing runs transformers' code
        what = f"llm-compressor cannot calibrate this {family} decoder by {method.upper()}"
        hint = "; use method gptq" if method == "awq" else ""
        raise QuantisationError(f"{what}: {type(problem).__name__}: {one_line(problem)[:400]}{hint}") from problem
    weights = {}
    for name, each in roundings.items():
        old: Any = decoder.get_submodule(name)
        weights[name] = _weight(model.get_submodule(prefix + name), each).to(old.weight.device)
    inside = f"{decoder.config.layers_name}."
    others = {
        name: model.get_parameter(prefix + name).detach().to(parameter.device)
        for name, parameter in decoder.named_parameters()
        if name.startswith(inside) and name.removesuffix(".weight") not in roundings
    }
    return weights, others


def _transformers_model(decoder: BaseDecoder) -> Any:
    """transformers' causal language model with this decoder's parameters, those of its layers copied."""
    from accelerate import init_empty_weights
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = decoder.config
    hf = CONFIG_MAPPING[config.family].from_dict(config.to_hf5() | {"pad_token_id": None})
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(hf)
    for name, parameter in decoder.named_parameters():
        where = name if name.startswith("lm_head.") else f"{model.base_model_prefix}.{name}"
        copied = name.startswith(f"{config.layers_name}.")
        owner, _, leaf = where.rpartition(".")
        value = parameter.detach().clone() if copied else parameter.detach()
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    model.tie_weights()
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta and name.startswith("lm_head."):  # Phi's bias; nobody computes logits here
            embedding: Any = decoder.embed_tokens
            zeros = torch.zeros_like(parameter, device=decoder.device, dtype=embedding.weight.dtype)
            setattr(model.lm_head, name.removeprefix("lm_head."), nn.Parameter(zeros, requires_grad=False))
        elif parameter.is_meta:
            raise ValueError(f"this model lacks its {name}")
    return model.to(decoder.device).eval()


def _check_same(model: Any, decoder: BaseDecoder, rows: Tensor) -> None:
    """Raise QuantisationError unless both give about the same hidden states."""
    ours = decoder(rows, torch.arange(len(rows), device=rows.device), Spans((0,), (len(rows),))).float()
    theirs = model.base_model(inputs_embeds=rows[None], use_cache=False).last_hidden_state[0].float()
    error = float((ours - theirs).norm() / ours.norm())
    if not error <= _TOLERANCE[rows.dtype]:
        raise QuantisationError(
            f"transformers' {decoder.config.family} decoder does not compute what this model's does (hidden states "
            f"differ by {error:.1e} of their norm), so calibration would fit another model"
        )


def _run(model: Any, layer: str, roundings: Mapping[str, Rounding], rows: list[Tensor], method: Method) -> None:
    """Quantise the modules named in `roundings`, layer by layer; layer: the class of the layers."""
    from llmcompressor import oneshot
    from llmcompressor.core import reset_session
    from llmcompressor.logger import LoggerConfig, configure_logger
    from torch.utils.data import DataLoader

    configure_logger(LoggerConfig(console_log_level="WARNING", metrics_disabled=True))
    batches: Any = [{"inputs_embeds": each[None]} for each in rows]
    with contextlib.ExitStack() as stack:
        stack.enter_context(_named_on_disk(model))
        stack.enter_context(_without_pinning())
        stack.callback(reset_session)  # it holds the model
        oneshot(
            model=model,
            processor=object(),  # it is asked for though batches are ready
            recipe=_recipe(roundings, method),
            dataset=DataLoader(batches, batch_size=None, shuffle=False),
            num_calibration_samples=len(batches),
            pipeline="sequential",
            sequential_targets=[layer],
        )


@contextlib.contextmanager
def _named_on_disk(model: Any) -> Iterator[None]:
    """While the model's config lies in a directory that it names, where llm-compressor reads it."""
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        model.config.name_or_path = folder
        yield


@contextlib.contextmanager
def _without_pinning() -> Iterator[None]:
    """Without an accelerator: AWQ of llm-compressor 0.14 pins cached inputs for one, and fails where there is none."""
    from llmcompressor.pipelines.cache import IntermediatesCache

    if torch.accelerator.is_available():
        yield
        return
    pin = IntermediatesCache.pin_memory
    IntermediatesCache.pin_memory = lambda *_, **__: None
    try:
        yield
    finally:
        IntermediatesCache.pin_memory = pin


def _recipe(roundings: Mapping[str, Rounding], method: Method) -> list[Any]:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    groups = {}
    for number, rounding in enumerate(dict.fromkeys(roundings.values())):
        weights = QuantizationArgs(
            num_bits=8 if rounding.scheme == "int8" else 4,
            symmetric=rounding.symmetric,
            strategy="channel" if rounding.group is None else "group",
            group_size=rounding.group,
            scale_dtype=torch.bfloat16,  # so that files in 16 bits hold the scales exactly, as with rounding to nearest
        )
        names = [name for name, each in roundings.items() if each == rounding]
        groups[f"group_{number}"] = QuantizationScheme(targets=names, weights=weights)
    if method == "gptq":
        return [GPTQModifier(config_groups=groups)]
    return [AWQModifier(), QuantizationModifier(config_groups=groups)]


def _weight(module: Any, rounding: Rounding) -> QuantisedWeight:
    """From a module that llm-compressor has quantised: its weight, scales and signed zero points."""
    weight, scale, zero = (getattr(module, f"weight{part}").detach() for part in ("", "_scale", "_zero_point"))
    scale = scale.float()
    bits, half = (8, 128) if rounding.scheme == "int8" else (4, 8)
    groups = weight.float().unflatten(1, (scale.shape[1], -1))
    zero = zero.float()
    codes = ((groups / scale[..., None]).round() + zero[..., None]).clamp(-half, half - 1).flatten(1)
    codes = (codes + half).to(torch.uint8)
    zero = None if rounding.symmetric else (zero + half).to(torch.uint8)
    return packing.weight_of(bits, codes if bits == 8 else pack(codes), scale, zero)
