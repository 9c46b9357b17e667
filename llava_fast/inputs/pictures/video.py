"""The frames of a video: their number, times and pixels.

The number of frames according to headers or packets may differ from the number that a decoder returns, so frames are
always counted by decoding (`_decoded`).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from llava_fast.errors import ImageError
from llava_fast.inputs.pictures.reading import open_image, source_file, source_name

FOLDER_RATE = 2.0
"""Frames per second of a folder of frames: LLaVA-NeXT's value for ShareGPTVideo (llava/train/train.py)."""

CONTAINERS = "mov,matroska,avi,mpegts,mpeg,gif,flv,ogg,asf"
"""FFmpeg's names of containers that hold their own frames, for files that nobody vouches for. A playlist instead names
other files and addresses, which FFmpeg opens."""

_FILE = (str, os.PathLike, bytes, bytearray, memoryview)


@dataclass(frozen=True)
class FrameRate:
    """Frames a second that are used of a video file or a folder of frames: its first frame, and every n-th after it,
    where n is the video's rate divided by this one, rounded (LLaMA-VID's choice). ValueError unless it is above 0.
    """

    per_second: float

    def __post_init__(self) -> None:
        if not self.per_second > 0:
            raise ValueError(f"frames per second must be above 0, not {self.per_second}")

    def of(self, total: int, rate: float) -> np.ndarray:
        """int64: the frame indices that are used of `total` frames at `rate` a second."""
        return np.arange(0, total, max(round(min(rate / self.per_second, total)), 1))


def read_video(source: Any, num_frames: int | FrameRate | None = None, containers: str | None = None) -> np.ndarray:
    """Frames of a video as uint8 [frames, height, width, 3].

    source      a path or the bytes of a video file (needs PyAV: `pip install 'llava_fast[video]'`); or the frames: a
                folder of image files (see `frame_files`), a list of sources for `open_image`, a uint8 array
                [F, H, W, 3], or VideoFrames. All frames must have the same size.
    num_frames  number of frames, spaced uniformly from the first to the last: frame indices
                np.linspace(0, total - 1, num_frames).astype(int), as in LLaVA-NeXT (indices repeat if the video has
                fewer frames). A FrameRate: as many as its duration has; of frames without times, all. None: all frames.
    containers  FFmpeg's names of the containers that a video file may be in, such as CONTAINERS. None: any.
    Raises ImageError for a video that cannot be read, has no frames or changes its size, ValueError for num_frames
    below 1.
    """
    if isinstance(num_frames, int) and num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, not {num_frames}")
    name = "the list of video frames"
    if _is_folder(source):
        name = f"the folder {source_name(source)}"
        source = frame_files(source)
        if isinstance(num_frames, FrameRate):
            source, num_frames = [source[i] for i in num_frames.of(len(source), FOLDER_RATE)], None
    if isinstance(source, _FILE):
        return _read_file(source, num_frames, containers)
    if isinstance(num_frames, FrameRate):
        num_frames = None
    if isinstance(source, VideoFrames):
        source = source.frames
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 4 or source.shape[-1] != 3 or 0 in source.shape[1:]:
            raise ImageError(f"a video array must be uint8 [frames, H, W, 3], not {source.dtype} {source.shape}")
        if not len(source):
            raise ImageError("the video array has no frames")
        return np.ascontiguousarray(source if num_frames is None else source[uniform_frames(len(source), num_frames)])
    if not isinstance(source, Sequence):
        raise TypeError(f"a video is a path, bytes, list of frames or uint8 array, not {type(source).__name__}")
    if not source:
        raise ImageError(f"{name} has no frames")
    wanted = range(len(source)) if num_frames is None else uniform_frames(len(source), num_frames)
    frames = [open_image(source[i]) for i in wanted]
    if len({frame.shape for frame in frames}) > 1:
        sizes = sorted({f"{frame.shape[1]}x{frame.shape[0]}" for frame in frames})
        raise ImageError(f"{name} must have frames of one size; these have {', '.join(sizes)}")
    return np.stack(frames)


