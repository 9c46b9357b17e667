"""Video files made with PyAV."""

from pathlib import Path

import numpy as np
import pytest


def write(
    path: Path, frames: list[np.ndarray], codec: str = "mpeg4", times: list[int] | None = None, **options
) -> Path:
    """Frames, uint8 [H, W, 3] each, as a video of ten a second, or at these tenths of a second. Skips the test where
    this PyAV lacks the codec."""
    av = pytest.importorskip("av")
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV cannot write {codec}")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width = frames[0].shape[:2]
        formats = [each.name for each in stream.codec.video_formats or []]
        stream.pix_fmt = next(
            (each for each in ("yuvj420p", "yuv420p") if each in formats), (formats or ["yuv420p"])[0]
        )
        for name, value in options.items():
            setattr(stream.codec_context, name, value)
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format=stream.pix_fmt)
            frame.pts = times[number] if times else number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
