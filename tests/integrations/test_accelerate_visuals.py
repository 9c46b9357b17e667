"""accelerate on LLaVA-OneVision's images and on videos, against the stock model; test_matrix.py has their answers."""

import copy
import dataclasses

import pytest
import torch

import llava_fast
from llava_fast.accelerated import encode
from llava_fast.errors import ImageError
from tests.support import tiny
from tests.support.against_stock import SAMPLES, assert_same_outputs, batch, both, fresh

VIDEO_FAMILIES = ["video", "video_max_odd", "onevision", "onevision_window"]


def test_the_images_are_shrunk_and_both_forms_of_tiles_come():
    """What the batches above are for: a shrunk image, one that is not, and images that share a prompt."""
    geometry = tiny.pair("onevision").ours.processor.geometry
    shapes = [llava_fast.inputs.tiling.anyres.image_rows(geometry, *SAMPLES[key][1][0]) for key in ("a", "large")]
    assert [shape.pooling is None for shape in shapes] == [True, False]


@pytest.mark.parametrize("name", ["video", "onevision"])
def test_later_layers_do_not_run(name):
    model, ran = llava_fast.accelerate(fresh(name)), []
    for number, layer in enumerate(model.model.vision_tower.encoder.layers):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    inputs = batch(name, "both film")
    out = model(**inputs)
    # images and frames in one run; an answer that holds the tower's last hidden state needs the last layer
    assert ran == ([0, 1, 2] if "image_outputs" in out else [0, 1])
    ran.clear()
    model.generate(**inputs, max_new_tokens=2, pad_token_id=0)
    assert set(ran) == {0, 1}


@pytest.mark.parametrize("where", ["multi_modal_projector", "multi_modal_projector.linear_1"])
@pytest.mark.parametrize("which", ["both film", "film", "a"])
@pytest.mark.parametrize("name", ["video", "onevision"])
def test_a_hooked_projector_sees_what_it_sees_in_the_stock_model(name, which, where):
    stock, model = both(name)
    seen: list[list] = [[], []]
    for each, shapes in zip((stock, model), seen, strict=True):

        def hook(module, args, output, record=shapes):
            record.append(args[0].shape)
            return output * 1.5

        each.model.get_submodule(where).register_forward_hook(hook)
    assert_same_outputs(model, stock, batch(name, which))
    assert seen[0] == seen[1] != []


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        (
            lambda model: model.model.vision_resampler.pool.register_forward_hook(lambda *_: None),
            "the pooler of videos",
        ),
        (lambda model: setattr(model.config, "spatial_pool_mode", "conv"), "the pooler of videos"),
    ],
)
def test_what_is_not_served_takes_the_stock_path(change, phrase, caplog):
    stock, model = both("video")
    change(model)
    inputs = batch("video", "both film")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, stock(**inputs).logits)
    assert [record for record in caplog.records if phrase in record.message]


def test_wrong_counts_raise_what_stock_raises():
    for name in ("video", "onevision"):
        stock, model = both(name)
        for token in (tiny.IMAGE_ID, tiny.VIDEO_ID):
            inputs = batch(name, "both")
            inputs["input_ids"][0, 1] = token
            for each in (stock, model):
                with pytest.raises(ValueError, match="do not match"):
                    each(**inputs)


@pytest.mark.parametrize("name", ["llava15", "llava15_full", "next", "video", "onevision"])
def test_the_geometry_is_that_of_the_checkpoint_reader(name):
    """But for what a processor's files say, which no model is given: how images are resized and filled."""
    inner, read = fresh(name).model, tiny.pair(name).ours.config.geometry
    made = encode.geometry(inner.config, encode.select(inner, {}).skipped, hasattr(inner.vision_tower, "pre_layrnorm"))
    of_files = ("aspect", "fit", "filter", "convert_rgb", "pad_color", "frame_aspect", "frame_fit", "frame_filter")
    same = {field.name: getattr(read, field.name) for field in dataclasses.fields(read) if field.name not in of_files}
    assert {field: getattr(made, field) for field in same} == same


def test_an_unknown_aspect_ratio_is_named():
    config = copy.deepcopy(fresh("onevision").config)
    config.vision_aspect_ratio = "pad"
    with pytest.raises(ImageError, match="vision_aspect_ratio is 'pad'; supported: anyres_max_N"):
        encode.geometry(config, 0, False)
    assert encode.geometry(config, 0, False, "anyres_max_4").max_tiles == 4
    assert config.vision_aspect_ratio == "pad"
