"""A tower's own preprocessor_config.json counts in an original checkpoint, and saving writes back what was read."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from llava_fast.checkpoints.load import load_checkpoint
from llava_fast.checkpoints.save import save
from llava_fast.errors import CheckpointError
from llava_fast.inputs.pictures.tiles import make_tiles
from llava_fast.inputs.tiling.anyres import image_views
from llava_fast.inputs.tiling.video import frame_views
from llava_fast.models.towers.vit import ClipConfig
from tests.support.tiny_checkpoints import (
    PINPOINTS,
    build,
    edit_json,
    read_original_config,
    save_hf,
    tokenizer,
    write_original,
    write_tower,
)

SIZE = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
CLIP = {"image_processor_type": "CLIPImageProcessor", "do_center_crop": True, **SIZE}
SIGLIP = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 28, "width": 28}}
CHANGES = {
    "nearest, not normalised": {"resample": 0, "do_normalize": False},
    "lanczos, not rescaled": {"resample": 1, "do_rescale": False},
    "another factor": {"rescale_factor": 0.5, "image_mean": [0.5, 0.25, 0.5], "image_std": 0.5},
    "not resized": {"do_resize": False},
    "larger, then cut": {"size": {"shortest_edge": 40}, "resample": 2},
    "stretched": {"size": {"height": 30, "width": 40}},
    "filled up": {"size": {"max_height": 20, "max_width": 25}},
}
PADDED = [what for what in CHANGES if what not in ("not resized", "filled up")]
IMAGE = np.random.default_rng(0).integers(0, 256, (41, 90, 3), dtype=np.uint8)
ANYRES = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": PINPOINTS}


def pixels_of(config, image=IMAGE, views=image_views):
    """Normalised float32 [tiles, 3, T, T], as the tower sees them."""
    tiles = make_tiles(image, views(config.geometry, *image.shape[:2]), config.geometry.tile_size)
    mean, std = (np.array(values, np.float32)[:, None, None] for values in config.vision.normalisation)
    return (tiles / np.float32(255) - mean) / std


def assert_pixels(found, expected):
    expected = np.asarray(expected, np.float32)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def with_tokenizer(path, *placeholders):
    model = build(load_checkpoint(path))
    marked = (path / "tokenizer_config.json").exists()
    words = AutoTokenizer.from_pretrained(path) if marked else tokenizer(*placeholders)
    model.processor = SimpleNamespace(tokenizer=words)
    return model


def original(path, settings, kind="clip", **fields):
    write_tower(path / "tower", kind)
    (path / "tower" / "preprocessor_config.json").write_text(json.dumps(settings))
    write_original(path, **fields)
    return path


def padded_square(image):
    """The original's expand2square, in CLIP's mean colour."""
    side, (height, width, _) = max(image.shape), image.shape
    square = np.empty((side, side, 3), np.uint8)
    square[:] = (122, 116, 104)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = image
    return square


@pytest.mark.parametrize("what", CHANGES)
def test_the_towers_own_file_is_obeyed(tmp_path, what):
    path = original(tmp_path / "a", CLIP | CHANGES[what], image_aspect_ratio="square")
    expected = CLIPImageProcessorPil(**(CLIP | CHANGES[what]))(Image.fromarray(IMAGE))["pixel_values"]
    assert_pixels(pixels_of(load_checkpoint(path).config), expected)
    assert_pixels(pixels_of(load_checkpoint(path).config, views=frame_views), expected)


@pytest.mark.parametrize("what", ["nearest, not normalised", "lanczos, not rescaled", "larger, then cut"])
def test_after_padding_to_a_square_too(tmp_path, what):
    path = original(tmp_path / "a", CLIP | CHANGES[what], image_aspect_ratio="pad")
    square = Image.fromarray(padded_square(IMAGE))
    expected = CLIPImageProcessorPil(**(CLIP | CHANGES[what]))(square)["pixel_values"]
    assert_pixels(pixels_of(load_checkpoint(path).config), expected)


def test_siglips_own_file_is_obeyed(tmp_path):
    settings = SIGLIP | {"resample": 5, "do_rescale": False}
    path = original(tmp_path / "a", settings, "siglip", image_aspect_ratio="square")
    expected = SiglipImageProcessorPil(**settings)(Image.fromarray(IMAGE))["pixel_values"]
    assert_pixels(pixels_of(load_checkpoint(path).config), expected)


def test_original_anyres_is_bicubic_whatever_the_file_says(tmp_path):
    """process_anyres_image calls PIL's resize without a filter; frames go through the processor."""
    path = original(tmp_path / "a", CLIP | {"resample": 0}, **ANYRES)
    geometry = load_checkpoint(path).config.geometry
    assert (geometry.filter, geometry.frame_filter) == ("bicubic", "nearest")


