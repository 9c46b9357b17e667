"""Renders messages to prompt text through chat templates, and marks which text is supervised.

A prompt is a list of `Segment`s. Their joined text is tokenised once; the label mask is computed from the segments'
spans, never by tokenising parts again. The text contains `<image>` or `<video>` for each image or video. No token ids
are used here. A template may write the BOS token itself (llava_llama_3, many checkpoints' templates); the tokenizer
must then not add a second one."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from llava_fast.errors import CheckpointError, RequestError
from llava_fast.inputs.chat.formats import TURN_FORMATS, TurnFormat
from llava_fast.inputs.chat.messages import (
    PLACEHOLDERS,
    content_text,
    normalise_messages,
    take_system,
)
from llava_fast.inputs.chat.sandbox import PROBE, PROMPT, CompiledTemplate, Limits, TemplateLimitError

_PLACEHOLDER = re.compile("|".join(PLACEHOLDERS.values()))
_IMAGE = re.compile(re.escape(PLACEHOLDERS["image"]))


@dataclass(frozen=True)
class Segment:
    """A piece of a prompt.

    supervised: the piece is part of an answer, that is, of what the model must generate after the generation
        prompt: a space before the answer if the format has one, the answer, the end of turn.
    supervised_original: the original trainers supervise the piece (see formats.py). In user and system turns only the
        template's own text is marked; for the rest see `original_label_tokens`.
    cut: a token begins where the piece does: it is tokenised apart from the text before it.
    """

    text: str
    supervised: bool = False
    supervised_original: bool = False
    cut: bool = False


class ChatTemplate(Protocol):
    """Interface of chat templates: messages to prompt.

    name: the canonical name. stop: the strings that end an assistant turn.
    prompt: what the model reads before it answers, cut as the same turns are in `segments`.
    original_label_tokens: texts of single tokens that the original trainer supervises at any position, also inside a
        user's text. Empty for most templates.
    """

    @property
    def name(self) -> str: ...

    @property
    def stop(self) -> tuple[str, ...]: ...

    @property
    def original_label_tokens(self) -> tuple[str, ...]: ...

    def without_videos(self) -> ChatTemplate:
        """The template for a request without a video, where `<video>` is ordinary text."""

    def segments(
        self, messages: Sequence[Mapping], system: str | None = None, add_generation_prompt: bool = True
    ) -> list[Segment]: ...

    def render(
        self, messages: Sequence[Mapping], system: str | None = None, add_generation_prompt: bool = True
    ) -> str: ...

    def prompt(self, messages: Sequence[Mapping]) -> list[Segment]: ...


# ---------------------------------------------------------------- built-in templates


def builtin_names() -> set[str]:
    """The names that `builtin_template` accepts."""
    return {name for each in TURN_FORMATS for name in (each.name, *each.aliases)}


def builtin_template(name: str) -> ChatTemplate:
    """A template by its name here or in llava/conversation.py. Raises RequestError for an unknown name."""
    for turn_format in TURN_FORMATS:
        if name == turn_format.name or name in turn_format.aliases:
            return BuiltinTemplate(turn_format)
    known = ", ".join(" = ".join((f.name, *f.aliases)) for f in TURN_FORMATS)
    raise RequestError(f"unknown chat template {name!r}; known: {known}")


@dataclass(frozen=True)
class BuiltinTemplate:
    """A `ChatTemplate` from a `TurnFormat`.

    The text before an answer's supervised segment equals the earlier messages rendered with the generation prompt, so
    a chat can continue from its KV cache.

    videos: `<video>` in a text is a placeholder; otherwise it is text, and stays where it is.
    """

    format: TurnFormat
    videos: bool = True

    @property
    def name(self) -> str:
        return self.format.name

    @property
    def stop(self) -> tuple[str, ...]:
        return self.format.stop

    @property
    def original_label_tokens(self) -> tuple[str, ...]:
        return self.format.original_label_tokens

    def without_videos(self) -> BuiltinTemplate:
        return replace(self, videos=False)

    def render(self, messages: Sequence[Mapping], system: str | None = None, add_generation_prompt: bool = True) -> str:
        return "".join(segment.text for segment in self.segments(messages, system, add_generation_prompt))

    def prompt(self, messages: Sequence[Mapping]) -> list[Segment]:
        return self.segments(messages)

    def segments(
        self, messages: Sequence[Mapping], system: str | None = None, add_generation_prompt: bool = True
    ) -> list[Segment]:
        """The prompt for `messages` (in any form that `normalise_messages` accepts).

        system: replaces the template's system prompt; "" leaves it out.
        add_generation_prompt: open the assistant's turn after the last user message; ignored if the last message is
            the assistant's.
        """
        form = self.format
        system, turns = take_system(normalise_messages(messages)[0], system)
        if form.system is None and system:
            raise RequestError(f"the chat template {form.name!r} has no system prompt: leave it out")
        system = form.system if system is None else system
        texts = [self._text(turn) for turn in turns]
        if form.picture:
            texts = _with_pictures(texts, form.picture)
        if form.placeholders_only and (len(turns) > 2 or not texts[0]):
            raise RequestError(
                f"the chat template {form.name!r} takes one user message with an image and at most one answer"
            )

        out = _SegmentList(form.original_label_tokens)
        headers = bool(form.original_label_tokens) and form.original_header
        out.template(form.start)
        system_text = system.strip() if system and form.strip_text else system
        if system_text and not form.system_inside_user:
            out.wrapped(form.system_wrap, system_text, "system" in form.cuts)
        for index, (turn, text) in enumerate(zip(turns, texts, strict=True)):
            if turn["role"] == "assistant":
                out.template(form.assistant_header, original=headers)
                out.add(form.answer[0] + text + form.answer[1], True, True, "assistant" in form.cuts)
                out.template(form.after_answer, original=bool(form.original_label_tokens))
                continue
            out.template(form.before_later_users if index else "")
            opening = ""
            if system_text and form.system_inside_user and index == 0:
                opening = form.system_wrap[0] + system_text + form.system_wrap[1]
            shown = "".join(self._placeholder.findall(text))
            bare = self._placeholder.sub("", text).strip()
            if form.placeholders_first:
                out.template(shown)
            moves = form.placeholders_first or form.placeholders_lead
            written = shown + bare if form.placeholders_lead else bare if moves else text
            out.wrapped(form.user, opening + written, "user" in form.cuts)
        if add_generation_prompt and turns[-1]["role"] == "user":
            out.template(form.assistant_header, original=headers)
        return out.segments

    @property
    def _placeholder(self) -> re.Pattern[str]:
        return _PLACEHOLDER if self.videos else _IMAGE

    def _text(self, turn: Mapping) -> str:
        text = content_text(turn["content"])
        if self.format.placeholders_only and turn["role"] == "user":
            return "".join(self._placeholder.findall(text))
        return text.strip() if self.format.strip_text else text


def _with_pictures(texts: list[str], picture: str) -> list[str]:
    """The texts with `picture` in place of each image's placeholder and the newline after it, images counted from 1."""
    numbers = itertools.count(1)
    image = re.compile(re.escape(PLACEHOLDERS["image"]) + r"\n?")
    return [image.sub(lambda _: picture.format(next(numbers)), text) for text in texts]


