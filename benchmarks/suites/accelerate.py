"""`accelerate(model)` and FastProcessor against the stock transformers model and processor that they replace.

Five cases: a training step (its peak memory above weights and gradients is measured in a new process per side), one
decoder layer (from which 32 layers are estimated), a forward pass without gradients, and the processor with float32 and
with uint8 output. The tower is frozen. Projector, embeddings, decoder and head are trained. `summary` compares the rows
with their targets.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import checks
from benchmarks.case import Case, Provider, Row, Settings
from benchmarks.floors import Floor, Phase, decoder_flops, decoder_weights, prefill_floor, preprocess_floor, train_floor
from benchmarks.inputs import PROMPT, ROTATED, describe, inference, photographs, sizes
from benchmarks.memory import PeakMemory, peak_beside_gradients
from benchmarks.subject import Subject
from benchmarks.suites import train_step
from benchmarks.suites.preprocess import joined
from llava_fast.accelerated.patch import accelerate
from llava_fast.integrations.processor import FastProcessor

STOCK, FAST, WITH_LOGITS = "hf-eager", "accelerate", "accelerate, logits"
"""Stock; `accelerate(model, training_logits=False)`; and its default, which returns all logits in training too."""
STEP, LAYER, FORWARD, FLOATS, UINT8 = "training step", "one decoder layer", "forward", "to float32", "to uint8"
REAL_LAYERS = 32
SHORT = 10
"""Timed processor calls per timed training step."""


def cases(subject: Subject, settings: Settings) -> Iterator[Case]:
    settings = dataclasses.replace(settings, answer_tokens=settings.new_tokens)
    answer = train_step.answer(settings)
    ours = train_step.our_batch(subject, settings, 0, answer)
    supervised = settings.batch_size * settings.answer_tokens
    common = {
        "suite": "accelerate",
        "model": subject.label,
        "real_width": subject.real_width,
        "reference": STOCK,
    }
    size = describe(settings, ours)
    rows, itemsize = sum(ours.plan.lengths), subject.dtype.itemsize
    models = {STOCK: subject.hf, FAST: subject.hf_twin(), WITH_LOGITS: subject.hf_twin()}
    accelerate(models[FAST], training_logits=False)
    accelerate(models[WITH_LOGITS])
    batches = [train_step.hf_batch(subject, settings, number, answer) for number in range(ROTATED)]
    wide = {"items": rows, "unit": "rows", "weight_bytes": subject.weight_bytes}
    yield Case(
        label=f"{STEP}: {size}, {supervised} supervised",
        providers=[_step(name, model, batches, _peak(name, subject, settings)) for name, model in models.items()],
        check=checks.same_training(settings.dtype),
        floor=train_floor(subject.config, sizes(ours, supervised), itemsize),
        **common,
        **wide,
    )
    decoder = dataclasses.replace(subject.config.decoder, num_layers=1)
    pairs = sum(n * (n + 1) // 2 for n in ours.plan.lengths)
    moved = 3 * itemsize * decoder_weights(decoder)
    yield Case(
        label=f"{LAYER}, forward and backward: {rows} rows (peak: what its forward keeps)",
        providers=[_layer(name, models[name], ours.plan.lengths, subject) for name in (STOCK, FAST)],
        check=checks.same_training(settings.dtype),
        floor=Floor((Phase(3 * decoder_flops(decoder, rows, pairs), moved),)),
        **common,
        **wide,
    )
    unlabelled = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
    yield Case(
        label=f"{FORWARD}: {size}, every row's logits",
        providers=[_forward(name, models[name], unlabelled) for name in (STOCK, FAST)],
        check=checks.close("logits", settings.dtype),
        floor=prefill_floor(subject.config, sizes(ours, rows), itemsize),
        **common,
        **wide,
    )
    yield from _processor_cases(subject, settings, common, ours.plan.tiles)


def _step(name: str, model: nn.Module, batches: list[dict], peak: Callable[[], int | None] | None = None) -> Provider:
    """A step in training mode, in which accelerate may omit the logits. The model has no dropout."""

    def loss(number: int) -> Tensor:
        return model(**batches[number % len(batches)], use_cache=False).loss

    step = train_step.provider(name, model, loss)

    def prepare() -> None:
        model.train()
        step.prepare()

    return dataclasses.replace(step, prepare=prepare, peak=peak)


def _peak(name: str, subject: Subject, settings: Settings) -> Callable[[], int | None] | None:
    """Return None for small models, for which starting a process takes too long. The harness then measures the peak."""
    if not subject.real_width:
        return None

    def measure() -> int | None:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            given = (name, subject.model, subject.layers, str(subject.device), settings)
            return pool.submit(peak_of_step, *given).result()

    return measure


def peak_of_step(name: str, model: str, layers: int | None, device: str, settings: Settings) -> int | None:
    """Return the peak bytes of a step besides weights and their gradients, measured after a first step. To be called in
    a process of its own. On a CPU, tensors are counted (see memory.peak_beside_gradients). On CUDA, it is the
    allocator's peak of a step that accumulates into the first step's gradients."""
    torch.set_num_threads(settings.threads)
    subject = Subject(model, layers, settings.torch_dtype, device)
    try:
        if name != STOCK:
            accelerate(subject.hf, training_logits=name == WITH_LOGITS)
        batch = train_step.hf_batch(subject, settings, 0, train_step.answer(settings))
        step = _step(name, subject.hf, [batch])
        step.prepare()
        step.run(0)
        if subject.device.type == "cpu":
            step.finish()
            return peak_beside_gradients(lambda: step.run(0), subject.hf.parameters())
        with PeakMemory(subject.device) as peak:
            step.run(0)
        return peak.bytes
    finally:
        subject.close()


def _layer(name: str, model: nn.Module, lengths: Sequence[int], subject: Subject) -> Provider:
    """The first decoder layer on random rows. The result is the gradients of its weights and input."""
    decoder = model.model.language_model
    layer = decoder.layers[0]
    draws = torch.Generator().manual_seed(0)
    shape = (len(lengths), max(lengths), subject.config.decoder.hidden_size)
    inputs, upstream = (torch.randn(shape, generator=draws).to(subject.device, subject.dtype) for _ in range(2))
    positions = torch.arange(shape[1], device=subject.device)[None]
    with torch.no_grad():
        position_embeddings = decoder.rotary_emb(inputs, position_ids=positions)

    def forward(hidden: Tensor) -> Tensor:
        return layer(hidden, position_ids=positions, position_embeddings=position_embeddings)

    def prepare() -> None:
        model.train().requires_grad_(False)
        layer.requires_grad_(True)
        inputs.requires_grad_(True)

    def run(number: int) -> Tensor:
        output = forward(inputs)
        output.backward(upstream)
        return output.detach()

    def result(output: Tensor) -> dict[str, Tensor]:
        gradients = {key: train_step.digest(value.grad) for key, value in layer.named_parameters()}
        return {"output": train_step.digest(output), "input": train_step.digest(inputs.grad), **gradients}

    def finish() -> None:
        for value in (inputs, *layer.parameters()):
            value.grad = None

    def bytes_kept() -> int:
        """Count each tensor that the forward pass saves for the backward pass, except weights and the position tables,
        which are shared by all layers."""
        prepare()
        known = {value.untyped_storage().data_ptr() for value in (*layer.parameters(), *position_embeddings)}
        kept: dict[int, int] = {}
        alive = []  # keeps tensors alive, because addresses of freed ones are reused

        def keep(value: Tensor) -> Tensor:
            storage = value.untyped_storage()
            if storage.data_ptr() not in known:
                kept[storage.data_ptr()] = storage.nbytes()
                alive.append(storage)
            return value

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            output = forward(inputs)
        del output
        return sum(kept.values())

    return Provider(name, run, result, prepare, finish, peak=bytes_kept)


def _forward(name: str, model: nn.Module, batches: list[dict]) -> Provider:
    run = inference(lambda number: model(**batches[number % len(batches)]).logits)
    return Provider(name, run, prepare=model.eval)


def _processor_cases(subject: Subject, settings: Settings, common: dict, tiles: int) -> Iterator[Case]:
    """The whole processor including text. Stock is transformers' processor with its Pillow image processor."""
    batches = [photographs(settings, number) for number in range(ROTATED)]
    stock = subject.hf_processor
    images = stock.image_processor
    mean, std = (np.array(value, np.float32)[:, None, None] for value in (images.image_mean, images.image_std))

    def levels(pixels: Tensor) -> np.ndarray:
        return np.rint((joined(pixels.numpy()) * std + mean) * 255).astype(np.int16)

    def processed(name: str, processor, key: str, as_compared: Callable[[Tensor], np.ndarray]) -> Provider:
        def run(number: int) -> dict[str, Tensor]:
            images = batches[number % ROTATED]
            return processor(images=images, text=[PROMPT] * len(images), return_tensors="pt")

        return Provider(name, run, lambda out: (out["input_ids"].numpy(), as_compared(out[key])))

    width, height = settings.image_size
    side = subject.config.vision.image_size
    for label, output, key, mine, theirs in (
        (FLOATS, "float32", "pixel_values", Tensor.numpy, Tensor.numpy),
        (UINT8, "uint8", "pixel_values_uint8", lambda value: joined(value.numpy()), levels),
    ):
        fast = FastProcessor.from_pretrained(str(subject.directory), output=output, threads=settings.threads)
        yield Case(
            label=f"processor {label}: {settings.batch_size} of {width}x{height} to {tiles} tiles",
            providers=[
                processed(STOCK, stock, "pixel_values", theirs),
                processed("FastProcessor", fast, key, mine),
            ],
            check=same_inputs,
            floor=preprocess_floor(settings.batch_size * width * height, tiles * 3 * side**2),
            items=settings.batch_size,
            unit="images",
            calls=SHORT,
            **common,
        )