@pytest.mark.parametrize(
    ("changes", "fields", "message"),
    [
        ({"resample": "nearest"}, {}, "tower/preprocessor_config.json: resample: .*not 'nearest'"),
        ({"size": {"shortest_edge": 20}}, {"image_aspect_ratio": "pad"}, "size is .*margins of two colours"),
        ({"size": {"shortest_edge": 40}}, ANYRES, "size is .*AnyRes tiles have the 28x28 pixels"),
        ({"image_processor_type": "LlavaImageProcessor"}, {}, "image_processor_type is 'LlavaImageProcessor'"),
    ],
)
def test_what_a_towers_file_may_not_say(tmp_path, changes, fields, message):
    write_original(tmp_path / "a", weights=False, **fields)
    (tmp_path / "a" / "tower" / "preprocessor_config.json").write_text(json.dumps(CLIP | changes))
    with pytest.raises(CheckpointError, match=message):
        read_original_config(tmp_path / "a")


@pytest.mark.parametrize(("ratio", "what"), [("square", what) for what in CHANGES] + [("pad", what) for what in PADDED])
def test_an_original_keeps_it_and_hands_it_to_transformers(tmp_path, ratio, what):
    path = original(tmp_path / "a", CLIP | CHANGES[what] | {"own": 1}, image_aspect_ratio=ratio)
    model = with_tokenizer(path)
    save(model, tmp_path / "b", layout="original")
    assert load_checkpoint(tmp_path / "b").config.geometry == model.config.geometry
    kept = (tmp_path / "b" / "tower" / "preprocessor_config.json").read_text()
    assert json.loads(kept) == CLIP | CHANGES[what] | {"own": 1}
    save(model, tmp_path / "hf", layout="hf")
    again = load_checkpoint(tmp_path / "hf").config
    found = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    written = CHANGES[what] | ({"image_std": [0.5] * 3} if "image_std" in CHANGES[what] else {})
    assert {name: found[name] for name in written if name != "size"} == {n: written[n] for n in written if n != "size"}
    expected = LlavaImageProcessorPil(**found)(Image.fromarray(IMAGE))["pixel_values"]
    assert_pixels(pixels_of(model.config), expected)
    assert_pixels(pixels_of(again), expected)


@pytest.mark.parametrize("what", CHANGES)
def test_llava_becomes_an_original_and_comes_back(tmp_path, what):
    save_hf("llava", tmp_path / "a")
    settings = {"image_processor_type": "LlavaImageProcessor", **SIZE, **CHANGES[what]}
    (tmp_path / "a" / "preprocessor_config.json").write_text(json.dumps(settings))
    model = with_tokenizer(tmp_path / "a", "<video>", "<image>")
    save(model, tmp_path / "b", layout="original")
    assert load_checkpoint(tmp_path / "b").config.vision == model.config.vision
    assert_pixels(pixels_of(load_checkpoint(tmp_path / "b").config), pixels_of(model.config))
    save(with_tokenizer(tmp_path / "b"), tmp_path / "c", layout="hf")
    assert load_checkpoint(tmp_path / "c").config == model.config
    save(model, tmp_path / "d", layout="hf")
    assert json.loads((tmp_path / "d" / "preprocessor_config.json").read_text()) == settings


