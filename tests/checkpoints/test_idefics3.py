"""Idefics3 and SmolVLM: prompts and tiles equal those of transformers' processor; published and invalid files."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import llava_fast
from llava_fast.errors import CheckpointError, ImageError
from llava_fast.models.batch import Batch
from tests.support import tiny
from tests.support.tiny_checkpoints import edit_json

SIZES = [(24, 24), (50, 100), (1, 300), (300, 4), (40, 90), (90, 40), (200, 201)]


@pytest.fixture(params=tiny.SPLIT)
def folder(request, tmp_path):
    tiny.save(tiny.CASES[request.param], tiny.pair(request.param).hf, tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", tiny.SPLIT)
def test_tiles_and_ids_are_those_of_transformers_processor(name):
    """Several images of one prompt among them. The texts of some rows and columns are tokens, those of others not."""
    pair = tiny.pair(name)
    values = {value: getattr(pair.ours.config.vision, value) for value in ("image_mean", "image_std")}
    for sizes in (*([size] for size in SIZES), SIZES[:3]):
        pictures = [tiny.picture(*size) for size in sizes]
        text = "a" + " and <image>\nthe" * len(pictures)
        options = {"input_data_format": "channels_last", "return_row_col_info": True}
        shown = [Image.fromarray(each) for each in pictures]
        stock = pair.processor(images=shown, text=[text], return_tensors="pt", images_kwargs=options)
        batch = pair.ours.prepare([{"prompt": text, "images": pictures}])
        ids = torch.where(batch.column("source") == 0, batch.column("row"), tiny.IMAGE_ID)
        assert torch.equal(ids.long(), stock["input_ids"][0])
        mean, std = (torch.tensor(values[value])[:, None, None] for value in ("image_mean", "image_std"))
        torch.testing.assert_close((batch.tiles / 255 - mean) / std, stock["pixel_values"][0], rtol=0, atol=1e-6)


def test_tiles_that_the_device_makes_are_the_same():
    processor = tiny.pair("smolvlm").ours.processor
    requests = [{"prompt": "<image>", "images": [tiny.picture(*size)]} for size in SIZES]
    uncut = processor.with_options(llava_fast.ProcessorOptions(tiles_on="device")).prepare(requests)
    assert not isinstance(uncut.tiles, np.ndarray)
    made = Batch.from_prepared(uncut, torch.device("cpu")).tiles
    assert np.array_equal(made.numpy(), processor.prepare(requests).tiles)


def test_published_files(folder):
    """A tower's older name, a padding token that the vocabulary lacks, and an image that is not cut."""
    vision = json.loads((folder / "config.json").read_text())["vision_config"]
    edit_json(folder / "config.json", vision_config=vision | {"model_type": "idefics3", "use_base_siglip": True})
    edit_json(folder / "config.json", pad_token_id=128_002)
    model = llava_fast.load(folder)
    assert model.config.pad_token_id == tiny.PAD_ID
    assert len(model.processor.tiles(tiny.picture(90, 40))) > 1
    edit_json(folder / "preprocessor_config.json", do_image_splitting=False)
    whole = llava_fast.load(folder)
    assert len(whole.processor.tiles(tiny.picture(90, 40))) == 1
    assert llava_fast.count_tokens(whole, 90, 40) == llava_fast.count_tokens(whole, 10, 10)


def test_videos_are_refused_by_name():
    frames = np.stack([tiny.picture(30, 30)] * 2)
    with pytest.raises(ImageError, match="videos are not supported for this kind of checkpoint: give frames as images"):
        tiny.pair("smolvlm").ours.prepare([{"prompt": "<video>", "video": frames}])


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("config.json", {"scale_factor": 5}, "scale_factor is 5, which does not divide a tile's side of 6 patches"),
        ("config.json", {"scale_factor": 0}, "scale_factor"),
        ("preprocessor_config.json", {"do_resize": False}, "do_resize is False; only true"),
        ("preprocessor_config.json", {"size": {"height": 24, "width": 24}}, 'size is .*supported is {"longest_edge"'),
        ("preprocessor_config.json", {"size": {"longest_edge": 4096}}, "more than 32 tiles"),
        ("preprocessor_config.json", {"max_image_size": {"longest_edge": 364}}, "max_image_size is .*the vision tower"),
        ("preprocessor_config.json", {"do_image_splitting": 2}, "do_image_splitting"),
        ("preprocessor_config.json", {"image_processor_type": "CLIPImageProcessor"}, "supported for this model"),
        ("processor_config.json", {"image_seq_len": 169}, "image_seq_len is 169, but config.json implies"),
    ],
)
def test_what_it_cannot_be_is_refused(folder, file, change, said):
    if not (folder / file).exists():
        (folder / file).write_text("{}")
    edit_json(folder / file, **change)
    with pytest.raises(CheckpointError, match=said) as refused:
        llava_fast.load(folder)
    assert file in str(refused.value)


def test_a_tokenizer_without_its_tokens_is_refused(folder):
    for file in folder.glob("token*"):
        file.unlink()
    tiny.tokenizer().save_pretrained(folder)
    with pytest.raises(CheckpointError, match="contain '<fake_token_around_image>'"):
        llava_fast.load(folder)
