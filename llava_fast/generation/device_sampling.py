"""Samples tokens on the device, inside the graph of a decoding step; the host reads them one step later.

A sequence has a slot in device memory with its last token, from which the next step continues before the host has read
it, and the tokens that its repetition penalty counts. The other inputs of a choice (random number, temperature,
filters) are part of the step's transfer. The operations are those of `sampling`, over all sequences at once. Log
probabilities, logit bias, presence and frequency penalties, grammars and other logits processors run on the host.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from math import inf, log

import torch
from torch import Tensor

from llava_fast.generation.sampling import COLDEST, drawn, uniform
from llava_fast.generation.sequence import Sequence
from llava_fast.models.decode_graphs import MOST_SEQUENCES, Column, Columns, DecodeGraphs

_FOLLOWS = -1  # in place of a token that the host does not know yet: the slot's last one
_SPARE = MOST_SEQUENCES  # the slot of padding sequences

_EVERY: Columns = {"token": Column("int32", 0), "slot": Column("int32", _SPARE)}
_DRAWN: Columns = {
    "number": Column("float64", 0),
    "temperature": Column("float32", 0),
    "least": Column("float32", -inf),
}
_SORTED: Columns = {"top_k": Column("int32", 0), "tail": Column("float32", 0)}
_PENALISED: Columns = {"penalty": Column("float32", 1)}


@dataclass(frozen=True)
class Choice:
    """How a step's tokens are chosen: by what its sequences need. An Ending of decode_graphs.

    draws      a sequence has a temperature; without one a token is the likeliest.
    sorts      one has top-k or top-p (only with `draws`).
    penalises  one has a repetition penalty.
    """

    slots: Slots
    draws: bool = False
    sorts: bool = False
    penalises: bool = False

    @property
    def columns(self) -> Columns:
        parts = (True, _EVERY), (self.draws, _DRAWN), (self.sorts, _SORTED), (self.penalises, _PENALISED)
        return {name: column for wanted, part in parts if wanted for name, column in part.items()}

    def tokens(self, given: dict[str, Tensor]) -> Tensor:
        token, last = given["token"], self.slots.last.index_select(0, given["slot"])
        return torch.where(token == _FOLLOWS, last, token).clamp(min=0)  # -1 after logits that were not numbers

    def result(self, token: Tensor, logits: Tensor, given: dict[str, Tensor]) -> Tensor:
        slot, x = given["slot"].long(), logits.float()
        if self.penalises:
            seen = self.slots.seen
            seen.index_put_((slot, token.long()), self.slots.yes)
            penalty = given["penalty"][:, None]
            x = torch.where(seen.index_select(0, slot), torch.where(x > 0, x / penalty, x * penalty), x)
        chosen = chosen_tokens(x, given)
        self.slots.last.index_copy_(0, slot, chosen)
        return chosen

    def values(self, sequences: SequenceOf[Sequence]) -> dict[str, list]:
        """The columns of these sequences."""
        options = [sequence.sampler.options for sequence in sequences]
        made: dict[str, list] = {
            "token": [_FOLLOWS if each.ahead else each.token_ids[-1] for each in sequences],
            "slot": [each.slot for each in sequences],
        }
        if self.draws:
            made["number"] = [uniform(each.sampler.seed, len(each.token_ids) + each.ahead) for each in sequences]
            made["temperature"] = [max(each.temperature, COLDEST) if each.temperature else 0 for each in options]
            made["least"] = [log(each.min_p) if each.min_p else -inf for each in options]
        if self.sorts:
            made["top_k"] = [min(each.top_k, 2**31 - 1) for each in options]
            made["tail"] = [1 - each.top_p for each in options]
        if self.penalises:
            made["penalty"] = [each.repetition_penalty for each in options]
        return made


def chosen_tokens(logits: Tensor, given: dict[str, Tensor]) -> Tensor:
    """int32 [n]: the next token of each row of float32 logits [n, vocabulary], -1 for a row that holds a NaN.

    given  columns [n], those that sequences need: `number` in [0, 1), `temperature` (0: the likeliest token) and
           `least` = log(min_p) to draw; `top_k` (0: off) and `tail` = 1 - top_p to sort.
    """
    top, best = logits.max(-1, keepdim=True)  # a NaN counts as the largest
    if "number" in given:
        temperature = given["temperature"][:, None]
        x = (logits - top) / temperature.masked_fill(temperature == 0, 1)
        if "top_k" in given:
            x = _without_tail(x, given["top_k"][:, None], given["tail"][:, None])
        x = x.masked_fill(x < given["least"][:, None], -torch.inf)
        token = drawn(x.softmax(-1), given["number"][:, None])[:, None]
        best = torch.where(temperature == 0, best, token)
        top = torch.where(temperature == 0, top, top - top)  # infinite logits cannot be drawn from
    # masked_fill, because torch.where copies a Python number to the device, which no capture allows
    return best.masked_fill(top.isnan(), -1)[:, 0].int()


def _without_tail(x: Tensor, top_k: Tensor, tail: Tensor) -> Tensor:
    """top-k, then top-p, as sampling.filtered_probabilities."""
    ordered, index = x.sort(dim=-1, stable=True)
    count = x.shape[-1]
    first = (count - top_k).clamp(min=0).masked_fill(top_k == 0, 0)
    kth = ordered.gather(-1, first.long())
    kept = ordered.masked_fill(ordered < kth, -torch.inf)
    dropped = kept.softmax(-1).cumsum(-1) <= tail
    dropped[:, -1:].zero_()
    return x.masked_fill(torch.zeros_like(dropped).scatter_(-1, index, dropped), -torch.inf)


class Slots:
    """Device memory of the sequences whose tokens are chosen there: `last` int32 [slots], `seen` bool [slots,
    vocabulary], made at the first repetition penalty."""

    def __init__(self, vocabulary: int, device: torch.device) -> None:
        self.vocabulary, self.device = vocabulary, device
        self.free = list(range(MOST_SEQUENCES))
        with torch.inference_mode(False):
            self.last = torch.zeros(MOST_SEQUENCES + 1, dtype=torch.int32, device=device)
            self.yes = torch.ones((), dtype=torch.bool, device=device)
        self._seen: Tensor | None = None

    @property
    def seen(self) -> Tensor:
        if self._seen is None:
            with torch.inference_mode(False):
                self._seen = torch.zeros(MOST_SEQUENCES + 1, self.vocabulary, dtype=torch.bool, device=self.device)
        return self._seen

    def give(self, sequence: Sequence) -> None:
        """A slot for a sequence whose tokens the host knows."""
        sequence.slot = self.free.pop()
        if sequence.sampler.options.repetition_penalty != 1:
            row = torch.zeros(self.vocabulary, dtype=torch.bool, pin_memory=self.device.type == "cuda")
            known = [token for token in (*sequence.sampler.seen, *sequence.token_ids) if 0 <= token < self.vocabulary]
            row[known] = True
            with torch.inference_mode(False):
                self.seen[sequence.slot].copy_(row, non_blocking=True)

    def take(self, sequence: Sequence) -> None:
        if sequence.slot is not None:
            self.free.append(sequence.slot)
            sequence.slot = None


class Flight:
    """A step that was launched: its sequences, and their tokens once the device has chosen them."""

    def __init__(self, sequences: SequenceOf[Sequence], chosen: Tensor) -> None:
        self.sequences = list(sequences)
        self._event: torch.cuda.Event | None = None
        on_cuda = chosen.device.type == "cuda"
        self._host = torch.empty(chosen.shape, dtype=chosen.dtype, pin_memory=on_cuda)
        self._host.copy_(chosen, non_blocking=True)
        if on_cuda:
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(chosen.device))

    def tokens(self) -> list[int]:
        """The token of each sequence, -1 where logits were not numbers. Waits for the step."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()


