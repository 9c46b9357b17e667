"""Preference data: a question and two answers, one of which is preferred.

A pair is an object {"id", "image" | "images" | "video", "prompt", "chosen", "rejected"}, as in the DPO data of
LLaVA-NeXT-Video and LLaVA-Hound ("answer" is read if "chosen" is missing). "prompt" is a text, or the turns before the
answer in LLaVA's or OpenAI's format; images without an `<image>` in it are put before it.

Question and answers form one sequence: the common prefix (image, question, equal first words of the answers) occurs
once, and the rest of each answer is a branch (see inputs.plan).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from llava_fast.errors import DataError
from llava_fast.inputs.chat.messages import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
from llava_fast.inputs.plan.plan import Piece, TextPiece
from llava_fast.inputs.prepared import Cut, Placeholder, Prepared
from llava_fast.inputs.processor import Processor
from llava_fast.train.data.lengths import Lengths
from llava_fast.train.data.loader import Made, each_sound
from llava_fast.train.data.samples import Sample, SampleTable, Source, read_sources

PAIR_KEYS = ("id", "image", "images", "video", "prompt", "chosen", "answer", "rejected")
"""The keys of a pair that are read; others are ignored."""

CHOSEN, REJECTED = 0, 1


class Answers(SampleTable):
    """Both answers of each pair as ordinary samples: sample 2 i is pair i with its chosen answer, 2 i + 1 with its
    rejected answer."""

    def __len__(self) -> int:
        return 2 * super().__len__()

    def __getitem__(self, number: int) -> Sample:
        """Raises DataError, naming the pair, if it cannot be trained on."""
        pair, which = divmod(range(len(self))[number], 2)
        value = self.value(pair)
        try:
            return self.sample(pair, _with_answer(value, which))
        except DataError as error:
            name = super().name(pair)
            raise error if str(error).startswith(name) else DataError(f"{name}: {error}", error.kind) from None

    def name(self, number: int) -> str:
        return super().name(number // 2)

    def rows(self, lengths: Lengths) -> tuple[Lengths, Lengths]:
        """The lengths of pairs, from those of all answers: (the longer of the two, an upper bound of both with their
        common prefix counted once)."""
        text, supervised = (each.reshape(-1, 2) for each in (lengths.text, lengths.supervised))
        visual = lengths.visual[::2]
        notes = ({number // 2: note for number, note in each.items()} for each in (lengths.problems, lengths.kinds))
        problems, kinds = notes
        alone = Lengths(text.max(1), visual, supervised.min(1), problems, kinds)
        return alone, Lengths(text[:, CHOSEN] + supervised[:, REJECTED], visual, alone.supervised, problems, kinds)


def read_pairs(sources: Sequence[Source]) -> Answers:
    """Read the files of a run's sources, as `data.read_sources` does, with its errors."""
    return Answers(**vars(read_sources(sources, keys=PAIR_KEYS)))


def _with_answer(value: Any, which: int) -> dict[str, Any]:
    """A pair with one of its answers, in the format of an ordinary sample. Raises DataError."""
    if not isinstance(value, dict):
        raise DataError("a pair must be an object with prompt, chosen and rejected")
    turns = prompt_turns(value)
    needs = "a pair needs prompt, chosen and rejected"
    answers = [answer_text(value, "chosen" if "chosen" in value else "answer", needs)]
    answers.append(answer_text(value, "rejected", needs))
    if answers[CHOSEN] == answers[REJECTED]:
        raise DataError("its two answers are the same, so neither can be preferred: leave it out")
    return conversation(value, turns, answers[which])


def prompt_turns(value: dict[str, Any]) -> list[dict[str, Any]]:
    """The turns of a "prompt", the last of which is a question. Raises DataError."""
    turns = value.get("prompt")
    if isinstance(turns, str):
        turns = [{"from": "human", "value": turns}]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise DataError("it has no prompt: it needs a text, or the list of turns before the answer", "roles and turns")
    if turns[-1].get("from", turns[-1].get("role")) not in ("human", "user"):
        raise DataError("its prompt must end with a turn from 'human', which the answers follow", "roles and turns")
    return turns


def answer_text(value: dict[str, Any], key: str, needs: str) -> str:
    """An answer: a text, or a list of one turn as in TRL's data. Raises DataError, whose message ends with `needs`."""
    given = value.get(key)
    if isinstance(given, list) and len(given) == 1 and isinstance(given[0], dict):
        given = given[0].get("value", given[0].get("content"))
    if not isinstance(given, str) or not given.strip():
        raise DataError(f"it has no text under {key!r}: {needs}", "roles and turns")
    return given


def conversation(value: dict[str, Any], turns: list[dict[str, Any]], answer: str) -> dict[str, Any]:
    """A prompt's turns and an answer, in the format of an ordinary sample."""
    given: dict[str, Any] = {key: value[key] for key in ("id", "image", "images", "video") if key in value}
    return {**given, "conversations": [*_marked(turns, value), {"from": "gpt", "value": answer}]}


def _marked(turns: list[dict[str, Any]], value: dict[str, Any]) -> list[dict[str, Any]]:
    """The turns with a placeholder for each image; missing ones are added at the start."""
    images = value.get("images", value.get("image"))
    count = len(images) if isinstance(images, list) else int(images not in (None, ""))
    placeholders = [IMAGE_PLACEHOLDER] * count + [VIDEO_PLACEHOLDER] * (value.get("video") not in (None, "", []))
    texts = [turn.get("value", turn.get("content")) for turn in turns]
    if any(not isinstance(text, str) or IMAGE_PLACEHOLDER in text or VIDEO_PLACEHOLDER in text for text in texts):
        return turns
    first = next(i for i, turn in enumerate(turns) if turn.get("from", turn.get("role")) in ("human", "user"))
    text = "".join(f"{placeholder}\n" for placeholder in placeholders) + str(texts[first])
    return [*turns[:first], {"from": "human", "value": text}, *turns[first + 1 :]]


