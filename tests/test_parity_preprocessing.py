"""Every field of a processor's file that changes pixels: `load` gives the logits of transformers with the same file."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

import llava_fast
from llava_fast.errors import CheckpointError, ImageError
from llava_fast.inputs.pictures.preprocessing import FILTERS
from tests.support import tiny
from tests.support.parity import assert_close, reference_logits
from tests.support.tiny import CASES

PROCESSORS = {
    "LlavaImageProcessor": LlavaImageProcessorPil,
    "CLIPImageProcessor": CLIPImageProcessorPil,
    "SiglipImageProcessor": SiglipImageProcessorPil,
    "LlavaNextImageProcessor": LlavaNextImageProcessorPil,
    "LlavaOnevisionImageProcessor": LlavaOnevisionImageProcessorPil,
}
NAMES = {
    "llava15": "LlavaImageProcessor",
    "next": "LlavaNextImageProcessor",
    "onevision": "LlavaOnevisionImageProcessor",
}
ABSENT = object()
VALUES = {
    **{f"resample {number}": {"resample": number} for number in range(6)},
    "not normalised": {"do_normalize": False},
    "not rescaled": {"do_rescale": False},
    "bytes of another mean": {
        "do_rescale": False,
        "image_mean": [120.0, 110.0, 100.0],
        "image_std": [60.0, 58.0, 59.0],
    },
    "bytes": {"do_rescale": False, "do_normalize": False},
    "other factor": {"rescale_factor": 1 / 127.5, "image_mean": [1.0, 1.0, 1.0], "image_std": [1.0, 0.5, 2.0]},
    "one mean": {"image_mean": 0.5, "image_std": 0.25},
    "nulls": {"do_normalize": None, "image_mean": None, "do_pad": None, "do_convert_rgb": None, "pad_size": None},
    "absent": {"resample": ABSENT, "image_mean": ABSENT, "do_normalize": ABSENT, "rescale_factor": ABSENT},
    "without effect": {"do_convert_rgb": False, "data_format": "channels_first", "device": "cpu", "own": 1},
}
SINGLE = {
    "not resized": {"do_resize": False},
    "larger, then cut": {"size": {"shortest_edge": 60}},
    "smaller, then filled": {"size": {"shortest_edge": 31}},
    "edges": {"size": {"shortest_edge": 40, "longest_edge": 70}},
    "bounds": {"size": {"max_height": 50, "max_width": 60}},
    "stretched": {"size": {"height": 60, "width": 70}},
    "stretched, list": {"size": [60, 70]},
    "square number": {"size": 48, "default_to_square": True},
    "number": {"size": 48, "crop_size": 48},
    "squashed": {"size": {"height": 48, "width": 48}, "do_center_crop": False},
    "padded": {"do_pad": True, "resample": 0},
    "padded, cut": {"do_pad": True, "size": {"shortest_edge": 60}, "do_normalize": False},
    "clip": {"image_processor_type": "CLIPImageProcessor", "do_pad": True, "resample": 2},
    "siglip": {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": 48, "width": 48},
        "do_center_crop": ABSENT,
        "crop_size": ABSENT,
        "image_mean": ABSENT,
        "image_std": ABSENT,
    },
}
ANYRES = {
    "tiles not resized": {"do_resize": False},
    "not cropped": {"do_center_crop": False},
    "not batched": {"do_pad": False},
}
TABLE = [(name, what) for name in NAMES for what in (*VALUES, *(SINGLE if name == "llava15" else ANYRES))]
IMAGES = ((70, 130), (130, 41))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Name -> transformers' model and a folder that holds it, without a processor's file."""
    found = {}
    for name in NAMES:
        folder, model = tmp_path_factory.mktemp(name), tiny.hf_model(CASES[name])
        model.save_pretrained(folder)
        tiny.tokenizer(bos=name != "onevision").save_pretrained(folder)
        found[name] = model, folder
    return found


