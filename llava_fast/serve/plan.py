"""The plan of a conversation's images and videos: their tiles, and the image region that each token covers.

The counts equal those of the prompt, because both are computed from the same TokenPlan. The page only draws them.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from llava_fast.inputs.pictures.headers import image_size
from llava_fast.inputs.pictures.video import VideoFrames, read_video
from llava_fast.inputs.plan.plan import TextPiece
from llava_fast.inputs.prepared import Placeholder
from llava_fast.inputs.processor import Processor
from llava_fast.inputs.tiling.coverage import Coverage, Rectangle, Region, image_coverage, video_coverage
from llava_fast.inputs.tiling.rows import NEWLINE, POOLED, TOKEN


class RegionPlan(BaseModel):
    """One tile. For a tower of native resolution, the whole image or one slice of it."""

    box: Rectangle = Field(description="left, top, width, height in the image's pixels; may reach beyond the image.")
    kept: Rectangle | None = Field(
        description="The part whose patches give tokens; null if no token has a place in it."
    )
    tokens: int
    points: list[float] = Field(description="x, y of the middle of what each token reads, one token after another.")


class ViewPlan(BaseModel):
    """One resized version of the image (a canvas that is cut into regions), or one frame of a video."""

    width: int = Field(description="Of the canvas, in pixels that the tower reads.")
    height: int
    frame: int | None = Field(None, description="The frame's number in the video file.")
    seconds: float | None = Field(None, description="When the frame is, if the file says.")
    regions: list[RegionPlan]


class ItemPlan(BaseModel):
    """An image or a video."""

    kind: Literal["image", "video"]
    width: int
    height: int
    oriented: bool = Field(description="An image file's EXIF orientation was applied.")
    tiles: int = Field(description="For a tower of native sizes, patches.")
    tokens: int
    optional_tokens: int = Field(
        description="Tokens among them that a router may leave out by the prompt's text: `tokens` is then a maximum."
    )
    newline_tokens: int = Field(description="Learned newlines among the tokens.")
    marker_tokens: int = Field(description="Tokens of the vocabulary among them, around or between tiles.")
    pooled_tokens: int = Field(description="Tokens that are each pooled from several patches.")
    views: list[ViewPlan]


class PromptPlan(BaseModel):
    """The response of /v1/llava_fast/plan."""

    object: Literal["llava_fast.plan"] = "llava_fast.plan"
    model: str
    prompt_tokens: int
    text_tokens: int
    max_prompt_tokens: int
    items: list[ItemPlan]


def prompt_plan(processor: Processor, request: dict[str, Any], model: str, most: int) -> PromptPlan:
    """Return the plan of a request, whose videos are VideoFrames. Only the headers of images are read. Raises
    RequestError and ImageError."""
    outline = processor.outline(request)
    text = sum(len(part.ids) for part in outline if isinstance(part, TextPiece) and not part.begins_answer)
    items = [_item(processor, part) for part in outline if isinstance(part, Placeholder)]
    total = text + sum(item.tokens for item in items)
    return PromptPlan(model=model, prompt_tokens=total, text_tokens=text, max_prompt_tokens=most, items=items)


def _item(processor: Processor, part: Placeholder) -> ItemPlan:
    geometry, source = processor.geometry, part.source
    if part.kind == "<video>":
        frames = read_video(source)
        height, width = frames.shape[1:3]
        return _planned("video", video_coverage(geometry, len(frames), height, width), height, width, False, source)
    height, width = image_size(source, processor.exif)
    return _planned("image", image_coverage(geometry, height, width, part.alone), height, width, processor.exif)


def _planned(
    kind: Literal["image", "video"],
    seen: Coverage,
    height: int,
    width: int,
    oriented: bool,
    video: VideoFrames | None = None,
) -> ItemPlan:
    views = [
        ViewPlan(width=view.canvas[1], height=view.canvas[0], regions=list(map(_region, regions)))
        for view, regions in zip(seen.views, seen.regions, strict=True)
    ]
    if video is not None:
        for view, number in zip(views, video.numbers.tolist(), strict=True):
            view.frame = number
            view.seconds = None if video.rate is None else number / video.rate
    rows = seen.rows
    counts = {
        name: int((rows.kind == kind).sum())
        for name, kind in (("newline_tokens", NEWLINE), ("marker_tokens", TOKEN), ("pooled_tokens", POOLED))
    }
    return ItemPlan(
        kind=kind,
        width=width,
        height=height,
        oriented=oriented,
        tiles=rows.tiles,
        tokens=len(rows),
        optional_tokens=0 if rows.optional is None else int(rows.optional.sum()),
        views=views,
        **counts,
    )


def _region(region: Region) -> RegionPlan:
    points = region.points.round(2).ravel().tolist()
    return RegionPlan(box=region.box, kept=region.kept, tokens=region.tokens, points=points)
