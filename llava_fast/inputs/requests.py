"""Validates a request's keys and renders its prompt through the chat template."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import Any, Literal

from llava_fast.errors import RequestError
from llava_fast.inputs.chat.messages import normalise_messages, with_video_times
from llava_fast.inputs.chat.rendering import ChatTemplate, Segment
from llava_fast.inputs.pictures.video import VideoTimes

REQUEST_KEYS = {"prompt", "messages", "images", "video", "seed", "id"}


Labels = bool | Literal["answers", "original"]
"""Which tokens of a conversation are supervised. "answers" or True: all that the model must generate after each
generation prompt. "original": those that the original trainers supervise (see chat/formats.py), including role headers
of qwen and llama_3; for most templates the same. False: none."""


def render_request(
    template: ChatTemplate,
    request: dict,
    labels: Labels = False,
    times_of: Callable[[Any], VideoTimes] | None = None,
) -> tuple[list[Segment], list, list]:
    """(segments of the prompt, image sources, video sources) of a request; placeholders are still in the text. Without
    `labels` the prompt ends where the model answers. times_of: returns the times of a video, for adding its time
    instruction to messages. Raises RequestError, and the errors of `times_of`."""
    _check_request(request)
    given = list(request.get("images") or [])
    videos = [] if request.get("video") is None else [request["video"]]
    if "prompt" in request:
        return [Segment(request["prompt"], False)], given, videos
    messages, sources = normalise_messages(request["messages"])
    empty = sum(source is None for source in sources)
    if empty != len(given):
        raise RequestError(
            f"the messages have {empty} image placeholders without a source and "
            f'"images" has {len(given)} items: give one image for each {{"type": "image"}}'
        )
    supply = iter(given)
    sources = [next(supply) if source is None else source for source in sources]
    if times_of is not None and videos:
        messages = with_video_times(messages, *times_of(videos[0]))
    if not videos:
        template = template.without_videos()
    if labels:
        _check_answers(messages)
        return template.segments(messages, add_generation_prompt=False), sources, videos
    return template.prompt(messages), sources, videos


def _check_request(request: Any) -> None:
    if not isinstance(request, dict):
        raise RequestError(f'a request is a dict with "prompt" or "messages", got {type(request).__name__}')
    unknown = set(request) - REQUEST_KEYS
    if unknown:
        raise RequestError(f"unknown keys {sorted(unknown)}: a request has {sorted(REQUEST_KEYS)}")
    if ("prompt" in request) == ("messages" in request):
        raise RequestError('give exactly one of "prompt" (verbatim) and "messages" (through the chat template)')
    if "prompt" in request and not isinstance(request["prompt"], str):
        raise RequestError(f'"prompt" must be a string, got {type(request["prompt"]).__name__}')
    if not isinstance(request.get("images"), (list, tuple, type(None))):
        raise RequestError(f'"images" must be a list, even of one image, got {type(request["images"]).__name__}')
    seed = request.get("seed")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= int(seed) < 2**63):
        raise RequestError(f'"seed" must be a whole number from 0 to 2**63 - 1, got {seed!r}')


def _check_answers(messages: list[dict]) -> None:
    """Raise RequestError if all answers are empty, so that the loss would have no targets. Some of several answers may
    be empty, as in the original trainers, which train on their end of turn.
    """
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    if not any(item["text"] for content in answers for item in content):
        raise RequestError("labels need an assistant message with text in it: this sample has nothing to learn from")
