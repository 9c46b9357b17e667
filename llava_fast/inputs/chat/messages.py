"""OpenAI-style messages: validating them, finding their images, and converting LLaVA training data to them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from llava_fast.errors import RequestError

IMAGE_PLACEHOLDER = "<image>"
VIDEO_PLACEHOLDER = "<video>"
PLACEHOLDERS = {"image": IMAGE_PLACEHOLDER, "video": VIDEO_PLACEHOLDER}

# The response-format prompts of LLaVA-1.5's short-answer and multiple-choice data (arXiv 2310.03744).
RESPONSE_FORMATS = {
    "short": "Answer the question using a single word or phrase.",
    "option letter": "Answer with the option's letter from the given choices directly.",
}


def normalise_messages(messages: Sequence[Mapping]) -> tuple[list[dict], list[Any]]:
    """Validate OpenAI-style messages and convert their content to lists of items.

    messages: {"role": "system" | "user" | "assistant", "content": str or list}: an optional system message,
        then alternating user and assistant messages. Content items: {"type": "text", "text"}, {"type": "image_url",
        "image_url": {"url"} or str}, {"type": "image"} (with "image", "url" or "path", or without a source),
        {"type": "video"}. Other keys of a message are ignored.
    Returns (messages, image_sources). Items of the new messages are {"type": "text", "text"},
        {"type": "image"} or {"type": "video"}. image_sources has one entry per image in reading order: its
        source (a data URI, a path, or the given object), or None for an image item without a source and for an
        `<image>` placeholder in a text, which are taken from the request's "images". Texts are not changed.
    Raises RequestError, naming the message, for a wrong order of roles, an empty user message, unknown content,
    images outside user messages, and web addresses. (Assistant messages may be empty, since models may answer nothing.)
    """
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise RequestError("messages must be a non-empty list of {'role': ..., 'content': ...}")
    normal: list[dict] = []
    sources: list[Any] = []
    for index, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        where = f"message {index} ({role})"
        if role not in ("system", "user", "assistant"):
            raise RequestError(f"message {index} has the role {role!r}: use 'system', 'user' or 'assistant'")
        if role == "system" and index > 0:
            raise RequestError(f"{where}: a system message can only be the first message")
        if role == "assistant" and (index == 0 or normal[-1]["role"] != "user"):
            raise RequestError(f"{where} does not follow a user message: merge or reorder the messages")
        if role == "user" and index > 0 and normal[-1]["role"] == "user":
            raise RequestError(f"{where} follows another user message: merge the two into one")
        items = _normalise_content(message.get("content"), role, where, sources)
        if role == "user" and not any(item["type"] != "text" or item["text"] for item in items):
            raise RequestError(f"{where} is empty: give it a text or leave it out")
        normal.append({"role": role, "content": items})
    if normal[-1]["role"] == "system":
        raise RequestError("messages hold only a system message: add a user message")
    return normal, sources


def _normalise_content(content: Any, role: str, where: str, sources: list[Any]) -> list[dict]:
    """The items of one message. Appends its image sources to `sources`."""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, Sequence):
        raise RequestError(f"{where}: content must be a string or a list of items, not {content!r}")
    items = []
    for item in content:
        kind = item.get("type") if isinstance(item, Mapping) else None
        if kind == "text":
            if not isinstance(item.get("text"), str):
                raise RequestError(f"{where}: a text item needs a string under 'text'")
            sources.extend([None] * item["text"].count(IMAGE_PLACEHOLDER))
            items.append({"type": "text", "text": item["text"]})
        elif kind in ("image", "image_url", "video"):
            if role != "user":
                raise RequestError(f"{where} holds an item of type {kind!r}: move it to a user message")
            if kind != "video":
                sources.append(_image_source(item, where))
            elif len(item) > 1:
                raise RequestError(
                    f"{where}: give a video's file or frames under 'video' of the request, not in its item"
                )
            items.append({"type": "video" if kind == "video" else "image"})
        else:
            raise RequestError(f"{where} holds an item of type {kind!r}: use 'text', 'image', 'image_url' or 'video'")
    return items


def _image_source(item: Mapping, where: str) -> Any:
    if item["type"] == "image_url":
        source = item.get("image_url")
        source = source.get("url") if isinstance(source, Mapping) else source
        if not isinstance(source, str) or not source:
            raise RequestError(f"{where}: an image_url item needs a data URI or a path under 'image_url'")
    else:
        source = next((item[key] for key in ("image", "url", "path") if item.get(key) is not None), None)
    if isinstance(source, str) and re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", source):
        raise RequestError(f"{where}: the address {source[:80]} is not fetched: download it first and pass its path")
    return source


def messages_from_conversations(conversations: Sequence[Mapping], image_first: bool = True) -> list[dict]:
    """Messages from the `conversations` of a LLaVA data sample: [{"from": "human" | "gpt", "value": str}].

    Also reads the keys "role" and "content" and the roles system, user and assistant, like LLaVA-NeXT. A first
    turn by "gpt" is left out, as in the original trainers.
    image_first: in a text with exactly one `<image>` that is not at the start, move the placeholder to the start and
        add a newline, like LLaVA-NeXT's preprocess_multimodal. (The first LLaVA trainer did this to every text with a
        placeholder and so lost all but one of several.)
    Raises RequestError, naming the turn, for an unknown role, a value that is not a string, and two consecutive turns
    of the same role.
    """
    names = {
        "human": "user",
        "gpt": "assistant",
        "system": "system",
        "user": "user",
        "assistant": "assistant",
    }
    messages: list[dict] = []
    for index, turn in enumerate(conversations):
        sender, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        role = names.get(sender) if isinstance(sender, str) else None
        if role is None:
            raise RequestError(f"conversations[{index}] is from {sender!r}: use 'human' or 'gpt'")
        if not isinstance(text, str):
            raise RequestError(f"conversations[{index}] ({sender}) has no text under 'value'")
        if role == "assistant" and not messages:
            continue
        if messages and messages[-1]["role"] == role:
            raise RequestError(f"conversations[{index}] and the turn before it are both from {sender!r}")
        if image_first and text.count(IMAGE_PLACEHOLDER) == 1 and not text.startswith(IMAGE_PLACEHOLDER):
            text = f"{IMAGE_PLACEHOLDER}\n{text.replace(IMAGE_PLACEHOLDER, '').strip()}".strip()
        messages.append({"role": role, "content": text})
    if not messages:
        raise RequestError("conversations hold no turn from 'human'")
    return messages


def with_response_format(text: str, style: str) -> str:
    """`text`, a newline, and the response-format prompt of LLaVA-1.5: style "short" or "option letter".

    The short-answer and multiple-choice training data contain these prompts, so a model answers in that format.
    Raises RequestError for another style.
    """
    if style not in RESPONSE_FORMATS:
        raise RequestError(f"unknown response format {style!r}: use one of {', '.join(map(repr, RESPONSE_FORMATS))}")
    return f"{text}\n{RESPONSE_FORMATS[style]}"


def with_video_times(messages: Sequence[Mapping], duration: float, times: Sequence[float]) -> list[dict]:
    """Normalised messages in which the video's question begins with the video and LLaVA-NeXT's time instruction, which
    states its duration and the times of its frames in seconds (add_time_instruction in llava/train/train.py).

    The sentence is exactly the one used in training, including its missing space.
    """
    located = ",".join(f"{time:.2f}s" for time in times)
    instruction = (
        f"The video lasts for {duration:.2f} seconds, and {len(times)} frames are uniformly sampled from it. "
        f"These frames are located at {located}.Please answer the following questions related to this video."
    )
    timed = []
    for message in messages:
        text = content_text(message["content"])
        if message["role"] == "user" and VIDEO_PLACEHOLDER in text:
            text = f"{VIDEO_PLACEHOLDER}\n{instruction}\n{text.replace(VIDEO_PLACEHOLDER, '')}"
            timed.append({**message, "content": [{"type": "text", "text": text}]})
        else:
            timed.append(dict(message))
    return timed


def content_text(items: Sequence[Mapping]) -> str:
    """Join items to one text, with a newline between an image and its neighbours.

    An image and a question give "<image>\\nquestion", as in llava/eval/run_llava.py. A video becomes `<video>`, to
    distinguish it from an image; LLaVA-NeXT writes `<image>` for both and gives both the same token id.
    """
    pieces: list[str] = []
    was_visual = False
    for item in items:
        visual = item["type"] != "text"
        piece = PLACEHOLDERS[item["type"]] if visual else item["text"]
        if piece:
            if pieces and (visual or was_visual):
                pieces.append("\n")
            pieces.append(piece)
            was_visual = visual
    return "".join(pieces)


def take_system(messages: list[dict], system: str | None) -> tuple[str | None, list[dict]]:
    """The system prompt (None if there is none) and the other messages."""
    if messages[0]["role"] != "system":
        return system, messages
    if system is not None:
        raise RequestError("a system prompt was given twice, as `system` and as the first message: drop one")
    return content_text(messages[0]["content"]), messages[1:]