@dataclass(frozen=True)
class SharedPair:
    """The common prefix of both answers, with opened images, and the rest of each."""

    prefix: list[Piece]
    branches: tuple[TextPiece, TextPiece]

    @property
    def pieces(self) -> list[Piece]:
        return [*self.prefix, *self.branches]


def shared_pair(processor: Processor, chosen: dict, rejected: dict, tiles: list[Cut]) -> SharedPair:
    """Two requests that differ in their answer, as a pair. Images are opened once and appended to `tiles`.

    Raises RequestError or ImageError like `Processor.prepare`, and DataError if both have the same tokens.
    """
    outlines = [last_answer(processor.outline(request, labels=True)) for request in (chosen, rejected)]
    (*before, first), (*before_other, second) = outlines
    if not isinstance(first, TextPiece) or not isinstance(second, TextPiece) or not _same(before, before_other):
        raise DataError("its two answers do not follow the same question")
    both = min(len(first.ids), len(second.ids))
    differs = first.ids[:both] != second.ids[:both]
    differs |= _flags(first)[:both] != _flags(second)[:both]
    shared = int(differs.argmax()) if differs.any() else both
    if shared == max(len(first.ids), len(second.ids)):
        raise DataError("its two answers are the same tokens, so neither can be preferred: leave it out")
    common = replace(first, ids=first.ids[:shared], supervised=_flags(first)[:shared])
    prefix = processor.pieces([*before, common], tiles)
    branches = tuple(TextPiece(each.ids[shared:], _flags(each)[shared:]) for each in (first, second))
    for branch in branches:
        processor.check_length([*prefix, branch])
    return SharedPair(prefix, (branches[CHOSEN], branches[REJECTED]))


def _flags(piece: TextPiece) -> np.ndarray:
    return np.zeros(len(piece.ids), bool) if piece.supervised is None else piece.supervised


def last_answer(outline: list[TextPiece | Placeholder]) -> list[TextPiece | Placeholder]:
    """The outline up to the end of its last answer, which alone is supervised: earlier answers are part of the
    prompt."""
    *before, last = outline
    if not isinstance(last, TextPiece) or not _flags(last).any():
        raise DataError("its answer has no supervised token")
    flags = _flags(last)
    end = len(flags) - int(flags[::-1].argmax())
    breaks = np.flatnonzero(~flags[:end])
    start = int(breaks[-1]) + 1 if len(breaks) else 0
    quiet = [replace(part, supervised=None) if isinstance(part, TextPiece) else part for part in before]
    return [*quiet, replace(last, ids=last.ids[:end], supervised=np.arange(end) >= start)]


def _same(one: list[TextPiece | Placeholder], other: list[TextPiece | Placeholder]) -> bool:
    return len(one) == len(other) and all(
        np.array_equal(a.ids, b.ids) if isinstance(a, TextPiece) and isinstance(b, TextPiece) else type(a) is type(b)
        for a, b in zip(one, other, strict=True)
    )


class TwoAnswers(Dataset):
    """Dataset that maps a list of sample numbers to a micro-batch of sequences with two branches.

    references  float32 [samples, 2], the reference's log-probabilities of both answers, which become the plan's column
                "reference" [sequences, 2].
    """

    def __init__(self, processor: Processor, references: np.ndarray | None = None) -> None:
        self.processor, self.references = processor, references

    def __getitem__(self, numbers: list[int]) -> Made:
        kept, pairs, tiles, left_out = each_sound(numbers, self._sound, self.name)
        branches = [[len(branch.ids) for branch in pair.branches] for pair in pairs]
        prepared = self.processor.assemble([pair.pieces for pair in pairs], tiles, branches=branches)
        columns = self.columns(kept)
        if self.references is not None:
            columns["reference"] = self.references[kept].astype(np.float32).reshape(-1, 2).view(np.int32)
        if columns:
            prepared = Prepared(prepared.tiles, prepared.plan.with_columns(columns))
        return Made(prepared, [self.name(number) for number in kept], left_out)

    def _sound(self, number: int, tiles: list[Cut]) -> SharedPair:
        if self.references is not None and np.isnan(self.references[number]).any():
            raise DataError("it could not be read when the reference's log-probabilities were computed")
        return self.pair(number, tiles)

    def pair(self, number: int, tiles: list[Cut]) -> SharedPair:
        """A sample's sequence. Appends its images to `tiles`."""
        raise NotImplementedError

    def name(self, number: int) -> str:
        raise NotImplementedError

    def columns(self, numbers: list[int]) -> dict[str, np.ndarray]:
        """Additional int32 columns of the plan, with one entry per sample."""
        return {}


class PairBatches(TwoAnswers):
    """Micro-batches of preference pairs."""

    def __init__(self, answers: Answers, processor: Processor, references: np.ndarray | None = None) -> None:
        super().__init__(processor, references)
        self.answers = answers

    def pair(self, number: int, tiles: list[Cut]) -> SharedPair:
        chosen, rejected = self.answers[2 * number], self.answers[2 * number + 1]
        return shared_pair(self.processor, chosen.request, rejected.request, tiles)

    def name(self, number: int) -> str:
        return self.answers.name(2 * number)
