"""Videos of every kind are read, counted as they are read, or refused with one clear error."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llava_fast.errors import ImageError, MissingFileError
from llava_fast.inputs.pictures.video import (
    CONTAINERS,
    FrameRate,
    VideoFrames,
    each_frame,
    frame_count,
    read_video,
    take_frames,
    video_times,
)
from tests.support import made_videos, tiny


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# ---------------------------------------------------------------- reading


@pytest.fixture(scope="module")
def video_file(tmp_path_factory):
    """Eleven flat frames of 64x48, of brightness 20 * number."""
    frames = [np.full((48, 64, 3), 20 * number, np.uint8) for number in range(11)]
    return made_videos.write(tmp_path_factory.mktemp("video") / "clip.mp4", frames)


def test_video_frames_are_spaced_as_in_llava_next(video_file):
    every = read_video(video_file)
    assert every.shape == (11, 48, 64, 3)
    assert every.dtype == np.uint8
    np.testing.assert_allclose(every.mean(axis=(1, 2, 3)), 20 * np.arange(11), atol=4)
    for count in (1, 4, 11, 16):
        numbers = np.linspace(0, 10, count).astype(int)
        np.testing.assert_array_equal(read_video(str(video_file), count), every[numbers])
    np.testing.assert_array_equal(read_video(video_file.read_bytes(), 3), every[[0, 5, 10]])


def test_frames_at_a_rate_are_every_nth_one(video_file, tmp_path):
    """As LLaMA-VID's loader has them: range(0, frames, round(rate / wanted))."""
    every, (rate,) = read_video(video_file), {take_frames(video_file, 1).rate}
    for wanted in (rate, rate / 3.2, rate / 4, 2 * rate, rate / 100):
        chosen, numbers = FrameRate(wanted), list(range(0, 11, max(round(rate / wanted), 1)))
        np.testing.assert_array_equal(read_video(video_file, chosen), every[numbers])
        assert frame_count(video_file, chosen) == frame_count(video_file.read_bytes(), chosen) == len(numbers)
        sizes: set[tuple] = set()
        taken = take_frames(video_file.read_bytes(), chosen, None, lambda *given, sizes=sizes: sizes.add(given))
        np.testing.assert_array_equal(taken.frames, every[numbers])
        assert sizes == {(48, 64, len(numbers))}
        assert video_times(video_file, chosen).frames == [number / rate for number in numbers]
        assert video_times(taken, chosen).frames == [number / rate for number in numbers]
    for number, frame in enumerate(every[:5]):
        Image.fromarray(frame).save(tmp_path / f"{number}.png")
    np.testing.assert_array_equal(read_video(tmp_path, FrameRate(1)), every[[0, 2, 4]])  # two a second
    assert frame_count(tmp_path, FrameRate(1)) == 3
    for source in (video_file, video_file.read_bytes(), tmp_path, every, list(every)):
        for wanted in (None, FrameRate(1), FrameRate(rate / 3), 3):
            np.testing.assert_array_equal(np.stack(list(each_frame(source, wanted))), read_video(source, wanted))
    assert len(read_video(every, FrameRate(1))) == frame_count(list(every), FrameRate(1)) == 11  # they have no times
    assert len(read_video(VideoFrames(every[:4], np.arange(4), 4, None), FrameRate(1))) == 4
    Image.fromarray(every[0][:20]).save(tmp_path / "9.png")
    with pytest.raises(ImageError, match=r"the folder .* must have frames of one size; these have 64x48, 64x20"):
        list(each_frame(tmp_path))
    with pytest.raises(ValueError, match="frames per second must be above 0, not -1"):
        FrameRate(-1)


@pytest.mark.parametrize("wanted", [1e-320, 1e-9, 1e300])
def test_rates_of_any_size(video_file, wanted):
    chosen = FrameRate(wanted)
    expected = list(range(11)) if wanted > 1 else [0]
    assert take_frames(video_file, chosen).numbers.tolist() == expected
    assert frame_count(video_file, chosen) == len(read_video(video_file, chosen)) == len(expected)