def each_frame(
    source: Any, num_frames: int | FrameRate | None = None, containers: str | None = None
) -> Iterator[np.ndarray]:
    """The frames of `read_video`, uint8 [height, width, 3], one by one: of a video file or a folder, if all frames or a
    rate are wanted, only one is in memory at a time. Raises what read_video does, for frames of several sizes once one
    is met.
    """
    if isinstance(num_frames, int):
        yield from read_video(source, num_frames, containers)
    elif _is_folder(source):
        files = frame_files(source)
        wanted = range(len(files)) if num_frames is None else num_frames.of(len(files), FOLDER_RATE)
        size = None
        for number in wanted:
            frame = open_image(files[number])
            size = size or frame.shape
            if frame.shape != size:
                sizes = ", ".join(f"{width}x{height}" for height, width, _ in (size, frame.shape))
                raise ImageError(f"the folder {source_name(source)} must have frames of one size; these have {sizes}")
            yield frame
    elif isinstance(source, _FILE):
        chosen = None if num_frames is None else set(_at_rate(source, num_frames, containers).tolist())
        with contextlib.closing(_decoded(source, chosen, containers)) as frames:
            yield from (frame for frame in frames if frame is not None)
    else:
        yield from read_video(source, num_frames, containers)


def frame_count(source: Any, num_frames: int | FrameRate | None = None, containers: str | None = None) -> int:
    """The number of frames that `read_video` returns for the same arguments. Raises the same errors for a missing file,
    a file that is not a video or that this FFmpeg cannot decode, and a video without frames. Decodes the first frame of
    a video file, or all frames if num_frames is None."""
    if isinstance(num_frames, FrameRate):
        if _is_folder(source) or isinstance(source, _FILE):
            return len(_at_rate(source, num_frames, containers))
        num_frames = None
    if _is_folder(source):
        total = len(frame_files(source))
    elif isinstance(source, _FILE):
        if num_frames is not None:
            with contextlib.closing(_decoded(source, (), containers)) as frames:
                next(frames)
        total = _total(source, containers) if num_frames is None else num_frames
    elif isinstance(source, VideoFrames):
        total = len(source.frames)
    elif isinstance(source, np.ndarray) or not isinstance(source, Sequence) or not source:
        total = len(read_video(source, num_frames))
    else:
        total = len(source)
    return total if num_frames is None else num_frames


@dataclass(frozen=True, eq=False)
class VideoFrames:
    """Frames taken from a video file (`take_frames`): a video that is not decoded again.

    frames  uint8 [frames, height, width, 3].
    numbers int64 [frames]: their numbers among the file's `total` frames.
    rate    frames a second, as the header says; None if it does not.
    """

    frames: np.ndarray
    numbers: np.ndarray
    total: int
    rate: float | None


Check = Callable[[int, int, int], None]


def take_frames(
    source: Any,
    num_frames: int | FrameRate,
    most_frames: int | None = None,
    check_size: Check | None = None,
    containers: str | None = None,
) -> VideoFrames:
    """The frames of `read_video(source, num_frames)` of a video file, by decoding it once if its header says how many
    frames it has, and twice if not. containers: see `read_video`. Raises ImageError.

    most_frames, check_size  for files that nobody vouches for. A file with more frames is refused. `check_size` is
        called with the height and width that the header says and the number of frames that are taken (1 if that is not
        known yet), before any frame is decoded, and with those of each frame; it raises for what is too large.
    """
    wanted: set[int] = set()
    rates: list[float | None] = []
    taken = num_frames if isinstance(num_frames, int) else 1
    size = 0, 0

    def chosen(total: int) -> np.ndarray:
        if isinstance(num_frames, int):
            return uniform_frames(total, num_frames)
        if rates[-1] is None:
            raise ImageError(_NO_RATE.format(source_name(source)) + _FIXED_NUMBER)
        return num_frames.of(total, rates[-1])

    def check_number(frames: int) -> None:
        if most_frames is not None and frames > most_frames:
            raise ImageError(f"{source_name(source)} has more than {most_frames} frames: shorten it")

    def see_header(stream: Any) -> None:
        nonlocal taken
        rates.append(_rate_of(stream))
        check_number(stream.frames)
        numbers = chosen(stream.frames).tolist() if stream.frames > 0 and not wanted else []
        taken = len(numbers) or taken
        see_size(stream.codec_context.height, stream.codec_context.width)
        wanted.update(numbers)

    def see_size(height: int, width: int) -> None:
        nonlocal size
        size = height, width
        if check_size is not None:
            check_size(height, width, taken)

    def decoded() -> tuple[dict[int, np.ndarray], int]:
        found, number = {}, -1
        with contextlib.closing(_decoded(source, wanted, containers, see_header, see_size)) as frames:
            for number, frame in enumerate(frames):
                check_number(number + 1)
                if frame is not None:
                    found[number] = frame
        return found, number + 1

    found, total = decoded()
    numbers = chosen(total)
    taken = len(numbers)
    see_size(*size)
    if not found.keys() >= set(numbers.tolist()):
        wanted = set(numbers.tolist())
        found, _ = decoded()
    if not found.keys() >= set(numbers.tolist()):
        raise ImageError(f"{source_name(source)} changed while it was read")
    return VideoFrames(np.stack([found[number] for number in numbers.tolist()]), numbers, total, rates[-1])


