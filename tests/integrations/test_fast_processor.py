"""FastProcessor gives what transformers' PIL processors give: every field, every bit."""

import json
import pickle
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, LlavaNextProcessor, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from llava_fast.errors import CheckpointError
from llava_fast.integrations import processor as processor_module
from llava_fast.integrations import tiles
from llava_fast.integrations.processor import FastProcessor
from tests.support import tiny
from tests.support.processor_fields import SIZES, assert_same

STOCK = {"llava15": LlavaProcessor, "next": LlavaNextProcessor}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Name -> a directory with the configuration and the stock processor's files."""
    found = {}
    for name in STOCK:
        folder = tmp_path_factory.mktemp(name)
        tiny.hf_model(tiny.CASES[name]).config.save_pretrained(folder)
        tiny.hf_processor(tiny.CASES[name]).save_pretrained(folder)
        found[name] = folder
    return found


def stock(name):
    return tiny.hf_processor(tiny.CASES[name])


@pytest.mark.parametrize("name", STOCK)
def test_every_field_and_every_bit(name, checkpoints):
    fast = FastProcessor.from_pretrained(checkpoints[name])
    assert isinstance(fast, STOCK[name])
    rng = np.random.default_rng(0)
    sizes = SIZES + [tuple(rng.integers(2, 400, 2)) for _ in range(30)]
    for first in range(0, len(sizes), 5):
        part = [Image.fromarray(tiny.picture(*size)) for size in sizes[first : first + 5]]
        text = [f"<image> number {i}" for i in range(len(part))]
        options = {"images": part, "text": text, "padding": True, "return_tensors": "pt"}
        assert_same(fast(**options), stock(name)(**options))


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "CMYK", "LA", "I;16"])
@pytest.mark.parametrize("name", STOCK)
def test_modes_and_arrays(name, mode, checkpoints):
    fast, picture = FastProcessor.from_pretrained(checkpoints[name]), Image.fromarray(tiny.picture(60, 90))
    picture = (
        Image.fromarray(tiny.picture(60, 90)[..., 0].astype(np.uint16)) if mode == "I;16" else picture.convert(mode)
    )
    options = {"text": "<image> what", "return_tensors": "pt"}
    assert_same(fast(images=picture, **options), stock(name)(images=picture, **options))
    array = tiny.picture(50, 40)
    assert_same(fast(images=[array], **options), stock(name)(images=[array], **options))
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    assert_same(fast(images=[tensor], **options), stock(name)(images=[tensor], **options))


SETTINGS = [
    {"do_normalize": False},
    {"do_rescale": False},
    {"do_rescale": False, "do_normalize": False},
    {"rescale_factor": 0.5, "image_std": 0.25},
    *({"resample": number} for number in (0, 1, 2, 4, 5)),
    {"resample": Image.Resampling.HAMMING, "image_mean": [0.5] * 3},
]
SINGLE = [
    {"do_resize": False},
    {"size": {"shortest_edge": 60}, "resample": 0},
    {"size": {"height": 50, "width": 60}},
    {"size": {"height": 48, "width": 48}, "do_center_crop": False},
    {"size": {"shortest_edge": 40, "longest_edge": 70}},
    {"size": {"max_height": 30, "max_width": 40}},
    {"crop_size": 30},
]
ANYRES = [{"do_resize": False}, {"do_center_crop": False}, {"size": 56, "do_pad": False}]
TABLE = [("llava15", each) for each in SETTINGS + SINGLE] + [("next", each) for each in SETTINGS + ANYRES]


@pytest.fixture
def told(monkeypatch):
    """Why transformers' own code made tiles."""
    reasons = []
    monkeypatch.setattr(processor_module, "tell_stock", lambda processor, why: reasons.append(why))
    return reasons


@pytest.mark.parametrize(("name", "settings"), TABLE, ids=str)
def test_other_settings_give_what_transformers_gives(name, settings, checkpoints, told):
    fast, expected = FastProcessor.from_pretrained(checkpoints[name]), stock(name)
    images = [Image.fromarray(tiny.picture(*size)) for size in ((64, 64), (50, 71))]
    for each in images if settings.get("do_pad") is False else [images]:
        found = fast.image_processor(each, return_tensors="pt", **settings)
        assert_same(found, expected.image_processor(each, return_tensors="pt", **settings))
    assert not told


@pytest.mark.parametrize(
    ("name", "settings", "why"),
    [
        ("llava15", {"do_center_crop": False}, "not a square, and do_center_crop is off"),
        ("llava15", {"do_center_crop": False, "do_resize": False}, "do_resize and do_center_crop are off"),
        ("llava15", {"crop_size": {"height": 40, "width": 30}}, "crop_size is .*not a square"),
        ("llava15", {"do_pad": True, "pad_size": {"height": 60, "width": 60}}, "pad_size is"),
        ("next", {"size": {"shortest_edge": 40}}, "tiles would be resized twice"),
        ("next", {"image_grid_pinpoints": [[56, 60], [60, 56]], "do_center_crop": True}, "not multiples of 56"),
    ],
    ids=str,
)
def test_settings_for_transformers_own_code(name, settings, why, checkpoints, told):
    fast, expected = FastProcessor.from_pretrained(checkpoints[name]), stock(name)
    image = Image.fromarray(tiny.picture(64, 64))
    found = fast.image_processor(image, return_tensors="pt", **settings)
    assert_same(found, expected.image_processor(image, return_tensors="pt", **settings))
    assert len(told) == 1
    assert re.search(why, told[0])
    fast = FastProcessor.from_pretrained(checkpoints[name], output="uint8")
    with pytest.raises(ValueError, match=f"output='uint8'.*{why}"):
        fast.image_processor(image, **settings)


