"""A VisualModel's rows of images and videos, against those that the whole model places among a prompt's text."""

import pytest
import torch

from llava_fast.inputs.plan.columns import TEXT
from llava_fast.inputs.tiling.anyres import image_rows
from llava_fast.inputs.tiling.video import video_rows
from llava_fast.models.config import VisualConfig
from llava_fast.models.visual import VisualModel
from tests.support import tiny

NAMES = ["llava15", "llava15_layers", "next", "video", "onevision", "vipllava", "video_llava"]
SIZES = [(60, 90), (200, 31), (56, 56)]


def visual_model(model) -> VisualModel:
    """The model's own parameters in a model without a decoder."""
    config = model.config
    with torch.device("meta"):
        alone = VisualModel(VisualConfig(**{name: getattr(config, name) for name in VisualConfig.__dataclass_fields__}))
    alone.load_state_dict({name: model.get_parameter(name) for name in alone.state_dict()}, assign=True)
    return alone


def placed(model, request) -> torch.Tensor:
    batch = model.prepare([request])
    return model.inputs_embeds(batch)[batch.column("source") != TEXT]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_images_have_the_models_rows_to_the_bit(name):
    model = tiny.pair(name).ours
    images = [tiny.picture(*size) for size in SIZES]
    expected = [placed(model, {"prompt": "<image>\nhello", "images": [image]}) for image in images]
    tiles = [torch.from_numpy(model.processor.tiles(image)) for image in images]
    rows = [image_rows(model.config.geometry, *size) for size in SIZES]
    alone = visual_model(model)
    for one, given, shape in zip(expected, tiles, rows, strict=True):
        assert torch.equal(alone.visual_embeds(given, [shape])[0], one)
    together = alone.visual_embeds(torch.cat(tiles), rows)
    for one, found in zip(expected, together, strict=True):  # products of more rows may round otherwise
        torch.testing.assert_close(found, one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["video", "onevision", "video_llava"])
@torch.no_grad()
def test_videos_have_the_models_rows_to_the_bit(name):
    model = tiny.pair(name).ours
    frames = [tiny.picture(60, 90, seed) for seed in range(3)]
    request = {"prompt": "<video>\nhello", "video": frames}
    tiles = model.prepare([request]).tiles
    rows = video_rows(model.config.geometry, 3)
    assert torch.equal(visual_model(model).visual_embeds(tiles, [], [rows])[0], placed(model, request))


def test_tiles_and_rows_must_agree():
    model = visual_model(tiny.pair("next").ours)
    rows = image_rows(model.config.geometry, 60, 90)
    with pytest.raises(ValueError, match=rf"2 tiles are given, but the images and videos have {rows.tiles}"):
        model.visual_embeds(torch.zeros(2, 3, 56, 56, dtype=torch.uint8), [rows])
    assert model.visual_embeds(torch.zeros(0, 3, 56, 56, dtype=torch.uint8), []) == []


def test_text_around_tiles_is_refused():
    pair = tiny.pair("internvl").ours
    rows = image_rows(pair.processor.geometry, 60, 90)
    with pytest.raises(ValueError, match="text tokens stand around these tiles"):
        visual_model(pair).visual_embeds(torch.zeros(rows.tiles, 3, 48, 48, dtype=torch.uint8), [rows])
