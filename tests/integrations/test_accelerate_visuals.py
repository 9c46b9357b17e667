"""accelerate on LLaVA-OneVision's images, on videos, and on uint8 pixels, against the stock model."""

import pytest
import tiny
import torch
from parity import assert_close, assert_same_answer
from test_accelerate import assert_same_gradients, assert_same_outputs, fresh, gradients, no_fallback  # noqa: F401
from torch import nn

import llava_fast

VIDEO_FAMILIES = ["video", "video_max_odd", "onevision", "onevision_window"]
SAMPLES = {  # prompt, sizes of images, frames of a video
    "one": ("<image> what is this?", [(60, 90)], 0),
    "wide": ("<image>", [(30, 300)], 0),
    "large": ("hello <image> there", [(400, 410)], 0),
    "two": ("<image> or <image>?", [(100, 30), (90, 90)], 0),
    "text": ("text alone, somewhat longer than the others", [], 0),
    "film": ("<video> tell", [], 3),
    "both": ("see <image> and <video>", [(50, 60)], 3),
    "after": ("<video> and then <image>", [(70, 40)], 3),
}
SIDES = ["left", "right"]


def batch(name: str, which: str, side: str = "left", labels: bool = False) -> dict:
    """What transformers' model takes for a padded batch of SAMPLES."""
    pair, each, counts = tiny.pair(name), [], []
    for number, key in enumerate(which.split()):
        prompt, sizes, frames = SAMPLES[key]
        film = (
            None
            if not frames
            else torch.stack([torch.from_numpy(tiny.picture(64, 80, 10 * number + i)) for i in range(frames)]).numpy()
        )
        each.append(pair.reference_inputs(prompt, [tiny.picture(*size, number) for size in sizes], film))
        counts += [len(sizes)] if sizes else []
    longest = max(item["input_ids"].shape[1] for item in each)

    def pad(row, value):
        short = longest - len(row)
        return nn.functional.pad(row, (short, 0) if side == "left" else (0, short), value=value)

    inputs = {
        "input_ids": torch.stack([pad(item["input_ids"][0], tiny.PAD_ID) for item in each]),
        "attention_mask": torch.stack([pad(item["attention_mask"][0], 0) for item in each]),
    }
    pixels = [tiles for item in each for tiles in item.get("pixel_values", ())]
    if pixels:
        most = max(len(tiles) for tiles in pixels)
        inputs["pixel_values"] = torch.stack(
            [nn.functional.pad(tiles, (0, 0, 0, 0, 0, 0, 0, most - len(tiles))) for tiles in pixels]
        )
        inputs["image_sizes"] = torch.cat([item["image_sizes"] for item in each if "image_sizes" in item])
        if pair.case.kind == "llava_onevision":
            inputs["batch_num_images"] = torch.tensor(counts)
    films = [item["pixel_values_videos"] for item in each if "pixel_values_videos" in item]
    if films:
        inputs["pixel_values_videos"] = torch.cat(films)
    if labels:
        ids = inputs["input_ids"]
        spoken = (ids != tiny.IMAGE_ID) & (ids != tiny.VIDEO_ID) & (inputs["attention_mask"] == 1)
        inputs["labels"] = torch.where(spoken & (torch.arange(longest) % 3 > 0), ids, -100)
    return inputs


def both(name: str, **kwargs) -> tuple[nn.Module, nn.Module]:
    """(stock, accelerated)."""
    return fresh(name), llava_fast.accelerate(fresh(name), **kwargs)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("which", ["one wide large", "two text one", "two", "large", "text"])
@pytest.mark.parametrize("name", ["onevision", "onevision_window"])
def test_onevision_images(name, which, side, no_fallback):  # noqa: F811
    stock, model = both(name)
    for labels in (False, True):
        assert_same_outputs(name, model, stock, batch(name, which, side, labels))


