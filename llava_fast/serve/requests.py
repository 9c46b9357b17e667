"""Conversion of request bodies in OpenAI's format to requests of llava_fast, with images and videos as bytes."""

from __future__ import annotations

from typing import Any

from llava_fast.serve.errors import ApiError
from llava_fast.serve.media import Media
from llava_fast.serve.protocol import ChatRequest, CompletionRequest, ImagePart, PlanRequest, TextPart, VideoPart


def requests_of(body: ChatRequest | CompletionRequest, media: Media) -> list[dict[str, Any]]:
    """Return one request for each prompt of the body. Raises ApiError if reading an image or video is not allowed, and
    ImageError if it fails."""
    if isinstance(body, CompletionRequest):
        return [{"prompt": prompt} for prompt in body.prompts]
    return [chat_request(body, media)]


def chat_request(body: ChatRequest | PlanRequest, media: Media) -> dict[str, Any]:
    """Return the request of a conversation. Raises the same errors as `requests_of`."""
    parts = [part for message in body.messages if not isinstance(message.content, str) for part in message.content]
    images = [part for part in parts if isinstance(part, ImagePart)]
    videos = [part for part in parts if isinstance(part, VideoPart)]
    media.check_number(len(images))
    if len(videos) > 1:
        raise ApiError(400, f"the messages hold {len(videos)} videos and a request takes one", "messages")
    request: dict[str, Any] = {
        "messages": [_message(message.role, message.content) for message in body.messages],
        "images": [media.image(part.image_url.url) for part in images],
    }
    if videos:
        request["video"] = media.video(videos[0].video_url.url)
    return request


def _message(role: str, content: str | list[TextPart | ImagePart | VideoPart]) -> dict[str, Any]:
    if not isinstance(content, str):
        return {"role": _role(role), "content": [_item(part) for part in content]}
    return {"role": _role(role), "content": content}


def _role(role: str) -> str:
    return "system" if role == "developer" else role


def _item(part: TextPart | ImagePart | VideoPart) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    return {"type": "image" if isinstance(part, ImagePart) else "video"}
