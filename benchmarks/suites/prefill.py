"""A prepared batch to the logits after its last row: encoding, then the decoder over every row, filling a cache."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from benchmarks import checks
from benchmarks.case import Case, Provider, Settings
from benchmarks.floors import prefill_floor
from benchmarks.inputs import describe, inference, prepared, sizes
from benchmarks.subject import Subject
from llava_fast.generation.llava import Llava
from llava_fast.models.batch import Batch
from llava_fast.models.paged_cache import BlockTable


def cases(subject: Subject, settings: Settings) -> Iterator[Case]:
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
    yield Case(
        suite="prefill",
        model=subject.label,
        real_width=subject.real_width,
        label=describe(settings, batch),
        providers=[
            Provider(name, inference(runs[name]()), compiles=name == "hf-compile") for name in settings.backends
        ],
        check=checks.close("last logits", settings.dtype),
        floor=prefill_floor(subject.config, sizes(batch), subject.dtype.itemsize),
        items=sum(batch.plan.lengths),
        unit="rows",
        weight_bytes=subject.weight_bytes,
    )


def prefill(model: Llava, batch: Batch) -> Tensor:
    """What llava_fast's generation does before its first token: [sequences, vocabulary]."""
    cache = model.decoder.new_cache()
    spans = batch.spans(tuple(BlockTable(cache) for _ in batch.plan.lengths))
    hidden = model.hidden_states(model.inputs_embeds(batch), batch, spans, cache)
    return model.decoder.logits(hidden[batch.column("last_row").long()])