def test_siglip_settings_survive_the_other_layout(tmp_path):
    path = original(
        tmp_path / "a", SIGLIP | {"resample": 2, "do_normalize": False}, "siglip", image_aspect_ratio="square"
    )
    model = with_tokenizer(path)
    save(model, tmp_path / "hf", layout="hf")
    found = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert (found["image_processor_type"], found["resample"], found["do_normalize"]) == (
        "SiglipImageProcessor",
        2,
        False,
    )
    expected = SiglipImageProcessorPil(**found)(Image.fromarray(IMAGE))["pixel_values"]
    assert_pixels(pixels_of(load_checkpoint(tmp_path / "hf").config), expected)


@pytest.mark.parametrize("kind", ["llava_next", "llava_next_video", "llava_onevision"])
def test_an_anyres_model_writes_its_values_and_its_frames(tmp_path, kind):
    """By hand, since a checkpoint keeps its own files: what is written makes the same tiles and frames."""
    save_hf(kind, tmp_path / "a")
    model = with_tokenizer(tmp_path / "a", "<video>", "<image>")
    geometry = dataclasses.replace(model.config.geometry, filter="hamming", frame_filter="lanczos")
    vision = dataclasses.replace(model.config.vision, do_rescale=False)
    model.config, model.side_files = dataclasses.replace(model.config, geometry=geometry, vision=vision), {}
    if kind == "llava_next":
        model.config = dataclasses.replace(model.config, geometry=dataclasses.replace(geometry, frame_filter="hamming"))
    save(model, tmp_path / "b", layout="hf")
    assert load_checkpoint(tmp_path / "b").config == dataclasses.replace(model.config, source=None)
    found = json.loads((tmp_path / "b" / "preprocessor_config.json").read_text())
    processor = LlavaOnevisionImageProcessorPil if kind == "llava_onevision" else LlavaNextImageProcessorPil
    expected = processor(**found)([Image.fromarray(IMAGE)])["pixel_values"][0]
    assert_pixels(pixels_of(model.config), expected)
    with pytest.raises(CheckpointError, match="resizes AnyRes images bicubically, not by 'hamming'"):
        save(model, tmp_path / "c", layout="original")


def test_a_known_tower_with_a_processor_of_its_own_is_described(tmp_path):
    """A name alone would lose the file: whoever loads it again would resize bicubically."""
    settings = CLIP | {"resample": 4}
    write_tower(tmp_path / "clip-vit-large-patch14-336", weights=True)
    (tmp_path / "clip-vit-large-patch14-336" / "preprocessor_config.json").write_text(json.dumps(settings))
    write_original(tmp_path / "a", tower=False)
    edit_json(tmp_path / "a" / "config.json", mm_vision_tower=str(tmp_path / "clip-vit-large-patch14-336"))
    save(build(load_checkpoint(tmp_path / "a")), tmp_path / "b", layout="original")
    assert load_checkpoint(tmp_path / "b").config.geometry.filter == "box"


def test_values_far_above_one_are_not_folded():
    """Black pixels are exactly zero where nothing is done to bytes; folded, they would be a rounding error of sums."""

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_layers": 1, "num_heads": 2}
    sizes |= {"image_size": 28, "patch_size": 14, "activation": "gelu", "layer_norm_eps": 1e-5}
    torch.manual_seed(0)
    config = ClipConfig(**sizes, do_rescale=False, do_normalize=False)
    assert not config.folds_normalisation
    tower, tiles = config.build(), torch.zeros(1, 3, 28, 28, dtype=torch.uint8)
    assert torch.equal(tower(tiles), tower(tiles.float()))
    assert dataclasses.replace(config, do_rescale=True).folds_normalisation
