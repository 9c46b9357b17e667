"""SigLIP 2: checkpoints of one image size are SigLIP towers; those of native sizes (NaFlex) have their own."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Siglip2VisionConfig,
    SiglipVisionConfig,
)
from transformers import SiglipConfig as HfSiglip
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

import llava_fast
from llava_fast.accelerated import versions
from llava_fast.errors import CheckpointError
from llava_fast.families import FAMILIES
from llava_fast.families.llava_names import from_stored
from llava_fast.generation.prompt import read_prompt
from llava_fast.inputs.options import ProcessorOptions
from llava_fast.models.towers.vit import SiglipConfig
from tests.support import tiny
from tests.support.parity import assert_close
from tests.support.tiny_checkpoints import TOWER, edit_json, read_hf_config, tokenizer, write_original, write_tower


def test_one_of_a_fixed_size_is_a_siglip_tower(tmp_path):
    """As google/siglip2-base-patch16-256 is stored: a whole SigLIP, text half included, whose config says "siglip"."""
    folder = tmp_path / "siglip2-base-patch16-256"
    stored = write_tower(folder, "siglip", weights=True)
    config = HfSiglip(vision_config=SiglipVisionConfig(**TOWER).to_dict()).to_dict()
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["SiglipModel"]}))
    write_original(tmp_path / "llava", tower=False, mm_vision_tower=str(folder), mm_vision_select_layer=-2)
    tokenizer().save_pretrained(tmp_path / "llava")
    model = llava_fast.load(tmp_path / "llava")
    assert isinstance(model.config.vision, SiglipConfig)
    assert model.config.vision.kind == "siglip"
    assert (
        model.vision_tower.embeddings.patch_embedding.weight
        == load_file(folder / "model.safetensors")["vision_model.embeddings.patch_embedding.weight"]
    ).all()
    assert stored


# ---------------------------------------------------------------- native sizes (NaFlex)

PATCH, MOST = 8, 24
VISION = {**tiny.TOWER, "patch_size": PATCH, "num_patches": 16, "vision_use_head": False}
IMAGES = [tiny.picture(40, 300), tiny.picture(64, 64), tiny.picture(90, 60, seed=1), tiny.picture(20, 20)]
PROMPTS = ["<image>hello there, what is it?", "the <image> and then the <image>", "hello <image>"]
REQUESTS = [
    {"prompt": PROMPTS[0], "images": IMAGES[:1]},
    {"prompt": PROMPTS[1], "images": IMAGES[1:3]},
    {"prompt": PROMPTS[2], "images": IMAGES[3:]},
]


def processor():
    return Siglip2ImageProcessorPil(patch_size=PATCH, max_num_patches=MOST)


def write_native(folder):
    """A LLaVA with a tower of native sizes, as transformers writes it. It holds such a model, but its own forward pass
    takes the padding of an image for patches of it."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": tiny.VOCABULARY}
    config = LlavaConfig(
        vision_config=Siglip2VisionConfig(**VISION),
        text_config=LlamaConfig(**tiny.TEXT, **heads),
        image_token_id=tiny.IMAGE_ID,
        vision_feature_select_strategy="full",
    )
    torch.manual_seed(0)
    hf = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.2)
    hf.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    processor().save_pretrained(folder)
    return hf


def image_features(hf, images):
    """The projected rows of each image, from transformers' own tower and projector, padding left out."""
    inputs = processor()([Image.fromarray(image) for image in images], return_tensors="pt")
    states = hf.model.vision_tower(**inputs, output_hidden_states=True).hidden_states[-2]
    of_each = inputs["pixel_attention_mask"].bool()
    return [hf.model.multi_modal_projector(rows[mask]) for rows, mask in zip(states, of_each, strict=True)]


def reference_embeds(hf, words, prompt, images):
    """[rows, width] of a prompt, put together of transformers' parts."""
    embedding, parts = hf.get_input_embeddings(), []
    for number, part in enumerate(prompt.split("<image>")):
        ids = torch.tensor(words(part, add_special_tokens=number == 0).input_ids, dtype=torch.long)
        parts += [embedding(ids), *image_features(hf, images)[number : number + 1]]
    return torch.cat(parts)


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    folder = tmp_path_factory.mktemp("native")
    return write_native(folder), llava_fast.load(folder), folder


def test_a_llava_of_native_sizes_is_transformers_parts(native):
    """Images of four sizes in sequences packed into one batch; logits and gradients."""
    hf, ours, _ = native
    batch = ours.prepare(REQUESTS)
    assert batch.plan.grids == ((2, 12), (4, 4), (6, 4), (4, 4))
    found = ours(batch, logits="all").logits
    expected = []
    for request in REQUESTS:
        embeds = reference_embeds(hf, ours.tokenizer, request["prompt"], request["images"])
        expected.append(hf(inputs_embeds=embeds[None]).logits[0])
    expected = torch.cat(expected)
    assert_close("LLaVA with SigLIP 2, logits", found, expected)
    weight = torch.randn(expected.shape)
    ours.zero_grad()
    for rows in (found, expected):
        (rows * weight).sum().backward()
    reference = {from_stored(name): parameter.grad for name, parameter in hf.named_parameters()}
    trained = [name for name, parameter in ours.named_parameters() if parameter.grad is not None]
    assert "vision_tower.embeddings.position_embedding.weight" in trained
    for name, parameter in ours.named_parameters():
        if name not in trained:
            assert reference[name] is None or not reference[name].any()
        elif not name.endswith("k_proj.bias"):
            assert_close("LLaVA with SigLIP 2, gradients", parameter.grad, reference[name])