def test_the_stock_path_is_told_once(checkpoints, caplog, monkeypatch):
    monkeypatch.setattr(tiles, "_told", set())
    fast = FastProcessor.from_pretrained(checkpoints["llava15"])
    for _ in range(2):
        fast.image_processor([tiny.picture(64, 64)], do_center_crop=False)
    assert caplog.text.count("FastCLIPImageProcessor takes the stock path: size is") == 1


@pytest.mark.parametrize("name", STOCK)
def test_uint8_tiles_are_the_same_before_normalisation(name, checkpoints):
    fast = FastProcessor.from_pretrained(checkpoints[name], output="uint8", threads=1)
    options = {"images": [tiny.picture(40, 90), tiny.picture(70, 30)], "text": ["<image> a", "<image> b"]}
    options |= {"padding": True, "return_tensors": "pt"}
    found, expected = fast(**options), stock(name)(**options)
    assert "pixel_values" not in found
    assert found["pixel_values_uint8"].dtype == torch.uint8
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in (fast.image_processor.image_mean, fast.image_processor.image_std)
    )
    normalised = (found["pixel_values_uint8"] / 255 - mean) / std
    real = expected["pixel_values"].flatten(-3).any(-1)  # tiles, without those that only fill up
    torch.testing.assert_close(normalised[real], expected["pixel_values"][real], rtol=1e-5, atol=1e-5)
    assert torch.equal(found["input_ids"], expected["input_ids"])
    with pytest.raises(ValueError, match="output='uint8'"):
        fast.image_processor([tiny.picture(9, 9)], do_normalize=False)


def test_llavas_padded_square(checkpoints):
    settings = {"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}, "do_pad": True}
    expected = LlavaImageProcessorPil(**settings)
    folder = checkpoints["llava15"].parent / "padded"
    tiny.hf_model(tiny.CASES["llava15"]).config.save_pretrained(folder)
    LlavaProcessor(expected, tiny.tokenizer(), patch_size=8, vision_feature_select_strategy="default").save_pretrained(
        folder
    )
    fast = FastProcessor.from_pretrained(folder)
    for place, size in enumerate(SIZES[3:]):
        image, options = Image.fromarray(tiny.picture(*size)), {"return_tensors": "pt", "resample": place % 6}
        assert_same(fast.image_processor(image, **options), expected(image, **options))


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        (
            {"image_processor_type": "SiglipImageProcessor", "size": {"height": 48, "width": 48}},
            SiglipImageProcessorPil,
        ),
        ({"image_processor_type": "CLIPImageProcessorFast", "crop_size": 48}, CLIPImageProcessorPil),
        ({"feature_extractor_type": "CLIPFeatureExtractor", "crop_size": 48, "size": 48}, CLIPImageProcessorPil),
        ({"do_pad": True, "size": 48, "crop_size": 48}, LlavaImageProcessorPil),
    ],
    ids=str,
)
def test_a_llavas_image_processor_is_the_one_that_its_file_names(settings, kind, checkpoints, tmp_path):
    """Sparse files, whose gaps are filled by the class's own defaults."""
    shutil.copytree(checkpoints["llava15"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "processor_config.json").write_text(json.dumps({"patch_size": 8}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    fast, image = FastProcessor.from_pretrained(tmp_path).image_processor, Image.fromarray(tiny.picture(60, 90))
    assert isinstance(fast, kind)
    found, expected = (each(image, return_tensors="pt") for each in (fast, kind.from_pretrained(tmp_path)))
    assert_same(found, expected)
    assert fast.stock().to_dict() == kind.from_pretrained(tmp_path).to_dict()


def test_another_image_processor_is_refused(checkpoints, tmp_path):
    shutil.copytree(checkpoints["llava15"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "processor_config.json").unlink()
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "ViTImageProcessor"}))
    with pytest.raises(CheckpointError, match=r"supports the image processors Llava.*'ViTImageProcessor'"):
        FastProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", STOCK)
def test_pickled_saved_and_templated(name, checkpoints, tmp_path):
    fast = FastProcessor.from_pretrained(checkpoints[name], output="uint8", threads=1)
    again = pickle.loads(pickle.dumps(fast))
    image = tiny.picture(40, 90)
    options = {"images": image, "text": "<image> a", "return_tensors": "pt"}
    assert_same(again(**options), fast(**options))
    fast.save_pretrained(tmp_path)
    text = "".join(path.read_text() for path in tmp_path.glob("*config.json"))
    assert "Fast" not in text
    assert "threads" not in text
    loaded = STOCK[name](
        image_processor=type(stock(name).image_processor).from_pretrained(tmp_path),
        tokenizer=AutoTokenizer.from_pretrained(tmp_path),
        patch_size=fast.patch_size,
        vision_feature_select_strategy=fast.vision_feature_select_strategy,
        num_additional_image_tokens=fast.num_additional_image_tokens,
    )
    assert_same(loaded(**options), stock(name)(**options))


def test_what_is_not_served_says_so(checkpoints, tmp_path):
    with pytest.raises(ValueError, match="output must be one of"):
        FastProcessor.from_pretrained(checkpoints["next"], output="bfloat16")
    tiny.hf_config(tiny.CASES["next"]).text_config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="'llama'"):
        FastProcessor.from_pretrained(tmp_path)