def settings_of(name, changes):
    """A whole processor file with some fields changed."""
    settings = tiny.image_processor(CASES[name]).to_dict() | {"image_processor_type": NAMES[name]} | changes
    return {field: value for field, value in settings.items() if value is not ABSENT}


def stock(settings, name):
    """transformers' processor of a file, as AutoImageProcessor makes it without torchvision."""
    return PROCESSORS[settings.get("image_processor_type") or NAMES[name]](**settings)


def expected_logits(model, name, processor, images, ours):
    """transformers' logits of these images in a prompt with as many placeholders."""
    pair = tiny.Pair(CASES[name], model, tiny.hf_processor(CASES[name]), ours)
    pair.processor.image_processor = processor
    prompt = " and ".join(["<image> ER ##"] * len(images))
    return prompt, reference_logits(model, pair.reference_inputs(prompt, images))


@pytest.mark.parametrize(("name", "what"), TABLE)
def test_logits_are_those_of_transformers(models, name, what):
    model, folder = models[name]
    settings = settings_of(name, {**VALUES, **SINGLE, **ANYRES}[what])
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    ours = llava_fast.load(folder)
    for size in IMAGES if what in SINGLE else IMAGES[:1]:
        image = tiny.picture(*size)
        prompt, expected = expected_logits(model, name, stock(settings, name), [image], ours)
        with torch.no_grad():
            found = ours(ours.prepare([{"prompt": prompt, "images": [image]}]), logits="all").logits
        assert_close("logits, fields of a processor's file", found, expected)


def test_images_that_share_a_request(models):
    """OneVision pads each to a square of its own: it is resized by the same filter, and not at all if so told."""
    model, folder = models["onevision"]
    for changes, sizes in (({"resample": 1}, IMAGES), ({"do_resize": False, "resample": 0}, ((56, 40), (33, 56)))):
        settings = settings_of("onevision", changes)
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
        ours, images = llava_fast.load(folder), [tiny.picture(*size) for size in sizes]
        prompt, expected = expected_logits(model, "onevision", stock(settings, "onevision"), images, ours)
        with torch.no_grad():
            found = ours(ours.prepare([{"prompt": prompt, "images": images}]), logits="all").logits
        assert_close("logits, fields of a processor's file", found, expected)
    with pytest.raises(ImageError, match="makes 60x60 pixels of an image of 60x50, and its tower reads 56x56"):
        ours.prepare([{"prompt": prompt, "images": [tiny.picture(50, 60)] * 2}])


@pytest.mark.parametrize(
    ("changes", "fitting", "unfit"),
    [
        ({"do_resize": False, "do_center_crop": False}, (48, 48), (48, 49)),
        ({"do_center_crop": False}, (70, 70), (70, 72)),
        ({"do_center_crop": False, "do_resize": False, "do_pad": True}, (48, 30), (50, 30)),
        ({"do_center_crop": False, "size": {"max_height": 48, "max_width": 90}}, (60, 60), (60, 40)),
    ],
    ids=str,
)
def test_an_image_that_does_not_become_a_tile(models, changes, fitting, unfit):
    """transformers fails in the tower; an image that happens to fit is served as there."""
    model, folder = models["llava15"]
    settings = settings_of("llava15", changes)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    ours, image = llava_fast.load(folder), tiny.picture(*fitting)
    prompt, expected = expected_logits(model, "llava15", stock(settings, "llava15"), [image], ours)
    with torch.no_grad():
        found = ours(ours.prepare([{"prompt": prompt, "images": [image]}]), logits="all").logits
    assert_close("logits, fields of a processor's file", found, expected)
    for ask in (ours.prepare, lambda requests: ours.processor.count(requests[0])):
        with pytest.raises(ImageError, match=r"its tower reads 48x48: .*change size, do_resize or do_center_crop"):
            ask([{"prompt": prompt, "images": [tiny.picture(*unfit)]}])


