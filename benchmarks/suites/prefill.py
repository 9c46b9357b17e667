"""Prefill from a preprocessed batch to the logits of the last row: encoding, and the decoder, which fills a cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks import checks, llama_cpp
from benchmarks.case import Case, Provider, Settings
from benchmarks.floors import prefill_floor, text_prefill_floor
from benchmarks.inputs import ROTATED, describe, inference, prepared, sizes, text_prompt
from benchmarks.subject import Subject
from llava_fast.generation.llava import Llava
from llava_fast.generation.runner import Runner
from llava_fast.generation.sampling import Sampling
from llava_fast.generation.sequence import new_sequence
from llava_fast.models.batch import Batch
from llava_fast.models.paged_cache import BlockTable


def cases(subject: Subject, settings: Settings) -> Iterator[Case]:
    yield (_text_case if settings.text_rows else _image_case)(subject, settings)


def _image_case(subject: Subject, settings: Settings) -> Case:
    batches = prepared(subject, settings)

    def hf(model):
        def run(number: int) -> Tensor:
            return model.forward(**batches[number % len(batches)].hf, use_cache=True, logits_to_keep=1).logits[:, -1]

        return run

    def ours(number: int) -> Tensor:
        return prefill(subject.ours, batches[number % len(batches)].ours)

    runs = {
        "llava_fast": lambda: ours,
        "hf-eager": lambda: hf(subject.hf),
        "hf-compile": lambda: hf(subject.hf_compiled),
    }
    batch = batches[0].ours
    return Case(
        suite="prefill",
        model=subject.label,
        real_width=subject.real_width,
        label=describe(settings, batch),
        providers=[
            Provider(name, inference(runs[name]()), compiles=name == "hf-compile") for name in settings.providers
        ],
        check=checks.close("last logits", settings.dtype),
        floor=prefill_floor(subject.config, sizes(batch), subject.dtype.itemsize),
        items=sum(batch.plan.lengths),
        unit="rows",
        weight_bytes=subject.weight_bytes,
    )


def _text_case(subject: Subject, settings: Settings) -> Case:
    """Prefill of text only: the decoder without the vision encoder."""
    count, rows, decoder = settings.batch_size, settings.text_rows, subject.config.decoder
    if rows > decoder.context_length:
        raise ValueError(f"--text-rows {rows}: the model's context has {decoder.context_length} rows")
    draw = torch.Generator().manual_seed(2)
    batches = [torch.randint(300, decoder.vocab_size, (count, rows), generator=draw) for _ in range(ROTATED)]

    def hf(model):
        def run(number: int) -> Tensor:
            ids = batches[number % ROTATED].to(subject.device)
            return model.forward(input_ids=ids, use_cache=True, logits_to_keep=1).logits[:, -1]

        return run

    def ours():
        runner = Runner(subject.ours)
        prompts = [[text_prompt(ids) for ids in batch.numpy()] for batch in batches]

        def run(number: int) -> Tensor:
            sequences = [new_sequence(subject.ours, prompt, Sampling()) for prompt in prompts[number % ROTATED]]
            for sequence in sequences:
                sequence.table = BlockTable(runner.cache)
            logits = runner.prefill([(sequence, rows) for sequence in sequences]).clone()
            for sequence in sequences:
                sequence.table.release()
            return logits

        return run

    runs = {"llava_fast": ours, "hf-eager": lambda: hf(subject.hf), "hf-compile": lambda: hf(subject.hf_compiled)}
    return Case(
        suite="prefill",
        model=subject.label,
        real_width=subject.real_width,
        label=f"{count} x {rows} rows of text",
        providers=[
            Provider(name, inference(runs[name]()), compiles=name == "hf-compile") for name in settings.providers
        ],
        check=checks.close("last logits", settings.dtype),
        floor=text_prefill_floor(decoder, rows, count, subject.dtype.itemsize, subject.decoder_itemsize),
        items=count * rows,
        unit="rows",
        weight_bytes=subject.weight_bytes,
        peers=llama_cpp.peers(subject, settings, prompt=rows),
    )


def prefill(model: Llava, batch: Batch) -> Tensor:
    """Compute the logits of the first token as in llava_fast's generation: [sequences, vocabulary]."""
    cache = model.decoder.new_cache()
    spans = batch.spans(tuple(BlockTable(cache) for _ in batch.plan.lengths))
    hidden = model.hidden_states(model.inputs_embeds(batch), batch, spans, cache)
    return model.decoder.logits(hidden[batch.column("last_row").long()])
