"""Images in every question of a conversation, for connectors whose rows depend on the question (LLaMA-VID).

Source: dvlab-research/LLaMA-VID b3d3ae2 train.py (preprocess_imgsp_v1), which puts the image at the beginning or the
end of a question, by chance; here it is the beginning.
"""

from __future__ import annotations

from typing import Any

from llava_fast.inputs.chat.messages import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, normalise_messages


def with_repeated_images(request: Any, literal: bool = False) -> tuple[Any, int]:
    """(the request in which each user message without an image or video begins with those of the user message before
    it, how often its video then occurs). Unchanged if it has no messages, or another number of images or videos than
    its placeholders, which rendering refuses. literal: a placeholder in a message's text is text.
    """
    if not isinstance(request, dict) or not isinstance(request.get("messages"), (list, tuple)):
        return request, 1
    images_given = request.get("images")
    if not (images_given is None or isinstance(images_given, (list, tuple))):
        return request, 1  # which rendering refuses too
    messages, sources = normalise_messages(request["messages"])
    given, has_video = list(images_given or []), request.get("video") is not None
    found, taken = iter(sources), iter(given)
    made: list[dict] = []
    images: list[Any] = []
    last: list[dict] = []  # the images and videos of the last question with any, and the sources of these images
    of_last: list[Any] = []
    used = videos = named = 0
    for message in messages:
        items, own, clips = message["content"], [], 0
        for item in items:
            in_text = item["type"] == "text"
            written = item["text"].count(IMAGE_PLACEHOLDER) if in_text else int(item["type"] == "image")
            each = [next(found) for _ in range(written)]
            if in_text and literal:
                continue
            used += sum(source is None for source in each)
            own += [next(taken, None) if source is None else source for source in each]
            if has_video:
                clips += item["text"].count(VIDEO_PLACEHOLDER) if in_text else int(item["type"] == "video")
        if message["role"] == "user":
            named += clips
            if own or clips:
                last, of_last = [*[{"type": "image"}] * len(own), *[{"type": "video"}] * clips], own
            else:
                items, own = [*last, *items], of_last
            videos += sum(item["type"] == "video" for item in last)
        images += own
        made.append({**message, "content": items})
    if used != len(given) or named > 1:
        return request, 1
    return {**request, "messages": made, "images": images}, max(videos, 1)