@pytest.mark.skipif(versions.current() < (5, 24), reason="before 5.24 LLaVA passes no keywords to its tower")
@torch.no_grad()
def test_transformers_own_forward_where_no_image_has_padding(native):
    hf, ours, _ = native
    images = [tiny.picture(40, 60), tiny.picture(60, 40)]
    request = {"prompt": "the <image> and <image> now", "images": images}
    inputs = processor()([Image.fromarray(image) for image in images], return_tensors="pt")
    assert inputs["pixel_attention_mask"].all()
    text = request["prompt"].replace("<image>", "<image>" * MOST)
    expected = hf(**ours.tokenizer(text, return_tensors="pt"), **inputs).logits[0]
    assert_close("LLaVA with SigLIP 2, logits", ours(ours.prepare([request]), logits="all").logits, expected)


@torch.no_grad()
def test_greedy_answers_in_a_batch_are_those_of_transformers_decoder(native):
    hf, ours, _ = native
    answers = ours.generate(REQUESTS, max_new_tokens=8, ignore_eos=True)
    for request, answer in zip(REQUESTS, answers, strict=True):
        embeds = reference_embeds(hf, ours.tokenizer, request["prompt"], request["images"])
        expected = hf.model.language_model
        tokens = []
        for _ in range(8):
            logits = hf.lm_head(expected(inputs_embeds=embeds[None]).last_hidden_state[0, -1])
            tokens.append(int(logits.argmax()))
            embeds = torch.cat([embeds, hf.get_input_embeddings().weight[tokens[-1:]]])
        assert answer.token_ids == tokens


@pytest.mark.parametrize("layout", ["hf", "original"])
def test_it_is_saved_and_read_again(native, tmp_path, layout):
    hf, ours, _ = native
    llava_fast.save(ours, tmp_path, layout=layout)
    again = llava_fast.load(tmp_path)
    with torch.no_grad():
        found, expected = (model(model.prepare(REQUESTS), logits="all").logits for model in (again, ours))
    size = min(found.shape[-1], expected.shape[-1])
    assert torch.equal(found[..., :size], expected[..., :size])
    assert again.config.geometry.tiling == ours.config.geometry.tiling
    if layout == "hf":
        stored = LlavaForConditionalGeneration.from_pretrained(tmp_path).state_dict()
        assert all(torch.equal(stored[name], value) for name, value in hf.state_dict().items())
    else:
        assert json.loads((tmp_path / "config.json").read_text())["image_aspect_ratio"] == "native"


def test_the_processors_file_is_written_from_the_config_alone(native):
    _, ours, folder = native
    family = FAMILIES["llava"]()
    made = family.processor_files(ours.config)["preprocessor_config.json"]
    stored = json.loads((folder / "preprocessor_config.json").read_text())
    assert made == stored | {"image_processor_type": "Siglip2ImageProcessor", "do_convert_rgb": True}


def test_tiles_made_on_the_device_or_by_torch(native):
    _, ours, folder = native
    options = ProcessorOptions(tiles_on="device")
    batch = llava_fast.load(folder, processor=options).prepare(REQUESTS)
    assert torch.equal(batch.tiles, ours.prepare(REQUESTS).tiles)
    batch = llava_fast.load(folder, processor=ProcessorOptions(resample="torchvision")).prepare(REQUESTS)
    assert (batch.tiles.int() - ours.prepare(REQUESTS).tiles.int()).abs().max() <= 2


def test_images_of_the_same_bytes_and_another_shape_share_no_cached_rows(native):
    """Of one grid's patches in order the pixels may be those of another's."""
    _, ours, _ = native
    flat = [np.full(size, 7, np.uint8) for size in ((16, 48, 3), (48, 16, 3))]
    keys = [read_prompt(ours.processor, {"prompt": "<image>", "images": [image]}).keys for image in flat]
    assert len(keys[0]) == len(keys[1])
    assert keys[0] != keys[1]


def test_a_video_is_refused(native):
    _, ours, _ = native
    with pytest.raises(llava_fast.ImageError, match=r"videos are not supported .* give frames as images"):
        ours.generate([{"prompt": "<video>hello", "video": IMAGES[:1] * 2}], max_new_tokens=1)


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("preprocessor_config.json", {"patch_size": 4}, "patch_size is 4; the vision tower reads patches of 8 pixels"),
        ("preprocessor_config.json", {"do_resize": False}, "do_resize is False; an image is resized to whole patches"),
        ("preprocessor_config.json", {"max_num_patches": 0}, "max_num_patches: Input should be greater than or equal"),
        ("preprocessor_config.json", {"image_processor_type": "CLIPImageProcessor"}, "supported .*: Siglip2Image"),
        ("config.json", {"model_type": "llava_next"}, "llava_next cuts images into tiles of one size"),
        ("config.json", {"vision_config": {**VISION, "num_patches": 24}}, "positions need a square grid"),
        ("config.json", {"vision_feature_select_strategy": "default"}, "set it to 'full'"),
    ],
)
def test_what_is_not_served_is_refused_by_name(native, tmp_path, file, change, said):
    _, _, folder = native
    for name in ("config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path / name)
    if "vision_config" in change:
        change["vision_config"]["model_type"] = "siglip2_vision_model"
    edit_json(tmp_path / file, **change)
    with pytest.raises(CheckpointError, match=said):
        read_hf_config(tmp_path)
