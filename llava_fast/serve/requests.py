"""A body of OpenAI's form as a request of llava_fast."""

from __future__ import annotations

from typing import Any

from llava_fast.serve.errors import ApiError
from llava_fast.serve.protocol import ChatRequest, ImagePart, TextPart


def chat_request(body: ChatRequest) -> dict[str, Any]:
    """{"messages", "images"} of a chat. Raises ApiError for an image that may not be read."""
    messages: list[dict[str, Any]] = []
    images: list[Any] = []
    for message in body.messages:
        role = "system" if message.role == "developer" else message.role
        content: Any = message.content
        if not isinstance(content, str):
            content = [_item(part, images) for part in content]
        messages.append({"role": role, "content": content})
    return {"messages": messages, "images": images}


def _item(part: TextPart | ImagePart, images: list[Any]) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    if not part.image_url.url.startswith("data:"):
        raise ApiError(400, "an image_url must be a data URI here", "messages")
    images.append(part.image_url.url)
    return {"type": "image"}
