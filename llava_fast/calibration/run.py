"""`calibrate`: quantise a loaded model with samples of training data, by GPTQ or AWQ of llm-compressor."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_args

from torch import nn

from llava_fast.calibration.compressor import Method, check_installed, compress
from llava_fast.calibration.rows import calibration_rows
from llava_fast.errors import QuantisationError
from llava_fast.generation.llava import Llava
from llava_fast.models.fused import split_linears
from llava_fast.models.quantised import Quantisation, check_no_precision, is_quantised, plan, put

Progress = Callable[[Iterable[int]], Iterable[int]]


def calibrate(
    model: Llava,
    data: str | Path,
    quantize: Quantisation | str = "int4",
    *,
    method: Method = "gptq",
    samples: int | None = None,
    images: str | Path | None = None,
    seed: int = 0,
    progress: Progress = iter,
) -> Llava:
    """Quantise a loaded model in place with calibration data; returns it, to be used or saved (llava_fast.save).

    data      training data in LLaVA's format: .json, .jsonl, a glob, or a .yaml mixture. Whole conversations are read,
              with their images and videos, by the model's own processor.
    quantize  as for `load`. The Linears of the decoder's layers are calibrated. Head, embedding, tower and projector
              are rounded to nearest if Quantisation names them.
    method    "gptq" (Frantar et al. 2022): rounds a weight column by column and corrects the columns that follow.
              "awq" (Lin et al. 2023): scales channels by their activations, then rounds to nearest; it changes norms
              and biases too.
    samples   how many to draw, by `seed`. Default: 256, or all if there are fewer.
    images    the folder to which image paths are relative. Default: that of the data file.
    progress  wraps the iteration over the samples as they are read, like tqdm. llm-compressor shows bars of its own.

    The decoder runs as transformers' model of its kind, layer by layer; each layer's inputs come from the quantised
    layers before it. Memory: a copy of the decoder's layers, and twice the samples' rows [rows, width] in its dtype.

    Raises MissingPackageError without llm-compressor; DataError for data that is missing, has no images or too few
    samples; QuantisationError for a quantised model, one loaded with `precision`, an unknown method, too few rows, and
    a decoder that llm-compressor cannot run. Weights are then unchanged, but Linears that were merged may be split.
    """
    quantisation = Quantisation.of(quantize)
    check_request(method, samples, model)
    split_linears(model)
    roundings = plan(model, quantisation)
    inside = f"decoder.{model.config.decoder.layers_name}."
    calibrated = {
        name.removeprefix("decoder."): rounding for name, rounding in roundings.items() if name.startswith(inside)
    }
    rows = calibration_rows(model, data, images, samples, seed, progress)
    weights, others = compress(model.decoder, calibrated, rows, method)
    for name, tensor in others.items():
        owner, _, leaf = name.rpartition(".")
        module = model.decoder.get_submodule(owner)
        setattr(module, leaf, nn.Parameter(tensor, requires_grad=getattr(module, leaf).requires_grad))
    for name, rounding in roundings.items():
        old: Any = model.get_submodule(name)
        weight = weights.get(name.removeprefix("decoder.")) or rounding.of(old.weight.detach())
        put(model, name, weight, old.weight.dtype)
    return model


def check_request(method: str, samples: int | None, model: Llava | None = None) -> None:
    """Raise what `calibrate` would raise before it reads data, and without a model before one is loaded."""
    if method not in get_args(Method):
        raise QuantisationError(f"method is {method!r}: use {' or '.join(map(repr, get_args(Method)))}")
    if samples is not None and samples < 1:
        raise QuantisationError(f"samples is {samples}: use 1 or more")
    if model is not None and is_quantised(model):
        raise QuantisationError("the model is quantised already: calibrate the checkpoint that it was made from")
    if model is not None:
        check_no_precision(model)
    check_installed()
