"""The user's options for a processor."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Literal

VIDEO_FRAMES = 16
"""Frames that are used of a video file if nobody says otherwise."""


@dataclass(frozen=True, kw_only=True)
class ProcessorOptions:
    """Options of a processor that its checkpoint does not determine: `load(path, processor=ProcessorOptions(...))`.

    video_frames    number of frames of a video file, spaced uniformly. Default: 16, or what `video_fps` says; a number
                    without `video_fps` takes the place of the model's own rate. (Frames that are given as images are
                    all used; InstructBLIP for videos takes 4 of a file.)
    video_fps       frames a second of a video file, instead of `video_frames`: its first frame and every n-th after it.
                    0: `video_frames`. Default: 1 for LLaMA-VID, else 0.
    time_instruction  add LLaVA-NeXT's sentence with a video's duration and its frames' times
                    (chat.messages.with_video_times) to messages. The video must be a file or a folder of frames.
    literal_text    encode control tokens and placeholders in a message or a prompt as ordinary characters (see
                    inputs.literal); images and videos must then be content items.
    formats         allowed Pillow formats of image files, such as ("JPEG", "PNG") (None: all). With it, video files are
                    opened only in containers that hold their own frames (see inputs.pictures.video).
    exif            apply images' EXIF orientation. Default: as the checkpoint's reference code does for a file:
                    transformers does, the original LLaVA does not.
    resample        "pillow" (bit-identical), or "torchvision" (used by transformers if it is installed).
    pillow          the order of Pillow's passes: "12" or "13". Default: the installed Pillow's.
    image_turns     for a connector that reads the question with each image and was trained with the image in every
                    question (LLaMA-VID): "every", a question without an image gets the last question's, or "given",
                    images stay where the request has them.
    threads         threads per image; 0: one per core.
    router_text     what SliME's router compares an image with in training: "prompt", the text that is given at
                    inference too, or "all", also the answers, as the original trainer does.
    tiles_on        "host", or "device": a batch then contains whole images, and the device to which it is moved makes
                    the tiles, bit-identically. Only for resample="pillow".

    Raises ValueError for any other value.
    """

    video_frames: int | None = None
    video_fps: float | None = None
    time_instruction: bool = False
    literal_text: bool = False
    formats: tuple[str, ...] | None = None
    exif: bool | None = None
    resample: Literal["pillow", "torchvision"] = "pillow"
    pillow: Literal["12", "13"] | None = None
    image_turns: Literal["every", "given"] = "every"
    threads: int = 0
    router_text: Literal["prompt", "all"] = "prompt"
    tiles_on: Literal["host", "device"] = "host"

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be {' or '.join(map(repr, known))}, got {getattr(self, name)!r}")
        for name, least in (("video_frames", 1), ("threads", 0)):
            value = getattr(self, name)
            may_be_none = value is None and name == "video_frames"
            if not may_be_none and (not isinstance(value, Integral) or value < least):
                raise ValueError(f"{name} must be a whole number, {least} or more, got {value!r}")
        if self.video_fps is not None and not 0 <= self.video_fps < float("inf"):
            raise ValueError(f"video_fps must be 0 or more, got {self.video_fps!r}")
        if self.tiles_on == "device" and self.resample != "pillow":
            raise ValueError(f"a device resizes as Pillow does, not as {self.resample}: use tiles_on='host'")


_CHOICES = {
    "resample": ("pillow", "torchvision"),
    "image_turns": ("every", "given"),
    "pillow": (None, "12.1", "12", "13"),
    "router_text": ("prompt", "all"),
    "tiles_on": ("host", "device"),
}
