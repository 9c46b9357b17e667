"""A request to an endpoint, and the key of its stored reply."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_fast.errors import EndpointError, MissingFileError

IMAGE_TOKENS = 800
"""Estimated tokens per image. Endpoints charge from 85 to about 1,600, depending on size and model."""
CHARACTERS_PER_TOKEN = 4
DEFAULT_REPLY_TOKENS = 512
_SHOWN_CHARACTERS = 60  # of a data URI, in a printed prompt
_KINDS = {b"\xff\xd8\xff": "jpeg", b"\x89PNG": "png", b"GIF8": "gif", b"RIFF": "webp"}


@dataclass(frozen=True)
class Request:
    """A chat completion request.

    messages  in OpenAI's format, with images as data URIs (`image_part`).
    options   further fields of the body: temperature, max_tokens, response_format, ...
    draw      the sample index, which distinguishes repeated requests (several samples at a temperature).
    name      its name in messages; not part of the key.
    """

    messages: Sequence[Mapping[str, Any]]
    options: Mapping[str, Any] = field(default_factory=dict)
    draw: int = 0
    name: str = ""

    def body(self, model: str) -> dict[str, Any]:
        return {"model": model, "messages": list(self.messages), **self.options}

    def key(self, model: str) -> str:
        """Return a hash (32 hexadecimal digits) of the request body with the model, and of `draw`."""
        content = [self.body(model), self.draw]
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def tokens(self) -> tuple[int, int]:
        """Return estimates of (prompt tokens, maximum reply tokens)."""
        characters, images = 0, 0
        for message in self.messages:
            for part in _parts(message):
                characters += len(part.get("text") or "")
                images += "image_url" in part
        most = self.options.get("max_completion_tokens", self.options.get("max_tokens", DEFAULT_REPLY_TOKENS))
        overhead = 4 * len(self.messages)  # roles and separators
        return -(-characters // CHARACTERS_PER_TOKEN) + images * IMAGE_TOKENS + overhead, int(most)

    def shown(self) -> str:
        """Return the messages as readable text with shortened data URIs."""
        lines = []
        for message in self.messages:
            lines.append(f"[{message['role']}]")
            for part in _parts(message):
                url = part.get("image_url", {}).get("url", "") if "image_url" in part else None
                cut = url is not None and len(url) > _SHOWN_CHARACTERS
                lines.append(part.get("text", "") if url is None else f"<{url[:_SHOWN_CHARACTERS]}{'...' * cut}>")
            lines.append("")
        return "\n".join([*lines, f"[options] {json.dumps(dict(self.options))}"])


def _parts(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    content = message.get("content")
    return [{"text": content}] if isinstance(content, str) else list(content or [])


def image_part(path: str | Path) -> dict[str, Any]:
    """Return a message part with an image file (JPEG, PNG, GIF or WebP) as a data URI.

    Raises MissingFileError if the file does not exist, and EndpointError if it cannot be read or has another format.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise MissingFileError(f"there is no image {path}: check the folder of images") from None
    except OSError as error:
        raise EndpointError(f"{path} cannot be read: {error.strerror or error}") from None
    kind = next((kind for start, kind in _KINDS.items() if data.startswith(start)), None)
    if kind is None:
        raise EndpointError(f"{path} is no JPEG, PNG, GIF or WebP file, which endpoints take: convert it")
    uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": uri}}
