"""FastProcessor for LLaVA-NeXT-Video and LLaVA-OneVision: images as transformers makes them, frames as its PIL image
processor with the same settings would."""

import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, LlavaNextVideoProcessor, LlavaOnevisionProcessor
from transformers.models.llava_next_video.video_processing_llava_next_video import LlavaNextVideoVideoProcessor
from transformers.models.llava_onevision.video_processing_llava_onevision import LlavaOnevisionVideoProcessor
from transformers.utils import is_torchvision_available

import llava_fast
from llava_fast.integrations.processor import AnyVideoProcessor, FastProcessor
from tests.support import tiny
from tests.support.parity import assert_close
from tests.support.processor_fields import SIZES, assert_same

CASES = {  # tiles of an even number of patches: transformers' processor miscounts a video's rows of an odd one
    "video": dataclasses.replace(tiny.CASES["video"], tile=48, pinpoints=((48, 96), (96, 48), (96, 96))),
    "onevision": tiny.CASES["onevision"],
}
NAMES = list(CASES)
ROWS = {"video": 3 * 9, "onevision": 3 * 16 + 1}
"""Rows of a video of three frames."""


def stock(name: str):
    """transformers' own processor: of the check that needs torchvision alone, ours takes the place."""
    case = CASES[name]
    square = {"height": case.tile, "width": case.tile}
    parts = {"image_processor": tiny.image_processor(case), "tokenizer": tiny.hf_processor(case).tokenizer}
    if name == "onevision":
        kind, options = LlavaOnevisionProcessor, {"num_image_tokens": (case.tile // case.patch) ** 2}
        options |= {"vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_3"}
        video = LlavaOnevisionVideoProcessor(size=square)
    else:
        kind = LlavaNextVideoProcessor
        options = {"patch_size": case.patch, "vision_feature_select_strategy": "default"}
        options |= {"num_additional_image_tokens": 1}
        video = LlavaNextVideoVideoProcessor(size={"shortest_edge": case.tile}, crop_size=square)
    kind = type(kind.__name__, (AnyVideoProcessor, kind), {})
    return kind(video_processor=video, **parts, **options)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Name -> a directory with the configuration and the stock processor's files."""
    found = {}
    for name in NAMES:
        found[name] = tmp_path_factory.mktemp(name)
        tiny.hf_config(CASES[name]).save_pretrained(found[name])
        stock(name).save_pretrained(found[name])
    return found


def film(frames: int = 3, height: int = 70, width: int = 50) -> np.ndarray:
    return np.stack([tiny.picture(height, width, seed) for seed in range(frames)])


@pytest.mark.parametrize("name", NAMES)
def test_images_have_every_field_and_every_bit(name, checkpoints):
    fast = FastProcessor.from_pretrained(checkpoints[name])
    assert isinstance(fast, (LlavaNextVideoProcessor, LlavaOnevisionProcessor))
    sizes = SIZES + [tuple(np.random.default_rng(i).integers(2, 400, 2)) for i in range(15)]
    for first in range(0, len(sizes), 5):
        part = [Image.fromarray(tiny.picture(*size)) for size in sizes[first : first + 5]]
        options = {"images": part, "text": [f"<image> {i}" for i in range(len(part))], "padding": True}
        if name == "onevision" and any(max(image.size) > 100 * min(image.size) for image in part):
            continue  # so extreme that nothing is left of it
        if name == "video":  # which takes a prompt for each image, and counts one image's rows by its own tiles
            options = {"images": part[:1], "text": ["<image> a"]}
        assert_same(fast(**options, return_tensors="pt"), stock(name)(**options, return_tensors="pt"))


def test_images_that_share_a_prompt(checkpoints):
    fast = FastProcessor.from_pretrained(checkpoints["onevision"])
    groups = [[tiny.picture(40, 90), tiny.picture(90, 33)], [tiny.picture(120, 70)]]
    options = {"images": groups, "text": ["<image> or <image>", "<image>"], "padding": True, "return_tensors": "pt"}
    found = fast(**options)
    assert_same(found, stock("onevision")(**options))
    assert found["batch_num_images"].tolist() == [2, 1]


@pytest.mark.parametrize("size", [(70, 50), (56, 56), (31, 200), (300, 290)])
@pytest.mark.parametrize("name", NAMES)
def test_frames_are_the_pil_image_processors(name, size, checkpoints):
    fast, frames = FastProcessor.from_pretrained(checkpoints[name]), film(3, *size)
    pil = [Image.fromarray(frame) for frame in frames]
    expected = tiny.frame_processor(CASES[name])(pil, return_tensors="pt")["pixel_values"]
    for given in (frames, pil, [frames], torch.from_numpy(frames).permute(0, 3, 1, 2)):
        found = fast(videos=given, text="<video> what", return_tensors="pt")
        assert found["pixel_values_videos"].dtype == torch.float32
        assert torch.equal(found["pixel_values_videos"], expected[None])
        assert (found["input_ids"] == tiny.VIDEO_ID).sum() == ROWS[name]


@pytest.mark.parametrize(
    ("name", "settings"),
    [(name, {"resample": number}) for name in NAMES for number in (0, 1, 2, 4, 5)]
    + [(name, settings) for name in NAMES for settings in ({"do_normalize": False}, {"do_rescale": False})]
    + [("video", {"do_resize": False}), ("video", {"size": {"shortest_edge": 60}}), ("video", {"size": [50, 60]})],
    ids=str,
)
def test_frames_of_other_settings_are_too(name, settings, checkpoints):
    fast, frames = FastProcessor.from_pretrained(checkpoints[name]), film(2)
    pil = [Image.fromarray(frame) for frame in frames]
    expected = tiny.frame_processor(CASES[name])(pil, return_tensors="pt", **settings)["pixel_values"]
    found = fast.video_processor([frames], return_tensors="pt", **settings)["pixel_values_videos"]
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected[None])


@pytest.mark.parametrize("number", [0, 1, 2, 4, 5])
def test_onevision_images_by_every_filter(number, checkpoints):
    """A prompt of two images, each on a square, and one of its own."""
    images = [[tiny.picture(60, 90), tiny.picture(70, 30)], [tiny.picture(50, 120)]]
    options = {"return_tensors": "pt", "resample": number}
    fast = FastProcessor.from_pretrained(checkpoints["onevision"]).image_processor(images, **options)
    assert_same(fast, tiny.image_processor(CASES["onevision"])(images, **options))


@pytest.mark.parametrize("output", ["float32", "uint8"])
@pytest.mark.parametrize("name", NAMES)
def test_from_processor_to_answer(name, output, checkpoints):
    """An image and a video in one prompt; the model's rows and the processor's tokens agree."""
    fast, plain = (FastProcessor.from_pretrained(checkpoints[name], output=kind) for kind in (output, "float32"))
    model, untouched = llava_fast.accelerate(tiny.hf_model(CASES[name]), fast), tiny.hf_model(CASES[name])
    options = {"images": [tiny.picture(60, 90)], "videos": [film()], "text": "<image> and <video>"}
    given, expected = (made(**options, return_tensors="pt") for made in (fast, plain))
    assert ("pixel_values_videos_uint8" in given) == ("pixel_values_uint8" in given) == (output == "uint8")
    with torch.no_grad():
        assert_close("processor to answer", model(**given).logits, untouched(**expected).logits, 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_pickled_saved_and_loaded(name, checkpoints, tmp_path):
    fast = FastProcessor.from_pretrained(checkpoints[name], output="uint8", threads=1)
    options = {"videos": [film()], "text": "<video> a", "return_tensors": "pt"}
    assert_same(pickle.loads(pickle.dumps(fast))(**options), fast(**options))
    fast.save_pretrained(tmp_path)
    for path in checkpoints[name].glob("processor_config.json"):
        assert json.loads((tmp_path / path.name).read_text()) == json.loads(path.read_text())
    tiny.hf_config(CASES[name]).save_pretrained(tmp_path)
    again = FastProcessor.from_pretrained(tmp_path, output="uint8")
    assert_same(again(**options), fast(**options))


def test_a_checkpoint_of_separate_files(checkpoints, tmp_path):
    """As released ones have them: preprocessor_config.json, and none or one for videos."""
    saved = stock("onevision")
    tiny.hf_config(CASES["onevision"]).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(checkpoints["onevision"]).save_pretrained(tmp_path)
    saved.image_processor.save_pretrained(tmp_path)
    mine = {"num_image_tokens": 49, "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_3"}
    (tmp_path / "processor_config.json").write_text(json.dumps(mine))
    options = {"videos": [film()], "text": "<video> a", "return_tensors": "pt"}
    expected = FastProcessor.from_pretrained(checkpoints["onevision"])(**options)
    assert_same(FastProcessor.from_pretrained(tmp_path)(**options), expected)
    saved.video_processor.image_mean = [0.5, 0.5, 0.5]
    saved.video_processor.save_pretrained(tmp_path)
    assert list(FastProcessor.from_pretrained(tmp_path).video_processor.image_mean) == [0.5, 0.5, 0.5]


def test_what_is_not_served_says_so(checkpoints):
    fast = FastProcessor.from_pretrained(checkpoints["video"], output="uint8")
    for settings in ({"do_normalize": False}, {"do_rescale": False}, {"do_center_crop": False}):
        with pytest.raises(ValueError, match="output='uint8'"):
            fast.video_processor([film()], **settings)
    plain = FastProcessor.from_pretrained(checkpoints["video"])
    if not is_torchvision_available():
        with pytest.raises(ImportError, match="needs torchvision: install it, or give uint8 RGB frames"):
            plain.video_processor([film()], do_center_crop=False)