class DeviceSteps:
    """Launches steps from graphs that choose their tokens themselves."""

    def __init__(self, graphs: DecodeGraphs) -> None:
        self.graphs = graphs
        self.slots = Slots(graphs.decoder.config.vocab_size, graphs.cache.device)

    def launch(self, sequences: SequenceOf[Sequence]) -> Flight | None:
        """Run the last token of each sequence, known to the host or not (`ahead`), and choose the next. None if the
        host must: no graph for this step, or a sequence that the device cannot choose for."""
        if not all(sequence.sampler.on_device for sequence in sequences):
            return None
        new = [sequence for sequence in sequences if sequence.slot is None]
        if len(new) > len(self.slots.free):
            return None
        for sequence in new:
            self.slots.give(sequence)
        options = [sequence.sampler.options for sequence in sequences]
        draws = any(each.temperature for each in options)
        choice = Choice(
            self.slots,
            draws,
            any(each.temperature and (each.top_k or each.top_p < 1) for each in options),
            any(each.repetition_penalty != 1 for each in options),
        )
        tables = [sequence.cached for sequence in sequences]
        chosen = self.graphs.launch(choice, choice.values(sequences), tables, [table.length for table in tables])
        return None if chosen is None else Flight(sequences, chosen)

    def release(self, sequences: SequenceOf[Sequence]) -> None:
        """Give back the slots of sequences that leave, or whose next token the host chooses."""
        for sequence in sequences:
            self.slots.take(sequence)