class VideoTimes(NamedTuple):
    """A video's duration, and the times of the selected frames, in seconds."""

    duration: float
    frames: list[float]


def video_times(source: Any, num_frames: int | FrameRate, containers: str | None = None) -> VideoTimes:
    """The duration of a video and the times of the frames of `read_video(source, num_frames)`: frame i is at i / rate.
    The rate is the average rate in a file's header, as in LLaVA-NeXT (process_video_with_decord in llava/utils.py), or
    FOLDER_RATE for a folder of frames. A file's frames are counted by decoding. containers: see
    `read_video`. Raises ImageError for a video without times, and the errors of `read_video`.
    """
    if _is_folder(source):
        total, rate = frame_count(source), FOLDER_RATE
    elif isinstance(source, VideoFrames):
        if source.rate is None:
            raise ImageError(_NO_RATE.format("the video"))
        numbers = source.numbers
        if isinstance(num_frames, int):
            numbers = numbers[uniform_frames(len(numbers), num_frames)]
        return VideoTimes(source.total / source.rate, [int(number) / source.rate for number in numbers])
    elif isinstance(source, _FILE):
        total, rate = _total(source, containers), _rate(source, containers)
    else:
        raise ImageError("frames given as images have no times: give a video file or a folder of frames")
    chosen = uniform_frames(total, num_frames) if isinstance(num_frames, int) else num_frames.of(total, rate)
    return VideoTimes(total / rate, [int(number) / rate for number in chosen])


def frame_files(folder: str | os.PathLike) -> list[str]:
    """The frames of a folder, sorted by name: files with an image suffix known to Pillow. Hidden files, folders and
    other files are ignored. Raises ImageError if there are no frames."""
    kinds = _image_suffixes()
    with os.scandir(os.fsdecode(folder)) as entries:
        files = sorted(
            each.path
            for each in entries
            if each.is_file() and not each.name.startswith(".") and os.path.splitext(each.name)[1].lower() in kinds
        )
    if not files:
        raise ImageError(f"the folder {source_name(folder)} has no frames: image files, such as .jpg or .png")
    return files


def uniform_frames(total: int, count: int) -> np.ndarray:
    """int64 [count]: the frame indices that `read_video` selects, spaced uniformly from the first to the last."""
    return np.linspace(0, total - 1, count).astype(int)


@functools.cache
def _image_suffixes() -> frozenset[str]:
    kinds = Image.registered_extensions()  # also initialises Pillow's plugins
    return frozenset(suffix for suffix, kind in kinds.items() if kind in Image.OPEN)


def _is_folder(source: Any) -> bool:
    return isinstance(source, (str, os.PathLike)) and os.path.isdir(source)


# ---------------------------------------------------------------- video files


def _at_rate(source: Any, rate: FrameRate, containers: str | None) -> np.ndarray:
    """int64: the frame indices that are used of a video file or a folder of frames."""
    if _is_folder(source):
        return rate.of(len(frame_files(source)), FOLDER_RATE)
    return rate.of(_total(source, containers), _rate(source, containers, _FIXED_NUMBER))


