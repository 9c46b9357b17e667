"""InternVL: prompts and tiles equal those of transformers' processor; invalid files."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import llava_fast
from llava_fast.errors import CheckpointError, ImageError
from llava_fast.generation.prompt import read_prompt
from tests.support import tiny
from tests.support.tiny_checkpoints import edit_json

NAME = "internvl"
SIZES = [(48, 48), (1, 300), (300, 1), (40, 90), (90, 40), (200, 201), (333, 250)]
TEMPLATE = (  # as the published checkpoints': an image's place is the tokenizer's own token
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}<IMG_CONTEXT>\n{% else %}{{ item['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def folder(tmp_path):
    tiny.save(tiny.CASES[NAME], tiny.pair(NAME).hf, tmp_path)
    return tmp_path


def test_tiles_and_ids_are_those_of_transformers_processor():
    """Several images of one prompt among them, each around its tokens, and the checkpoint's own placeholder."""
    pair = tiny.pair(NAME)
    values = {name: getattr(pair.ours.config.vision, name) for name in ("image_mean", "image_std")}
    for sizes in (*([size] for size in SIZES), SIZES[:3]):
        pictures = [tiny.picture(*size) for size in sizes]
        text = "a" + " and <IMG_CONTEXT>\nthe" * len(pictures)
        stock = pair.processor(images=[Image.fromarray(each) for each in pictures], text=[text], return_tensors="pt")
        for prompt in (text, text.replace("<IMG_CONTEXT>", "<image>")):
            batch = pair.ours.prepare([{"prompt": prompt, "images": pictures}])
            ids = torch.where(batch.column("source") == 0, batch.column("row"), pair.visual_ids[2])
            assert torch.equal(ids.long(), stock["input_ids"][0])
            mean, std = (torch.tensor(values[name])[:, None, None] for name in ("image_mean", "image_std"))
            torch.testing.assert_close((batch.tiles / 255 - mean) / std, stock["pixel_values"], rtol=0, atol=1e-6)


def test_a_template_may_write_the_checkpoints_own_mark(folder):
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    model = llava_fast.load(folder)
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    request = {"messages": turns, "images": [tiny.picture(40, 90)]}
    expected = model.prepare(
        [{"prompt": "<|im_start|>user\n<image>\nwhat?<|im_end|>\n<|im_start|>assistant\n", "images": request["images"]}]
    )
    assert torch.equal(model.prepare([request]).column("row"), expected.column("row"))
    answered = {**request, "messages": [*turns, {"role": "assistant", "content": "the hello"}]}
    batch = model.prepare([answered], labels=True)
    supervised = batch.plan.column("supervised_target").tolist()
    assert model.tokenizer.decode(supervised) == "the hello<|im_end|>"


def test_grids_are_as_the_file_says_and_always_cut(folder):
    """crop_to_patches of a published file is false, and transformers' processor cuts all the same."""
    image = tiny.picture(40, 90)
    for settings, tiles in (({}, 3), ({"max_patches": 1}, 1), ({"min_patches": 4}, 7), ({"crop_to_patches": False}, 3)):
        edit_json(folder / "preprocessor_config.json", **({"min_patches": 1, "max_patches": 6} | settings))
        model = llava_fast.load(folder)
        assert len(model.processor.tiles(image)) == tiles
        assert llava_fast.count_tokens(model, 40, 90) == 2 + 9 * tiles


def test_a_repetition_penalty_counts_the_tokens_around_an_image():
    pair = tiny.pair(NAME)
    prompt = read_prompt(pair.ours.processor, {"prompt": "the <image>", "images": [tiny.picture(40, 40)]})
    inputs = pair.reference_inputs("the <image>", [tiny.picture(40, 40)])
    assert set(prompt.ids(pair.ours.config.image_token_id)) == set(inputs["input_ids"][0].tolist())


def test_videos_are_refused_by_name():
    frames = np.stack([tiny.picture(30, 30)] * 2)
    with pytest.raises(ImageError, match="videos are not supported for this kind of checkpoint: give frames as images"):
        tiny.pair(NAME).ours.prepare([{"prompt": "<video>", "video": frames}])


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("config.json", {"downsample_ratio": 0.4}, "downsample_ratio is 0.4; supported are 1, 1/2"),
        ("config.json", {"downsample_ratio": 1 / 7}, "a tile of 48 pixels has no square blocks of patches of 56"),
        ("config.json", {"vision_feature_layer": [-1, -2]}, "vision_feature_layer"),
        ("config.json", {"vision_feature_select_strategy": "full"}, "select_strategy is 'full'; supported are default"),
        ("config.json", {"projector_hidden_act": "tanh"}, "projector_hidden_act is 'tanh'; supported are"),
        ("preprocessor_config.json", {"min_patches": 7}, "min_patches <= max_patches"),
        ("preprocessor_config.json", {"max_patches": "6"}, "max_patches"),
        ("preprocessor_config.json", {"size": {"height": 32, "width": 32}}, "size is .*48x48"),
        ("preprocessor_config.json", {"image_processor_type": "CLIPImageProcessor"}, "GotOcr2ImageProcessor"),
        ("processor_config.json", {"image_seq_length": 256}, "image_seq_length is 256, but config.json implies 9"),
    ],
)
def test_what_it_cannot_be_is_refused(folder, file, change, said):
    if not (folder / file).exists():
        (folder / file).write_text("{}")
    edit_json(folder / file, **change)
    with pytest.raises(CheckpointError, match=said) as refused:
        llava_fast.load(folder)
    assert file in str(refused.value) or "config.json" in str(refused.value)


@pytest.mark.parametrize("sides", [{"image_size": [48, 32]}, {"image_size": [48]}, {"patch_size": [0, 0]}])
def test_sides_of_a_tower_are_checked(folder, sides):
    vision = json.loads((folder / "config.json").read_text())["vision_config"]
    edit_json(folder / "config.json", vision_config=vision | sides)
    with pytest.raises(CheckpointError, match=next(iter(sides))):
        llava_fast.load(folder)


def test_a_tokenizer_without_its_tokens_is_refused(folder):
    for file in folder.glob("token*"):
        file.unlink()
    tiny.tokenizer(bos=False).save_pretrained(folder)
    with pytest.raises(CheckpointError, match="prompts of a internvl model contain '<img>'"):
        llava_fast.load(folder)