def test_images_are_not_converted_where_the_file_says_so(models):
    _, folder = models["llava15"]
    (folder / "preprocessor_config.json").write_text(json.dumps(settings_of("llava15", {"do_convert_rgb": False})))
    processor = llava_fast.load(folder).processor
    for image in (tiny.picture(9, 9), Image.fromarray(tiny.picture(9, 9))):
        processor.tiles(image)
    for image in (Image.fromarray(tiny.picture(9, 9)).convert("L"), np.zeros((9, 9, 4), np.uint8)):
        with pytest.raises(ImageError, match="do_convert_rgb is false"):
            processor.tiles(image)


REFUSED = [
    ("llava15", {"resample": "bicubic"}, "preprocessor_config.json: resample: .*not 'bicubic'"),
    ("llava15", {"resample": 6}, "preprocessor_config.json: resample: .*not 6"),
    ("llava15", {"rescale_factor": 0}, "rescale_factor: .*greater than 0"),
    ("llava15", {"do_normalize": "no"}, "do_normalize: .*valid boolean"),
    ("llava15", {"image_std": [0.5, 0.0, 0.5]}, "image_std.1: .*greater than 0"),
    ("llava15", {"crop_size": {"height": 48, "width": 47}}, "crop_size is .*it makes images of"),
    ("llava15", {"crop_size": {"height": 48}}, "crop_size is .*must have height and width"),
    ("llava15", {"size": {"longest_edge": 48}}, "size is .*must have, above 0, height and width or"),
    ("llava15", {"size": {"height": 48, "width": 50}, "do_center_crop": False}, "size is .*images of 48 pixels"),
    ("llava15", {"size": {"shortest_edge": 50}, "do_center_crop": False}, "size is .*images of 50 pixels.*reads 48"),
    ("llava15", {"do_pad": True, "size": {"shortest_edge": 40}}, "size is .*margins of two colours"),
    ("llava15", {"do_pad": True, "do_resize": False}, "do_resize is False; .*margins of two colours"),
    ("llava15", {"do_pad": True, "image_mean": [120.0, 0.0, 0.0]}, "image_mean is .*must lie in 0..1"),
    ("llava15", {"do_pad": True, "image_mean": None, "do_normalize": False}, "image_mean is None; it is the colour"),
    ("llava15", {"input_data_format": "channels_first"}, "input_data_format is 'channels_first'"),
    ("llava15", {"use_square_size": True}, "use_square_size is True"),
    (
        "llava15",
        {"image_processor_type": "ViTImageProcessor"},
        "image_processor_type is 'ViTImageProcessor'; supported",
    ),
    ("llava15", {"image_processor_type": "CLIPImageProcessor", "do_pad": True, "pad_size": 60}, "pad_size is 60"),
    ("next", {"image_processor_type": "CLIPImageProcessor"}, "'CLIPImageProcessor'; supported.*LlavaNext"),
    ("next", {"size": {"shortest_edge": 60}}, "size is .*AnyRes tiles have the 56x56 pixels"),
    ("next", {"crop_size": {"height": 28, "width": 28}}, "crop_size is .*images of 28 pixels.*reads 56"),
    ("next", {"image_grid_pinpoints": [[56, 112]]}, "image_grid_pinpoints is .*config.json has others"),
    ("onevision", {"size": {"height": 60, "width": 56}}, "size is .*images of 60 pixels.*reads 56"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED, ids=[f"{n} {c}" for n, c, _ in REFUSED])
def test_what_is_not_obeyed_is_refused_by_name(models, name, changes, message):
    _, folder = models[name]
    (folder / "preprocessor_config.json").write_text(json.dumps(settings_of(name, changes)))
    with pytest.raises(CheckpointError, match=message):
        llava_fast.load(folder)


@pytest.mark.parametrize("number", [1, 4, 5])
def test_torchvision_is_refused_for_filters_that_it_lacks(models, number):
    _, folder = models["llava15"]
    (folder / "preprocessor_config.json").write_text(json.dumps(settings_of("llava15", {"resample": number})))
    with pytest.raises(CheckpointError, match=f"{FILTERS[number]}.*use resample='pillow'"):
        llava_fast.load(folder, processor=llava_fast.ProcessorOptions(resample="torchvision"))


def test_a_field_that_nothing_reads_is_named(models, caplog):
    _, folder = models["llava15"]
    (folder / "preprocessor_config.json").write_text(json.dumps(settings_of("llava15", {"do_normalise": False})))
    llava_fast.load(folder)
    assert "preprocessor_config.json: do_normalise is unknown and has no effect" in caplog.text
    caplog.clear()
    (folder / "preprocessor_config.json").write_text(json.dumps(settings_of("llava15", {})))
    llava_fast.load(folder)
    assert not caplog.text


def test_the_section_of_processor_config_comes_first(models):
    _, folder = models["llava15"]
    (folder / "preprocessor_config.json").write_text(json.dumps(settings_of("llava15", {"resample": 0})))
    (folder / "processor_config.json").write_text(
        json.dumps({"image_processor": settings_of("llava15", {"resample": 4})})
    )
    try:
        assert llava_fast.load(folder).config.geometry.filter == "box"
    finally:
        (folder / "processor_config.json").unlink()


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("llava15", "patch_size", 14),
        ("llava15", "num_additional_image_tokens", 0),
        ("next", "vision_feature_select_strategy", "full"),
        ("onevision", "num_image_tokens", 48),
        ("onevision", "vision_aspect_ratio", "anyres_max_4"),
        ("llava15", "image_token", "<video>"),
    ],
)
def test_counts_and_names_of_tokens_must_agree(models, name, field, value):
    _, folder = models[name]
    (folder / "preprocessor_config.json").write_text(json.dumps(settings_of(name, {})))
    (folder / "processor_config.json").write_text(json.dumps({field: value}))
    try:
        with pytest.raises(CheckpointError, match=f"processor_config.json: {field} is .*config.json"):
            llava_fast.load(folder)
    finally:
        (folder / "processor_config.json").unlink()