def test_a_file_without_a_rate_says_what_to_do(video_file, monkeypatch):
    monkeypatch.setattr("llava_fast.inputs.pictures.video._rate_of", lambda _: None)
    for read in (read_video, frame_count, take_frames):
        with pytest.raises(ImageError, match=r"clip\.mp4' does not state its frame rate.*by video_fps=0"):
            read(video_file, FrameRate(1))
        read(video_file, 3)
    with pytest.raises(ImageError, match=r"are unknown$"):  # no option gives it times
        video_times(video_file, 3)


def test_frames_given_as_they_are():
    frames = np.stack([noise(6, 8, seed) for seed in range(5)])
    np.testing.assert_array_equal(read_video(frames), frames)
    np.testing.assert_array_equal(read_video(list(frames)), frames)
    np.testing.assert_array_equal(read_video(frames, 3), frames[[0, 2, 4]])
    mixed = [Image.fromarray(frames[0]), encoded(Image.fromarray(frames[1])), frames[2]]
    np.testing.assert_array_equal(read_video(mixed, 2), frames[[0, 2]])


def test_a_folder_of_frames_is_a_video(tmp_path):
    frames = np.stack([noise(6, 8, seed) for seed in range(12)])
    (tmp_path / "nested").mkdir()
    (tmp_path / ".hidden").write_text("no frame")
    with pytest.raises(ImageError, match=r"the folder .* has no frames"):
        read_video(tmp_path)
    for number in np.random.default_rng(0).permutation(12):  # names say the order
        Image.fromarray(frames[number]).save(tmp_path / f"{number:04d}.png")
    np.testing.assert_array_equal(read_video(str(tmp_path)), frames)
    np.testing.assert_array_equal(read_video(tmp_path, 3), frames[[0, 5, 11]])
    (tmp_path / "0005.png").write_text("no frame")
    with pytest.raises(ImageError, match=r"0005.png' is not an image"):
        read_video(tmp_path, 3)


def test_bad_videos(tmp_path, video_file):
    with pytest.raises(ImageError, match="has no frames"):
        read_video([])
    with pytest.raises(ImageError, match="has no frames"):
        read_video(np.zeros((0, 4, 4, 3), np.uint8))
    with pytest.raises(ImageError, match="uint8"):
        read_video(np.zeros((2, 4, 4, 3)))
    with pytest.raises(ImageError, match="one size; these have 4x3, 5x3"):
        read_video([noise(3, 4), noise(3, 5)])
    with pytest.raises(ValueError, match="at least 1"):
        read_video([noise(3, 4)], 0)
    with pytest.raises(TypeError, match="not int"):
        read_video(3)
    with pytest.raises(FileNotFoundError, match=r"nowhere.mp4"):
        read_video(tmp_path / "nowhere.mp4")
    with pytest.raises(ImageError, match="web address"):
        read_video("https://example.com/a.mp4")
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(video_file.read_bytes()[:100])
    with pytest.raises(ImageError, match=r"broken.mp4.*cannot be read as a video"):
        read_video(broken, 4)


