"""Likelihood ranking: how likely a model finds each candidate answer to a request.

The rows of a prompt run once and stay in the cache, and the candidates follow as sequences that share its blocks.
Source of the method: Dai et al. 2023 (InstructBLIP), which classifies by the likelihood of candidate answers;
salesforce/LAVIS 506965b blip2_vicuna_instruct.py (predict_class).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from llava_fast.errors import GenerationError, ImageError, RequestError
from llava_fast.inputs.chat.rendering import ChatTemplate, Segment
from llava_fast.inputs.plan.plan import Piece, TextPiece, sequence_length
from llava_fast.inputs.prepared import Cut, Placeholder
from llava_fast.inputs.processor import Processor
from llava_fast.models.batch import Batch
from llava_fast.models.blocks.attention import Spans
from llava_fast.models.paged_cache import BlockTable
from llava_fast.models.vlm import LlavaModel

PASS_ROWS = 4096  # most rows of a pass, as for prefill, unless one sequence alone has more
_LOGITS_ROWS = 256  # logits that exist at once
_PROBE = "\N{SNOWMAN}"

Part = TextPiece | Placeholder


@dataclass(frozen=True)
class Candidate:
    """A candidate answer with its likelihood.

    text, index     as given, and its place among the candidates.
    token_ids       its tokens after those that all candidates share with the prompt: where a token of one joins the end
                    of the prompt, all are scored from there (and those that end the turn, if they were asked for).
    log_likelihood  the sum of the tokens' log-probabilities (natural logarithm), each given the prompt and the tokens
                    before it.
    is_greedy       whether greedy decoding would say these tokens.
    prompt_tokens   rows before them, visual ones included; of an encoder-decoder, those that the encoder reads.
    """

    text: str
    index: int
    token_ids: list[int]
    log_likelihood: float
    is_greedy: bool
    prompt_tokens: int

    @property
    def mean_log_likelihood(self) -> float:
        """The mean over its tokens; with the end of the turn, minus the loss of training on this answer."""
        return self.log_likelihood / len(self.token_ids)


@torch.inference_mode()
def score_candidates(
    model: LlavaModel,
    requests: Sequence[dict],
    candidates: Sequence[Sequence[str]],
    end_of_turn: bool = False,
    processor: Processor | None = None,
) -> list[list[Candidate]]:
    """The candidates of each request, in the order given. Requests are run together as far as PASS_ROWS allows.

    requests     as for Llava.generate. To "messages", which end with the user's turn, a candidate is the assistant's
                 answer; to a verbatim "prompt" it is what follows.
    end_of_turn  also score the tokens by which the chat template ends an answer, so that a candidate competes with its
                 own continuations. Only with "messages". (The end token that an encoder-decoder's tokenizer gives each
                 answer is always scored, as in LAVIS.)
    processor    default: the model's.

    Raises RequestError and ImageError naming the request, CacheFullError for one that memory cannot hold, and
    GenerationError if the model's logits are not numbers.
    """
    processor = processor or model.own_processor
    asked: list[_Asked] = []
    found: list[list[Candidate]] = []
    for number, (request, texts) in enumerate(zip(requests, candidates, strict=True)):
        name = request.get("id", number) if isinstance(request, dict) else number
        try:
            made = _asked(processor, request, texts, end_of_turn)
        except (RequestError, ImageError) as error:
            raise type(error)(f"request {name}: {error}") from None
        if asked and sum(each.rows for each in asked) + made.rows > PASS_ROWS:
            found += _scored(model, asked)
            asked = []
        asked.append(made)
    return found + (_scored(model, asked) if asked else [])


# ---------------------------------------------------------------- tokens


@dataclass
class _Answer:
    """A candidate's text and its tokens after the shared prompt."""

    text: str
    ids: list[int]


@dataclass
class _Asked:
    """A request: the pieces of its prompt that all candidates share, their tiles, and its candidates. joined: tokens at
    the prompt's end that are not shared. remaining: its rows after a router."""

    pieces: list[Piece]
    answers: list[_Answer]
    tiles: list[Cut]
    joined: int
    remaining: int | None = None

    @property
    def rows(self) -> int:
        return sequence_length(self.pieces) if self.remaining is None else self.remaining

    @property
    def prompt_rows(self) -> int:
        """Rows of the prompt as the model reads it to answer."""
        return self.rows + self.joined