FRAMES = {
    "resample": {"resample": 0},
    "not resized": {"do_resize": False},
    "larger, then cut": {"size": {"shortest_edge": 70}},
}


@pytest.mark.parametrize(("name", "what"), [("video", what) for what in FRAMES] + [("onevision", "resample")])
def test_frames_go_by_the_videos_file(tmp_path_factory, name, what):
    """Images of the same request keep their own filter."""
    case, folder = CASES[name], tmp_path_factory.mktemp(name)
    model = tiny.hf_model(case)
    tiny.save(case, model, folder)
    own = tiny.frame_processor(case)
    settings = {**own.to_dict(), **FRAMES[what]}
    settings.pop("image_processor_type")
    (folder / "video_preprocessor_config.json").write_text(json.dumps(settings))
    ours = llava_fast.load(folder)
    frames = np.stack([tiny.picture(70, 90, seed) for seed in range(2)])
    pair = tiny.Pair(case, model, tiny.hf_processor(case), ours)
    request = {"prompt": "<image> or <video>", "images": [tiny.picture(60, 100)], "video": frames}
    inputs = pair.reference_inputs(**request)
    pixels = type(own)(**settings)([Image.fromarray(frame) for frame in frames], return_tensors="pt")["pixel_values"]
    expected = reference_logits(model, inputs | {"pixel_values_videos": pixels[None]})
    with torch.no_grad():
        found = ours(ours.prepare([request]), logits="all").logits
    assert_close("logits, fields of a processor's file", found, expected)
    for changes, message in (
        ({"do_normalize": False}, "video_preprocessor_config.json: do_normalize is False for videos"),
        ({"do_sample_frames": True}, "do_sample_frames is True; load.video_frames=....* chooses the frames"),
        ({"video_processor_type": "VideoLlavaVideoProcessor"}, "video_processor_type is"),
    ):
        (folder / "video_preprocessor_config.json").write_text(json.dumps(settings | changes))
        with pytest.raises(CheckpointError, match=message):
            llava_fast.load(folder)
