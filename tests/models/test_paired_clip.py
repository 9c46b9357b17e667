"""Two towers of one shape: which tile runs through which, in whatever order they come."""

import itertools

import numpy as np
import pytest
import torch

from llava_fast.errors import CheckpointError
from llava_fast.families import read_config
from llava_fast.models.towers.paired_clip import PairedClipConfig
from tests.support import tiny
from tests.support.tiny_checkpoints import edit_json


@pytest.fixture(scope="module")
def tower():
    return tiny.pair("video_llava").ours.vision_tower


@pytest.mark.parametrize("videos", [(), ((0, 5),), ((1, 3),), ((0, 1), (3, 4)), ((2, 5),)])
@pytest.mark.parametrize("every", [False, True])
@torch.no_grad()
def test_each_tile_has_its_towers_features(tower, videos, every):
    tiles = torch.randint(0, 256, (5, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = tower(tiles, videos=videos, every=every)
    of_videos = {place for first, end in videos for place in range(first, end)}
    for place, features in enumerate(found):
        own = tower.video_tower if place in of_videos else tower.image_tower
        torch.testing.assert_close(features, own(tiles[place : place + 1])[0])


def test_every_weight_runs_only_where_it_is_asked_for(tower):
    tiles = torch.zeros(2, 3, 48, 48, dtype=torch.uint8)
    for videos, every in itertools.product(((), ((0, 2),)), (False, True)):
        tower.zero_grad()
        tower(tiles, videos=videos, every=every).sum().backward()
        ran = {
            name
            for name in ("image_tower", "video_tower")
            if getattr(tower, name).embeddings.class_embedding.grad is not None
        }
        alone = {"video_tower" if videos else "image_tower"}
        assert ran == ({"image_tower", "video_tower"} if every else alone)
    tower.zero_grad()
    assert tower(tiles[:0], every=True).shape == (0, 37, 32)


def test_what_holds_for_both(tower):
    config = tower.config
    assert PairedClipConfig.of(config.plain) == config
    assert len(tower.unused()) == 4
    tower.recompute = "layers"
    assert tower.image_tower.recompute == tower.video_tower.recompute == "layers"
    tower.recompute = "none"
    with pytest.raises(ValueError, match="tiles of two towers cannot be padded to a bucket"):
        tower(torch.zeros(1, 3, 48, 48), count=torch.ones(1))


def test_a_plan_says_which_tiles_are_a_videos():
    model = tiny.pair("video_llava").ours
    frames = np.stack([tiny.picture(30, 30, seed) for seed in range(3)])
    image = tiny.picture(20, 40)
    requests = [
        {"prompt": "<image> or <video>", "images": [image], "video": frames},
        {"prompt": "<video> or <image>", "images": [image], "video": frames[:2]},
    ]
    assert model.prepare(requests).plan.videos == ((1, 4), (4, 6))
    assert model.config.geometry.frame_class_row


def test_another_tower_is_refused(tmp_path):
    tiny.hf_config(tiny.CASES["video_llava"]).save_pretrained(tmp_path)
    vision = {**tiny.TOWER, "model_type": "siglip_vision_model", "image_size": 48, "patch_size": 8}
    edit_json(tmp_path / "config.json", vision_config=vision, vision_feature_select_strategy="full")
    with pytest.raises(CheckpointError, match=r"vision_config\.model_type is siglip; a Video-LLaVA's is a CLIP"):
        read_config(tmp_path)