class _SegmentList:
    """Builds segments, joining neighbours with the same flags unless there is a cut between them."""

    def __init__(self, label_tokens: tuple[str, ...]):
        self.segments: list[Segment] = []
        self._pattern = re.compile("(" + "|".join(map(re.escape, label_tokens)) + ")") if label_tokens else None

    def add(self, text: str, supervised: bool, original: bool, cut: bool = False) -> None:
        last = self.segments[-1] if self.segments else None
        if last and not cut and (last.supervised, last.supervised_original) == (supervised, original):
            self.segments[-1] = replace(last, text=last.text + text)
        elif text:
            self.segments.append(Segment(text, supervised, original, cut))

    def template(self, text: str, original: bool = False) -> None:
        """Add text written by the template. The original label tokens in it are marked supervised_original."""
        pieces = self._pattern.split(text) if self._pattern else [text]
        for index, piece in enumerate(pieces):  # the odd ones are the pattern's matches
            self.add(piece, False, original or index % 2 == 1)

    def wrapped(self, wrap: tuple[str, str], text: str, cut: bool = False) -> None:
        self.template(wrap[0])
        self.add(text, False, False, cut)
        self.template(wrap[1])


# ---------------------------------------------------------------- a checkpoint's own template

# The ends of turn in the family's templates; a checkpoint's template is searched for them.
_TURN_ENDS = ("</s>", "<|im_end|>", "<|eot_id|>")


def checkpoint_template(
    jinja_source: str, special_tokens: Mapping[str, str], origin: str = "the checkpoint's chat template"
) -> ChatTemplate:
    """A checkpoint's chat template (from chat_template.jinja, chat_template.json or tokenizer_config.json).

    special_tokens: {"bos_token": ..., "eos_token": ...}, a tokenizer's `special_tokens_map`.
    origin: the name and file of the template in errors.
    It is rendered like transformers' `apply_chat_template`, but with limits on time and memory (see sandbox.py).
    Content is passed as lists of items or, if a probe here shows that the template only supports strings, as the text
    that the built-in templates would write.
    Raises CheckpointError for invalid Jinja, and for a template that exceeds the limits with one message.
    """
    stop = [end for end in _TURN_ENDS if end in jinja_source]
    eos = special_tokens.get("eos_token")
    if eos and eos not in stop:
        stop.append(eos)
    try:
        _compiled(jinja_source)
    except ImportError:
        raise
    except Exception as error:  # also Python's, since its compiler limits nested blocks
        raise CheckpointError(f"{origin} is not valid Jinja: {' '.join(str(error).split())}") from error
    probe = "a text to find again"
    try:
        text, _ = _render_jinja(
            jinja_source,
            special_tokens,
            [{"role": "user", "content": [{"type": "text", "text": probe}]}],
            False,
            PROBE,
        )
        takes_items = probe in text and "'type'" not in text and '"type"' not in text
    except TemplateLimitError as error:
        raise CheckpointError(f"{origin} cannot be used: {error}") from error
    except Exception:  # untrusted code: adding a list to a string, its own raise_exception, ...
        takes_items = False
    return CheckpointTemplate(jinja_source, dict(special_tokens), tuple(stop), takes_items)