def _asked(processor: Processor, request: Any, texts: Sequence[str], end_of_turn: bool) -> _Asked:
    if isinstance(texts, str) or not texts:
        raise RequestError("candidates are a list of texts, at least one")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise RequestError(f"candidate {index} is no text but {type(text).__name__}")
        if not text.strip():
            raise RequestError(f"candidate {index} is empty, so it has no likelihood: leave it out")
    verbatim = isinstance(request, dict) and "prompt" in request
    before, last, own, read = (_after_prompt if verbatim else _answers)(processor, request, texts, end_of_turn)
    # Sums that start at different tokens cannot be compared: log P(" the" | "x") and log P("b" | "x", " ").
    shared = min(_common([ids for ids, _ in read]), *(start for _, start in read))
    answers = []
    for index, (text, (ids, start)) in enumerate(zip(texts, read, strict=True)):
        if start == len(ids):
            raise RequestError(f"candidate {index}, {text!r}, has no token of its own after this prompt")
        answers.append(_Answer(text, ids[shared:]))
    tiles: list[Cut] = []
    common = replace(last, ids=np.asarray(read[0][0][:shared], np.int32), supervised=None)
    pieces = processor.pieces([*before, *([common] if shared else [])], tiles)
    if not sequence_length(pieces):
        raise RequestError("the prompt has no token, so nothing predicts a candidate's first: give some text")
    longest = max((answer.ids for answer in answers), key=len)
    processor.check_length([*pieces, TextPiece(np.asarray(longest, np.int32))])
    return _Asked(pieces, answers, tiles, own - shared)


_Read = tuple[list[Part], TextPiece, int, list[tuple[list[int], int]]]
"""(An outline before its last text, that text, the number of its tokens without a candidate, (its ids, the first that
is the candidate's) for each candidate)."""


def _answers(processor: Processor, request: dict, texts: Sequence[str], end_of_turn: bool) -> _Read:
    """The candidates as answers to messages."""
    messages = request.get("messages") if isinstance(request, dict) else None
    last_message = messages[-1] if isinstance(messages, list) and messages else None
    if isinstance(last_message, dict) and last_message.get("role") == "assistant":
        raise RequestError("the messages end with an answer: candidates are answers, so end with the user's turn")
    if not end_of_turn and processor.answer_start is None:  # an encoder-decoder's answer ends by its tokenizer
        processor = replace(processor, template=cast(ChatTemplate, _WithoutEnds(processor.template)))
    asked = processor.outline(request)
    before: list[Part] = []
    last: Any = None
    read = []
    for index, text in enumerate(texts):
        answered = {**request, "messages": [*request["messages"], {"role": "assistant", "content": text}]}
        try:
            *before, last = processor.outline(answered, labels=True)
        except RequestError as error:  # a placeholder, half a surrogate pair
            raise RequestError(f"candidate {index}, {text!r}: {error}") from None
        flags = last.supervised if isinstance(last, TextPiece) else None
        if not isinstance(last, TextPiece) or flags is None or not flags.any():
            raise RequestError(f"the chat template gives the candidate {text!r} no token")
        end = len(flags) - int(flags[::-1].argmax())
        quiet = np.flatnonzero(~flags[:end])
        read.append((last.ids[:end].tolist(), int(quiet[-1]) + 1 if len(quiet) else 0))
    before = [replace(part, supervised=None) if isinstance(part, TextPiece) else part for part in before]
    if processor.routes:  # a router reads what it reads when the model answers: no end of a turn
        told = iter([part.instruction for part in asked if isinstance(part, Placeholder)])
        before = [replace(part, instruction=next(told)) if isinstance(part, Placeholder) else part for part in before]
    return before, last, sum(len(part.ids) for part in asked[len(before) :] if isinstance(part, TextPiece)), read


def _after_prompt(processor: Processor, request: dict, texts: Sequence[str], end_of_turn: bool) -> _Read:
    """The candidates after a verbatim prompt. A connector that reads the prompt does not read the candidates, and
    neither does an encoder: its decoder's answers are tokenised alone, with the tokenizer's end token."""
    if end_of_turn:
        raise RequestError('a verbatim "prompt" has no end of turn: write it into the candidates, or use "messages"')
    before: list[Part] = processor.outline(request)
    found = before.pop() if before and isinstance(before[-1], TextPiece) else None
    last = found if isinstance(found, TextPiece) else TextPiece(np.zeros(0, np.int32))
    own = last.ids.tolist()
    if last.begins_answer:
        return before, last, len(own), [(processor.verbatim_answer(text).ids.tolist(), len(own)) for text in texts]
    read = []
    for text in texts:
        *others, whole = processor.outline({**request, "prompt": request["prompt"] + text})
        if not isinstance(whole, TextPiece) or len(others) != len(before):
            raise RequestError(f"the candidate {text!r} has a placeholder for an image or video")
        ids = whole.ids.tolist()
        read.append((ids, _common([own, ids])))  # a token that joins both texts is the candidate's
    return before, last, len(own), read