def same_inputs(got: tuple[np.ndarray, np.ndarray], wanted: tuple[np.ndarray, np.ndarray]) -> checks.Check:
    """Check that input_ids and pixels are bit-identical. The value is the number of differing values."""
    if any(a.shape != b.shape for a, b in zip(got, wanted, strict=True)):
        return checks.Check.at_most("input_ids and pixels bit-equal", float("inf"), 0, "other shapes")
    differ = sum(int((a != b).sum()) for a, b in zip(got, wanted, strict=True))
    return checks.Check.at_most("input_ids and pixels bit-equal", differ, 0)


def summary(rows: Sequence[Row]) -> str:
    """Return the target and the result of each row and the estimate for 32 layers, without rows whose check failed."""
    lines = ["against what is asked (at a real width):"]
    for case, backend, asked in (
        (STEP, FAST, 1.3),
        (STEP, WITH_LOGITS, 1.3),
        (FORWARD, FAST, 1.0),
        (f"processor {FLOATS}", "FastProcessor", 3.0),
        (f"processor {UINT8}", "FastProcessor", 5.0),
    ):
        row = _row(rows, case, backend)
        ratio = row.ratio
        if ratio is not None:
            verdict = "disturbed, measure again" if row.disturbed else "reached" if ratio >= asked else "MISSED"
            lines.append(f"  {case}, {backend}: {ratio:.2f}x (asked {asked:g}x: {verdict})")
    for backend in (FAST, WITH_LOGITS):
        mine, stock = _row(rows, STEP, backend), _row(rows, STEP, STOCK)
        if mine.ratio is not None and mine.peak_memory_bytes is not None and stock.peak_memory_bytes:
            share = mine.peak_memory_bytes / stock.peak_memory_bytes
            verdict = "reached" if share <= 0.6 else "MISSED"
            lines.append(f"  peak of a {STEP}, {backend}: {share:.2f} of stock (asked 0.6: {verdict})")
    return "\n".join(lines + _estimate(rows))


def _estimate(rows: Sequence[Row]) -> list[str]:
    """Estimate a step and its peak for more layers. At the peak, the saved tensors of all layers exist."""
    layer, stock_layer = _row(rows, LAYER, FAST), _row(rows, LAYER, STOCK)
    stock, lines = _row(rows, STEP, STOCK), []
    for backend in (FAST, WITH_LOGITS):
        mine = _row(rows, STEP, backend)
        if mine.ratio is None or layer.ratio is None:
            continue
        more = REAL_LAYERS - 1
        ratio = (stock.median + more * stock_layer.median) / (mine.median + more * layer.median)
        line = f"  ESTIMATE for {REAL_LAYERS} layers from 1, {backend}: "
        line += "step disturbed, measure again" if mine.disturbed or layer.disturbed else f"step {ratio:.2f}x"
        if mine.peak_memory_bytes is not None:
            peak = mine.peak_memory_bytes + more * layer.peak_memory_bytes
            line += f", peak {peak / (stock.peak_memory_bytes + more * stock_layer.peak_memory_bytes):.2f} of stock"
        lines.append(line)
    return lines


def _row(rows: Sequence[Row], case: str, backend: str) -> Row:
    return next(row for row in rows if row.case.startswith(case) and row.backend == backend)