@functools.lru_cache(maxsize=32)
def _compiled(source: str) -> CompiledTemplate:
    return CompiledTemplate(source)


def _render_jinja(
    source: str,
    special_tokens: Mapping[str, str],
    messages: list[dict],
    add_generation_prompt: bool,
    limits: Limits = PROMPT,
) -> tuple[str, list[tuple[int, int]]]:
    """The prompt, and the character spans of its `{% generation %}` blocks (empty without such blocks)."""
    variables: dict[str, Any] = {"messages": messages, "tools": None, "documents": None}
    return _compiled(source).render(
        {**variables, "add_generation_prompt": add_generation_prompt, **special_tokens}, limits
    )


@dataclass(frozen=True)
class CheckpointTemplate:
    """A `ChatTemplate` from a checkpoint's Jinja source, made by `checkpoint_template`.

    Some published templates (such as llava-1.5's) write no end of turn after an answer; then none is supervised.
    """

    source: str
    special_tokens: Mapping[str, str]
    stop: tuple[str, ...]
    takes_items: bool
    name: str = "checkpoint"
    original_label_tokens: tuple[str, ...] = ()

    def without_videos(self) -> CheckpointTemplate:
        return self

    def render(self, messages: Sequence[Mapping], system: str | None = None, add_generation_prompt: bool = True) -> str:
        return self._render(self._prepare(messages, system), add_generation_prompt)[0]

    def prompt(self, messages: Sequence[Mapping]) -> list[Segment]:
        return [Segment(self.render(messages))]  # without `segments`, which not every template allows

    def segments(
        self, messages: Sequence[Mapping], system: str | None = None, add_generation_prompt: bool = True
    ) -> list[Segment]:
        """The prompt for `messages`, split at the answers; both flags of an answer's segment are set.

        To find an answer, the messages before it are rendered with the generation prompt; the text after that prefix,
        including the end of turn, is supervised. If the rendering is not a prefix of the whole prompt, the template's
        `{% generation %}` block gives the start of the answer. Raises RequestError if there is no such block, or if a
        turn is rendered differently when others follow it; `render` still works then.
        """
        prepared = self._prepare(messages, system)
        text, blocks = self._render(prepared, add_generation_prompt)
        segments: list[Segment] = []
        done = 0
        for index, message in enumerate(prepared):
            if message["role"] == "assistant":
                start, end = self._answer_span(prepared, index, text, blocks)
                segments += [Segment(text[done:start]), Segment(text[start:end], True, True)]
                done = end
        segments.append(Segment(text[done:]))
        return [segment for segment in segments if segment.text]

    def _answer_span(
        self, messages: list[dict], index: int, text: str, blocks: list[tuple[int, int]]
    ) -> tuple[int, int]:
        before = self._render(messages[:index], False)[0]
        opening = self._render(messages[:index], True)[0]
        turn = self._render(messages[: index + 1], False)[0]
        if not (text.startswith(turn) and turn.startswith(before)):
            raise RequestError(
                "the checkpoint's chat template is not prefix-stable: it writes the turns up to message "
                f"{index} differently when more follows; choose a built-in template to find the answers"
            )
        in_turn = [begin for begin, _ in blocks if len(before) <= begin < len(turn)]
        if turn.startswith(opening) and (opening != before or not in_turn):
            start = len(opening)
        elif in_turn:
            start = min(in_turn)
        else:
            raise RequestError(
                "the checkpoint's chat template is not prefix-stable: it opens the answer in message "
                f"{index} differently from its generation prompt; choose a built-in template to find the "
                "answers"
            )
        ends = [turn.rindex(stop, start) + len(stop) for stop in self.stop if stop in turn[start:]]
        return start, max(ends, default=len(turn))

    def _prepare(self, messages: Sequence[Mapping], system: str | None) -> list[dict]:
        system, turns = take_system(normalise_messages(messages)[0], system)
        if system:
            turns = [{"role": "system", "content": [{"type": "text", "text": system}]}, *turns]
        if not self.takes_items:
            turns = [{"role": turn["role"], "content": content_text(turn["content"])} for turn in turns]
        return turns

    def _render(self, messages: list[dict], add_generation_prompt: bool) -> tuple[str, list[tuple[int, int]]]:
        try:
            return _render_jinja(self.source, self.special_tokens, messages, add_generation_prompt)
        except Exception as error:  # untrusted code may raise anything
            raise RequestError(f"the checkpoint's chat template rejects these messages: {error}") from error
