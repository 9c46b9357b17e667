"""The output head and the loss, forward and backward. ops.linear_cross_entropy computes supervised rows in chunks of
the vocabulary. transformers materialises float32 logits for every row.

The sequence has ROWS rows, of which SUPERVISED have a label, at the model's width and vocabulary. `summary` compares
the peak memory with the target: a tenth of the logits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import checks
from benchmarks.case import Case, Provider, Row, Settings
from benchmarks.floors import Floor, Phase, head_flops, head_weights
from benchmarks.memory import PeakMemory
from benchmarks.subject import Subject, fill, random_block
from benchmarks.suites.train_step import digest
from llava_fast.inputs.plan.columns import IGNORE
from llava_fast.inputs.plan.from_ids import supervised_rows
from llava_fast.ops import linear_cross_entropy

ROWS, SUPERVISED = 2048, 200


def cases(subject: Subject, settings: Settings) -> Iterator[Case]:
    decoder = dataclasses.replace(subject.config.decoder, num_layers=1)
    width, vocabulary, itemsize = decoder.hidden_size, decoder.vocab_size, subject.dtype.itemsize
    weight = nn.Parameter(torch.empty(vocabulary, width, dtype=subject.dtype, device=subject.device))
    hidden = torch.empty(ROWS, width, dtype=subject.dtype, device=subject.device)
    block = random_block()
    for number, (name, value) in enumerate({"lm_head": weight, "embed_tokens": hidden}.items()):
        fill(number, name, value, block)  # rows of variance 1, like the output of the last norm
    yield Case(
        suite="loss",
        model=subject.label,
        real_width=subject.real_width,
        label=f"{ROWS} rows, {SUPERVISED} supervised, {width} wide, vocabulary {vocabulary}: all their logits "
        f"in float32 take {table_bytes(vocabulary) / 1e6:.1f} MB (peak: above the weight and its gradient)",
        providers=providers(hidden, weight),
        check=checks.same_training(settings.dtype),
        floor=Floor((Phase(3 * head_flops(decoder, SUPERVISED), 3 * itemsize * head_weights(decoder)),)),
        items=ROWS,
        unit="rows",
        weight_bytes=weight.nbytes,
    )


def table_bytes(vocabulary: int) -> int:
    """The bytes of float32 logits of every row."""
    return 4 * ROWS * vocabulary


def providers(hidden: Tensor, weight: nn.Parameter) -> list[Provider]:
    """Return the providers for hidden states [ROWS, width] and the head's weight [vocabulary, width]."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    draws = np.random.default_rng(0)
    labels = np.full((1, ROWS), IGNORE)
    at = draws.choice(np.arange(1, ROWS), SUPERVISED, replace=False)
    labels[0, at] = draws.integers(0, len(weight), SUPERVISED)
    rows, targets = (torch.from_numpy(each).to(hidden.device) for each in supervised_rows(labels))
    every = torch.from_numpy(labels).to(hidden.device)

    def ours(hidden: Tensor) -> tuple[Tensor, Tensor]:
        picked = hidden[rows]
        return linear_cross_entropy(picked, weight, targets).sum() / SUPERVISED, picked

    def stock(hidden: Tensor) -> tuple[Tensor, Tensor]:
        return ForCausalLMLoss(F.linear(hidden, weight)[None], every, len(weight)), hidden

    return [_provider(name, loss, hidden, weight) for name, loss in (("llava_fast", ours), ("hf-eager", stock))]


def _provider(
    name: str, loss: Callable[[Tensor], tuple[Tensor, Tensor]], hidden: Tensor, weight: nn.Parameter
) -> Provider:
    """`loss` returns the loss and the rows that the head processed."""
    leaf = hidden.detach().requires_grad_()

    def run(number: int) -> Tensor:
        value, _ = loss(leaf)
        value.backward()
        return value.detach()

    def result(value: Tensor) -> dict[str, Tensor]:
        return {"loss": value.double().cpu()[None], "hidden": digest(leaf.grad), "weight": digest(weight.grad)}

    def finish() -> None:
        leaf.grad = weight.grad = None

    def peak() -> int | None:
        """Run the backward pass to the gradient of the rows that the head processed. The zero gradients of the other
        rows, which autograd adds afterwards, are not measured."""
        with PeakMemory(hidden.device) as memory:
            value, rows = loss(leaf)
            torch.autograd.grad(value, (rows, weight))
        return None if memory.bytes is None else memory.bytes - weight.nbytes

    return Provider(name, run, result, finish=finish, peak=peak)


def summary(rows: Sequence[Row]) -> str:
    """Compare the peak with a tenth of the logits. A row whose check failed is not reported."""
    row = next(row for row in rows if row.backend == "llava_fast")
    if row.ratio is None or row.peak_memory_bytes is None:
        return "the peak was not measured"
    vocabulary = int(row.case.split("vocabulary ")[1].split(":")[0])
    share = row.peak_memory_bytes / table_bytes(vocabulary)
    verdict = "reached" if share <= 0.1 else "MISSED"
    return f"peak of the loss: {row.peak_memory_bytes / 1e6:.1f} MB, {share:.3f} of the table (asked 0.1: {verdict})"