def _common(each: Sequence[Sequence[int]]) -> int:
    """The number of first items that are equal in all."""
    first, shortest = each[0], min(map(len, each))
    return next((at for at in range(shortest) if any(other[at] != first[at] for other in each)), shortest)


class _WithoutEnds:
    """A chat template whose last answer is supervised without the text that ends its turn."""

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template

    def __getattr__(self, name: str) -> Any:
        return getattr(self.template, name)

    def without_videos(self) -> _WithoutEnds:
        return _WithoutEnds(self.template.without_videos())

    def segments(self, messages: Sequence[Mapping], *rest: Any, **options: Any) -> list[Segment]:
        probe = [*messages[:-1], {**messages[-1], "content": [{"type": "text", "text": _PROBE}]}]
        probed = "".join(each.text for each in self.template.segments(probe, *rest, **options))
        left = len(probed) - probed.rindex(_PROBE) - len(_PROBE)
        segments = self.template.segments(messages, *rest, **options)
        ending: list[Segment] = []
        while left:
            last = segments.pop()
            cut = max(len(last.text) - left, 0)
            left -= len(last.text) - cut
            ending.insert(0, Segment(last.text[cut:]))
            if cut:
                segments.append(replace(last, text=last.text[:cut]))
        return [*segments, *ending]


# ---------------------------------------------------------------- likelihoods


@dataclass
class _Run:
    """Candidates that share a sequence: the number of their request, the ids after the rows of it that are cached, and
    their indices. first: the sequence's first row in its pass; where nothing is run, -1."""

    number: int
    ids: tuple[int, ...]
    answers: list[int]
    first: int = -1


class _Prompts:
    """The prompts of some requests, run once: `tables` of their rows, and the final hidden state of each one's last row
    [requests, C]. Under dynamic RoPE, rows depend on the length of the whole sequence beyond the trained length: of
    such a request (`whole`) nothing is kept, and candidates run with all rows of the prompt."""

    def __init__(self, model: LlavaModel, asked: Sequence[_Asked]) -> None:
        self.model, self.asked = model, asked
        tiles = [cut for each in asked for cut in each.tiles]
        prepared = model.own_processor.assemble([each.pieces for each in asked], tiles)
        batch, inputs = model.routed(Batch.from_prepared(prepared, model.device))
        self.encoded = batch.plan.encoded
        for each, rows in zip(asked, batch.plan.lengths, strict=True):
            each.remaining = rows
        self.inputs = inputs.split([each.rows for each in asked])
        self.whole = [_needs_all(model, each) for each in asked]
        self.cache = model.decoder.new_cache()
        self.tables = [BlockTable(self.cache) for _ in asked]
        kept = [number for number, whole in enumerate(self.whole) if not whole]
        self.last = inputs.new_zeros(len(asked), model.config.decoder.hidden_size)
        if kept:
            lengths = [asked[number].rows for number in kept]
            tables = [self.tables[number] for number in kept]
            hidden = self._run(kept, tables, [self.inputs[number] for number in kept], lengths)
            ends = torch.tensor(lengths, device=model.device).cumsum(0) - 1
            self.last = self.last.to(hidden.dtype).index_copy(0, torch.tensor(kept, device=model.device), hidden[ends])

    def rows_of(self, run: _Run) -> int:
        return len(run.ids) + self.asked[run.number].rows * self.whole[run.number]

    def after(self, runs: Sequence[_Run]) -> Tensor:
        """Final hidden states [requests + R, C]: `last`, then those of the runs, whose `first` is set."""
        going = [run for run in runs if self.rows_of(run)]
        if not going:
            return self.last
        tables, inputs, at = [], [], 0
        for run in going:
            tables.append(BlockTable(self.cache))
            if self.whole[run.number]:
                inputs.append(self.inputs[run.number])
            else:
                tables[-1].share(self.tables[run.number].blocks, self.asked[run.number].rows)
            inputs.append(self.model.decoder.embed_tokens(torch.tensor(run.ids, device=self.model.device)))
            run.first, at = at, at + self.rows_of(run)
        hidden = self._run([run.number for run in going], tables, inputs, [self.rows_of(run) for run in going])
        for table in tables:
            table.release()
        return torch.cat([self.last, hidden])

    def _run(self, numbers: list[int], tables: list[BlockTable], inputs: list[Tensor], lengths: list[int]) -> Tensor:
        """Final hidden states [R, C] of these requests' rows after those that the tables hold, which then hold them
        too."""
        before = tuple(table.length for table in tables)
        starts = tuple(np.cumsum([0, *lengths[:-1]]).tolist())
        position = np.concatenate([np.arange(first, first + rows) for first, rows in zip(before, lengths, strict=True)])
        encoded = tuple(self.encoded[number] for number in numbers) if self.encoded else ()
        prompts = tuple(self.asked[number].prompt_rows for number in numbers)
        spans = Spans(starts, tuple(lengths), tuple(tables), before, encoded=encoded, prompts=prompts)
        at = torch.from_numpy(position).to(self.model.device)
        hidden = self.model.decoder(torch.cat(inputs), at, spans, self.cache)
        for table, rows in zip(tables, lengths, strict=True):
            table.length += rows
        return hidden

    def place(self, run: _Run, index: int) -> int:
        """The row of `after` that predicts a candidate's token number `index` after the prompt."""
        if self.whole[run.number]:
            index += self.asked[run.number].rows
        return len(self.asked) + run.first + index - 1 if index else run.number