def _read_file(source: Any, num_frames: int | FrameRate | None, containers: str | None) -> np.ndarray:
    if num_frames is None:
        return np.stack([frame for frame in _decoded(source, None, containers) if frame is not None])
    if isinstance(num_frames, FrameRate):
        order = _at_rate(source, num_frames, containers).tolist()
    elif not isinstance(source, (str, os.PathLike)):
        return take_frames(source, num_frames, containers=containers).frames
    else:
        order = uniform_frames(_total(source, containers), num_frames).tolist()  # of a path the number is kept
    with contextlib.closing(_decoded(source, set(order), containers)) as frames:
        found = {n: frame for n, frame in enumerate(itertools.islice(frames, order[-1] + 1)) if frame is not None}
    if len(found) < len(set(order)):
        raise ImageError(f"{source_name(source)} changed while it was read")
    return np.stack([found[number] for number in order])


def _total(source: Any, containers: str | None) -> int:
    """The number of frames of a video file, counted by decoding."""
    if not isinstance(source, (str, os.PathLike)) or not os.path.exists(source):  # bytes, a data URI, or invalid
        return sum(1 for _ in _decoded(source, (), containers))
    about = os.stat(source)
    return _total_of_file(os.path.abspath(os.fsdecode(source)), about.st_size, about.st_mtime_ns, containers)


@functools.lru_cache(4096)
def _total_of_file(path: str, size: int, changed: int, containers: str | None) -> int:
    """`_total`, cached as long as the file's size and modification time do not change."""
    return sum(1 for _ in _decoded(path, (), containers))


def _decoded(
    source: Any,
    wanted: Collection[int] | None = None,
    containers: str | None = None,
    see_header: Callable[[Any], None] | None = None,
    check_size: Callable[[int, int], None] | None = None,
) -> Generator[np.ndarray | None]:
    """The frames of a video file in order: uint8 [height, width, 3] for frames in `wanted` (None: all), None for
    others. containers: see `read_video`. see_header: called with the stream before a frame is decoded;
    check_size: called with each frame's height and width. Raises ImageError, also for a video without frames and for
    one whose size changes."""
    av, name = _pyav(), source_name(source)
    first = None
    try:
        with _opened(source, name, containers) as container:
            stream = container.streams.video[0]
            if see_header is not None:
                see_header(stream)
            stream.thread_type = "AUTO"
            for number, frame in enumerate(container.decode(video=0)):
                if check_size is not None:
                    check_size(frame.height, frame.width)
                size = f"{frame.width}x{frame.height}"
                first = first or size
                if size != first:
                    raise ImageError(
                        f"{name} changes its size from {first} to {size} at frame {number}: convert it to one size"
                    )
                yield frame.to_ndarray(format="rgb24") if wanted is None or number in wanted else None
    except av.FFmpegError as error:
        raise ImageError(f"{name} cannot be read as a video: {error}") from error
    if first is None:
        raise ImageError(f"{name} has no frames")


_NO_RATE = "{} does not state its frame rate, so the times of its frames are unknown"
_FIXED_NUMBER = ": take a number of frames, by video_fps=0 and video_frames"


def _rate(source: Any, containers: str | None, advice: str = "") -> float:
    """The average frame rate in the header of a video file, per second. Raises ImageError, which ends with `advice`."""
    name = source_name(source)
    with _opened(source, name, containers) as container:
        rate = _rate_of(container.streams.video[0])
    if rate is None:
        raise ImageError(_NO_RATE.format(name) + advice)
    return rate


def _rate_of(stream: Any) -> float | None:
    rate = stream.average_rate or stream.guessed_rate  # PyAV 17 may only have the second
    return float(rate) if rate else None


def _opened(source: Any, name: str, containers: str | None = None) -> Any:
    """A path or the bytes of a video file as a PyAV container with a video stream. Raises ImageError."""
    av = _pyav()
    options = {} if containers is None else {"format_whitelist": containers}
    try:
        container = av.open(source_file(source, name), options=options)
    except av.ArgumentError as error:
        if containers is None:
            raise ImageError(f"{name} cannot be read as a video: {error}") from error
        raise ImageError(f"{name} is in none of the containers that are opened ({containers}): convert it") from error
    except av.FFmpegError as error:
        raise ImageError(f"{name} cannot be read as a video: {error}") from error
    if not container.streams.video:
        container.close()
        raise ImageError(f"{name} has no video stream")
    return container


def _pyav() -> Any:
    try:
        import av
    except ImportError:
        raise ImageError("reading a video file needs PyAV: pip install 'llava_fast[video]'") from None
    return av