def test_sound_without_pictures(tmp_path):
    wave = pytest.importorskip("wave")
    pytest.importorskip("av")
    with wave.open(str(tmp_path / "sound.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(800))
    with pytest.raises(ImageError, match=r"sound.wav.*no video stream"):
        read_video(tmp_path / "sound.wav")


@pytest.mark.parametrize("form", ["path", "bytes"])
def test_playlists_are_no_containers(form, video_file, tmp_path):
    """They name other files and addresses: a video from elsewhere could show what lies beside it."""
    playlist = tmp_path / "a.mp4"
    playlist.write_text(f"ffconcat version 1.0\nfile {video_file.name}\n")
    (tmp_path / video_file.name).write_bytes(video_file.read_bytes())
    source = playlist if form == "path" else playlist.read_bytes()
    for read in (read_video, frame_count, video_times):
        for frames in (2,) if read is video_times else (2, None):
            with pytest.raises(ImageError, match="none of the containers that are opened"):
                read(source, frames, CONTAINERS)
    assert read_video(video_file, 2, CONTAINERS).shape == read_video(video_file, 2).shape


def test_video_without_pyav_names_the_extra(video_file, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ImageError, match=r"pip install 'llava_fast\[video\]'"):
        read_video(video_file)


# ---------------------------------------------------------------- counting


@pytest.fixture(scope="module")
def five_frames(tmp_path_factory):
    frames = [tiny.picture(48, 64, number) for number in range(5)]
    return made_videos.write(tmp_path_factory.mktemp("video") / "five.mp4", frames)


@pytest.mark.parametrize("count", [None, 1, 4, 9])
def test_frames_of_every_kind_of_video(five_frames, tmp_path, count):
    frames = np.stack([tiny.picture(6, 8, seed) for seed in range(3)])
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"{number}.png")
    for video in (five_frames, str(five_frames), five_frames.read_bytes(), tmp_path, frames, list(frames)):
        assert frame_count(video, count) == len(read_video(video, count))


def test_only_the_first_frame_of_a_file_is_decoded_to_count_so_many(five_frames, monkeypatch):
    monkeypatch.setattr("llava_fast.inputs.pictures.video._total", None)
    assert frame_count(five_frames, 16) == 16


@pytest.fixture
def bad_videos(tmp_path):
    """(what is no video, the error, what it says) each."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.mp4").write_text("no video at all")
    return [
        (tmp_path / "nowhere.mp4", MissingFileError, "nowhere"),
        (tmp_path / "empty", ImageError, "the folder .* has no frames"),
        (tmp_path / "text.mp4", ImageError, "cannot be read as a video"),
    ]


def test_bad_videos_are_what_reading_them_says(bad_videos, five_frames):
    for video, error, message in (
        *bad_videos,
        ([], ImageError, "has no frames"),
        (3, TypeError, "not int"),
    ):
        for read in (frame_count, read_video):
            with pytest.raises(error, match=message):
                read(video, 4)


def test_times_of_frames(five_frames, tmp_path):
    """Five frames, ten a second. Frame i is at i / rate, also where a number repeats; a folder has two a second."""
    for video in (five_frames, str(five_frames), five_frames.read_bytes()):
        assert video_times(video, 3) == (0.5, [0.0, 0.2, 0.4])
        assert video_times(video, 7) == (0.5, pytest.approx([0.0, 0.0, 0.1, 0.2, 0.2, 0.3, 0.4]))
    for number in range(5):
        Image.fromarray(tiny.picture(6, 8)).save(tmp_path / f"{number}.png")
    assert video_times(tmp_path, 2) == (2.5, [0.0, 2.0])


def test_times_where_the_header_has_no_number_of_frames(five_frames, tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "clip.mkv"
    with av.open(str(five_frames)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.size:
                packet.stream = stream
                new.mux(packet)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 0
    assert video_times(path, 3) == (0.5, [0.0, 0.2, 0.4])
    np.testing.assert_array_equal(take_frames(path.read_bytes(), 3).frames, read_video(path, 3))


def test_a_video_without_times_is_refused(bad_videos, five_frames):
    for video, error, message in (
        *bad_videos,
        (np.zeros((3, 4, 4, 3), np.uint8), ImageError, "frames given as images have no times: give a video file"),
    ):
        with pytest.raises(error, match=message):
            video_times(video, 4)


@pytest.mark.parametrize("count", [1, 3, 7])
def test_frames_that_were_taken_are_a_video(five_frames, count):
    taken = take_frames(five_frames.read_bytes(), count)
    assert taken.total == 5
    np.testing.assert_array_equal(taken.frames, read_video(five_frames, count))
    assert read_video(taken) is taken.frames
    assert frame_count(taken) == count
    assert video_times(taken, count) == video_times(five_frames, count)


# ---------------------------------------------------------------- what is counted is what is read

KINDS = [
    ("mp4", "mpeg4", {}),
    ("mp4", "mpeg4", {"max_b_frames": 2}),
    ("mp4", "libx264", {"max_b_frames": 2}),
    ("mkv", "ffv1", {}),
    ("avi", "mpeg4", {}),
    ("avi", "mjpeg", {}),
    ("mov", "mjpeg", {}),
    ("ts", "mpeg2video", {"max_b_frames": 2}),
    ("mpg", "mpeg2video", {}),
    ("mjpeg", "mjpeg", {}),
    ("webm", "libvpx", {"options": {"auto-alt-ref": "1", "lag-in-frames": "4"}}),
    ("gif", "gif", {}),
    ("apng", "apng", {}),
    ("flv", "flv", {}),
    ("wmv", "wmv2", {}),
]


def check_counts(video) -> str | int:
    """How many frames are read, or what is said where they cannot be; counts and times must agree with it."""
    try:
        total = len(read_video(video))
    except ImageError as error:
        for read in (read_video, video_times):
            with pytest.raises(ImageError) as caught:
                read(video, 3)
            assert str(caught.value) == str(error)
        return str(error)
    assert frame_count(video) == total
    assert len(read_video(video, 3)) == frame_count(video, 3) == 3
    try:
        duration, times = video_times(video, total)
    except ImageError as error:
        assert "does not state its frame rate" in str(error)
    else:
        assert times == pytest.approx(np.arange(total) * duration / total)
    return total


@given(kind=st.sampled_from(KINDS), gaps=st.lists(st.integers(1, 5), min_size=1, max_size=12), kept=st.floats(0.2, 2))
@settings(max_examples=30, deadline=None)
def test_counts_are_what_is_read(tmp_path_factory, kind, gaps, kept):
    """Of whole files and of files cut short, at a constant rate and at a variable one."""
    suffix, codec, options = kind
    path = tmp_path_factory.mktemp("made") / f"clip.{suffix}"
    frames = [tiny.picture(48, 64, number) for number in range(len(gaps))]
    constant = suffix in ("ts", "mpg", "avi", "mjpeg", "flv")  # they keep no other times, or fill gaps
    made_videos.write(path, frames, codec, None if constant else np.cumsum(gaps).tolist(), **options)
    assert check_counts(path) in range(1, len(frames) + 1)  # an encoder may leave one out, whatever its header says
    if kept < 1:
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
        if isinstance(check_counts(path), str):
            return
    np.testing.assert_array_equal(take_frames(path, 3).frames, read_video(path, 3))  # whatever the header says


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("pictures", [1, 4])
def test_an_image_given_as_a_video(tmp_path, kind, pictures):
    """A still image is one frame; an animated WebP, which FFmpeg does not decode, is refused at once."""
    path = tmp_path / f"image.{kind.lower()}"
    frames = [Image.fromarray(noise(48, 64, seed)) for seed in range(pictures)]
    animated = {"save_all": True, "append_images": frames[1:], "duration": 100} if kind not in ("JPEG", "BMP") else {}
    frames[0].save(path, **animated)
    found = check_counts(path)
    if kind == "WEBP" and pictures > 1:
        assert "image.webp' cannot be read as a video" in found
        with pytest.raises(ImageError, match="cannot be read as a video"):
            frame_count(path, 3)
    else:
        assert found == (pictures if kind in ("PNG", "GIF") else 1)


def test_a_large_jpeg_is_one_frame(tmp_path):
    path = tmp_path / "large.jpg"
    Image.fromarray(noise(400, 600)).save(path, quality=95)
    for video in (path, path.read_bytes()):
        assert check_counts(video) == 1


def test_a_video_whose_size_changes_is_refused(tmp_path):
    """Whichever frames are wanted."""
    path = tmp_path / "two.mjpeg"
    path.write_bytes(b"".join(encoded(Image.fromarray(noise(48, side)), "JPEG") for side in (64, 64, 32, 64)))
    said = r"two.mjpeg' changes its size from 64x48 to 32x48 at frame 2: convert it to one size"
    for number in (None, 1, 2):
        with pytest.raises(ImageError, match=said):
            read_video(path, number)
    with pytest.raises(ImageError, match=said):
        video_times(path, 2)


def test_what_in_a_folder_is_a_frame(tmp_path):
    for name in ("Thumbs.db", ".DS_Store", "desktop.ini", "frames.txt", "7.jpg.part", ".8.png"):
        (tmp_path / name).write_bytes(b"no frame")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ImageError, match="has no frames: image files"):
        frame_count(tmp_path, 4)
    for name in ("1.png", "2.PNG", "3.jpg"):
        Image.fromarray(noise(6, 8)).save(tmp_path / name)
    assert check_counts(tmp_path) == 3
    Image.fromarray(noise(7, 8)).save(tmp_path / "4.png")
    with pytest.raises(ImageError, match=f"the folder .*{tmp_path.name}' must .* one size; these have 8x6, 8x7"):
        read_video(tmp_path)