def _needs_all(model: LlavaModel, asked: _Asked) -> bool:
    decoder = model.config.decoder
    longest = asked.rows + max(len(answer.ids) for answer in asked.answers)
    return decoder.rope.kind == "dynamic" and longest > decoder.max_positions


def _scored(model: LlavaModel, asked: Sequence[_Asked]) -> list[list[Candidate]]:
    prompts = _Prompts(model, asked)
    sums = [np.zeros(len(each.answers)) for each in asked]
    greedy = [np.ones(len(each.answers), bool) for each in asked]
    for runs in _passes(prompts):
        hidden = prompts.after(runs)
        tokens = []
        for run in runs:
            for index in run.answers:
                answer = asked[run.number].answers[index]
                tokens += [(prompts.place(run, at), token, run.number, index) for at, token in enumerate(answer.ids)]
        rows, targets, numbers, indices = (np.array(column) for column in zip(*sorted(tokens), strict=True))
        scores, hits = _log_probs(model, hidden, rows, targets)
        if not np.isfinite(scores).all():
            raise GenerationError("the model's logits are not numbers, so candidates cannot be ranked")
        for number, index, score, hit in zip(numbers, indices, scores, hits, strict=True):
            sums[number][index] += score
            greedy[number][index] &= hit
    found: list[list[Candidate]] = []
    for number, (each, of, hits) in enumerate(zip(asked, sums, greedy, strict=True)):
        before = prompts.encoded[number] if prompts.encoded else each.rows
        found.append([])
        for index, answer in enumerate(each.answers):
            found[-1].append(Candidate(answer.text, index, answer.ids, float(of[index]), bool(hits[index]), before))
    return found


def _passes(prompts: _Prompts) -> Iterator[list[_Run]]:
    """The candidates, in passes of at most PASS_ROWS rows. Those that differ only in their last token, which nothing
    needs to run, are one sequence; where rows depend on the whole length, it runs too."""
    runs: list[_Run] = []
    total = 0
    for number, each in enumerate(prompts.asked):
        alike: dict[tuple[int, ...], list[int]] = {}
        for index, answer in enumerate(each.answers):
            last = len(answer.ids) if prompts.whole[number] else -1
            alike.setdefault(tuple(answer.ids[:last]), []).append(index)
        for ids, answers in alike.items():
            run = _Run(number, ids, answers)
            if runs and total + prompts.rows_of(run) > PASS_ROWS:
                yield runs
                runs, total = [], 0
            runs.append(run)
            total += prompts.rows_of(run)
    yield runs


def _log_probs(model: LlavaModel, hidden: Tensor, at: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(float64 log-probability of each target, whether it is the likeliest token) after the rows `at` of `hidden`,
    which are sorted."""
    rows, place = np.unique(at, return_inverse=True)
    scores, hits = np.empty(len(at)), np.empty(len(at), bool)
    for first in range(0, len(rows), _LOGITS_ROWS):
        chosen = torch.from_numpy(rows[first : first + _LOGITS_ROWS]).to(hidden.device)
        logits = model.decoder.logits(hidden[chosen]).float()
        mine = slice(*np.searchsorted(place, [first, first + len(chosen)]))
        row = torch.from_numpy(place[mine] - first).to(hidden.device)
        target = torch.from_numpy(targets[mine]).to(hidden.device)
        scores[mine] = (logits[row, target] - logits.logsumexp(-1)[row]).double().cpu().numpy()
        hits[mine] = (logits.argmax(-1)[row] == target).cpu().numpy()
    return scores, hits