def test_the_images_are_shrunk_and_both_forms_of_tiles_come():
    """What the batches above are for: a shrunk image, one that is not, and images that share a prompt."""
    geometry = tiny.pair("onevision").ours.processor.geometry
    shapes = [llava_fast.inputs.anyres.image_rows(geometry, *SAMPLES[key][1][0]) for key in ("one", "large")]
    assert [shape.taps is None for shape in shapes] == [True, False]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("which", ["film text", "both two film", "after one both"])
@pytest.mark.parametrize("name", VIDEO_FAMILIES)
def test_videos(name, which, side, no_fallback):  # noqa: F811
    stock, model = both(name)
    for labels in (False, True):
        inputs = batch(name, which, side, labels)
        assert_same_outputs(name, model, stock, inputs)
        with torch.no_grad():
            found, expected = model(**inputs).video_hidden_states, stock(**inputs).video_hidden_states
        assert_close("accelerated video_hidden_states", found, expected, 1e-5)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("which", ["one large text two", "both film"])
@pytest.mark.parametrize("name", VIDEO_FAMILIES)
def test_loss_and_gradients(name, which, side, no_fallback):  # noqa: F811
    stock, model = both(name)
    inputs = batch(name, which, side, labels=True)
    (found_out, found), (expected_out, expected) = gradients(model, inputs), gradients(stock, inputs)
    assert_close("accelerated loss", found_out.loss, expected_out.loss, 1e-5)
    assert_same_gradients("accelerated gradients", found, expected)


@pytest.mark.parametrize("layer", [-1, 1, -3])
@pytest.mark.parametrize("name", ["onevision", "video"])
def test_feature_layers(name, layer, no_fallback):  # noqa: F811
    stock, model = both(name)
    assert_same_outputs(name, model, stock, batch(name, "both two film"), vision_feature_layer=layer)


@pytest.mark.parametrize("how", [{}, {"num_beams": 2}, {"do_sample": True}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("which", ["one large text", "both after film"])
@pytest.mark.parametrize("name", ["video", "onevision"])
def test_generate(name, which, how, no_fallback):  # noqa: F811
    assert_same_tokens(*both(name), batch(name, which), how)


def assert_same_tokens(stock, model, inputs: dict, how: dict, others: dict | None = None) -> None:
    """`others`: what the accelerated model is given in place of `inputs`."""
    kwargs = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | how
    answers = []
    for each, given in ((model, others or inputs), (stock, inputs)):
        torch.manual_seed(0)
        out = each.generate(**given, **kwargs, return_dict_in_generate=True, output_logits=True)
        answers.append(out.sequences[:, inputs["input_ids"].shape[1] :].tolist())
    if how.get("num_beams") or how.get("do_sample"):
        assert answers[0] == answers[1]
        return
    for row, (found, expected) in enumerate(zip(*answers, strict=True)):
        assert_same_answer(found, expected, torch.stack(out.logits)[:, row])


@pytest.mark.parametrize("name", ["video", "onevision"])
def test_later_layers_do_not_run(name):
    model, ran = llava_fast.accelerate(fresh(name)), []
    for number, layer in enumerate(model.model.vision_tower.encoder.layers):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    inputs = batch(name, "both film")
    model(**inputs)
    assert ran == [0, 1]  # images and frames in one run
    model.generate(**inputs, max_new_tokens=2, pad_token_id=0)
    assert set(ran[2:]) == {0, 1}


@pytest.mark.parametrize("where", ["multi_modal_projector", "multi_modal_projector.linear_1"])
@pytest.mark.parametrize("which", ["both film", "film", "one"])
@pytest.mark.parametrize("name", ["video", "onevision"])
def test_a_hooked_projector_sees_what_it_sees_in_the_stock_model(name, which, where):
    stock, model = both(name)
    seen: list[list] = [[], []]
    for each, shapes in zip((stock, model), seen, strict=True):

        def hook(module, args, output, record=shapes):
            record.append(args[0].shape)
            return output * 1.5

        each.model.get_submodule(where).register_forward_hook(hook)
    assert_same_outputs(name, model, stock, batch(name, which))
    assert seen[0] == seen[1] != []


@pytest.mark.parametrize(
    "change, phrase",
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
