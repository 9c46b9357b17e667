"""A batch whose tiles the device makes is the batch whose tiles the host made."""

import dataclasses

import numpy as np
import pytest
import torch

from llava_fast.models.batch import Batch
from llava_fast.ops import use_backend
from tests.support import tiny

PICTURES = [tiny.picture(60, 90), tiny.picture(200, 31), tiny.picture(5, 300)]


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("name", ["llava15", "next", "onevision", "video"])
def test_tiles_made_on_the_device_are_those_of_the_host(name, backend):
    processor = tiny.pair(name).ours.processor
    requests = [{"prompt": "<image>" * len(p) + "hello", "images": p} for p in (PICTURES[:1], [], PICTURES[1:])]
    if processor.video_token_id is not None:
        requests.append({"prompt": "<video>", "video": np.stack([tiny.picture(50, 83, seed) for seed in range(3)])})
    on_device = dataclasses.replace(processor, tiles_on="device")
    host = Batch.from_prepared(processor.prepare(requests))
    with use_backend(backend):
        device = Batch.from_prepared(on_device.prepare(requests))
    assert torch.equal(host.tiles, device.tiles)
    assert torch.equal(host.flat, device.flat)
    assert (processor.tiles(PICTURES[0]) == on_device.tiles(PICTURES[0])).all()


def test_a_text_batch_has_no_tiles_to_make():
    processor = dataclasses.replace(tiny.pair("next").ours.processor, tiles_on="device")
    assert Batch.from_prepared(processor.prepare([{"prompt": "hello"}])).tiles.shape == (0, 3, 56, 56)


def test_what_a_device_cannot_make_is_refused():
    processor = tiny.pair("next").ours.processor
    with pytest.raises(ValueError, match="resizes as Pillow does, not as torchvision"):
        dataclasses.replace(processor, tiles_on="device", resample="torchvision")
    with pytest.raises(ValueError, match="'host' or 'device'"):
        dataclasses.replace(processor, tiles_on="gpu")


@pytest.mark.parametrize("name", ["next", "llava15_full", "onevision"])
def test_a_geometry_that_counts_other_rows_than_the_tower_gives_is_refused(name):
    """It would take each row for its neighbour: with a class row that is dropped, kept, or not there."""
    model = tiny.pair(name).ours
    wrong = dataclasses.replace(model.config.geometry, dropped_rows=1 - model.config.geometry.dropped_rows)
    with pytest.raises(ValueError, match="the geometry has"):
        dataclasses.replace(model.config, geometry=wrong)
    with torch.device("meta"), pytest.raises(ValueError, match="the processor's geometry has"):
        type(model)(model.config, dataclasses.replace(model.processor, geometry=wrong))
