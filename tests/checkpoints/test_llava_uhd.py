"""LLaVA-UHD: a checkpoint of the original layout, against its parts put together by hand from transformers' CLIP and
Llama and the resampler's steps; saved, asked, and what it cannot be."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

import llava_fast
from llava_fast.checkpoints.load import load_checkpoint
from llava_fast.errors import CheckpointError, ImageError
from llava_fast.families import family_of_config
from llava_fast.inputs.tiling.slices import slices
from llava_fast.models.connectors.perceiver import positions
from tests.models.test_clip_slices import resampled
from tests.support import tiny
from tests.support.parity import assert_close
from tests.support.tiny_checkpoints import assert_saved_in_its_layout, edit_json

PATCH, SIZE, GRID = 8, 32, 8
SIZES = [(32, 32), (20, 90), (70, 40), (64, 64)]
CONFIG = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava_llama",
    "mm_projector_type": "uhd_v1_query64",
    "model_mode": "uhd_v1",
    "mm_vision_tower": "tower",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_patch_merge_type": "flat",
    "mm_hidden_size": 32,
    "use_mm_proj": True,
    "image_aspect_ratio": "anyres",
}


def write(folder, **changes) -> tuple:
    """A checkpoint as the original code writes it. Returns (CLIP, Llama, weights of the connector)."""
    wide = 128 if changes.get("mm_projector_type") == "uhd_first" else 32  # a head is 128 of the tower's features
    torch.manual_seed(0)
    tower = tiny.TOWER | {"hidden_size": wide}
    clip = CLIPVisionModel(CLIPVisionConfig(**tower, image_size=SIZE, patch_size=PATCH)).eval()
    text = {**tiny.TEXT, "hidden_size": 128, "num_hidden_layers": 2, "vocab_size": tiny.VOCABULARY}
    llama = LlamaForCausalLM(LlamaConfig(**text, num_attention_heads=4, num_key_value_heads=2)).eval()
    shapes = {"query": (64, 128), "attn.in_proj_weight": (384, 128), "proj": (128, 128)}
    shapes |= {"kv_proj.weight": (128, wide)} if wide != 128 else {}
    shapes |= {"attn.in_proj_bias": (384,), "attn.out_proj.weight": (128, 128), "attn.out_proj.bias": (128,)}
    shapes |= {f"ln_{name}.{leaf}": (128,) for name in ("q", "kv", "post") for leaf in ("weight", "bias")}
    weights = {
        name: torch.randn(shape) * 0.1 + (name.startswith("ln") and "weight" in name) for name, shape in shapes.items()
    }
    weights["pos_embed"] = positions(GRID, 128, (GRID, GRID), torch.device("cpu")) + torch.randn(64, 128) * 0.01
    with torch.no_grad():
        for module in (clip, llama):
            for name, parameter in module.named_parameters():
                parameter.normal_(0, 0.2).add_(float("norm" in name and "weight" in name))
    tensors = {f"model.mm_projector.{name}": value.clone() for name, value in weights.items()}
    tensors |= {
        f"model.vision_tower.vision_tower.vision_model.{k.removeprefix('vision_model.')}": v
        for k, v in clip.state_dict().items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.contiguous() for name, value in (llama.state_dict() | tensors).items()},
        folder / "model.safetensors",
    )
    llama.config.save_pretrained(folder)
    edit_json(folder / "config.json", **CONFIG | changes)
    clip.config.save_pretrained(folder / "tower")
    tiny.tokenizer().save_pretrained(folder)
    return clip, llama, {name: value.requires_grad_() for name, value in weights.items()}


@pytest.fixture(scope="module")
def uhd(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uhd") / "vicuna-uhd"
    parts = write(folder)
    return folder, llava_fast.load(folder), parts


def reference(model, parts, prompt: str, pictures: list) -> torch.Tensor:
    """Logits of a prompt: pictures cut as slice_process.py does, every slice through CLIP alone."""
    clip, llama, weights = parts
    words, embed = model.tokenizer, llama.get_input_embeddings()
    values = [getattr(model.config.vision, name) for name in ("image_mean", "image_std")]
    mean, std = (torch.tensor(value)[:, None, None] for value in values)
    comma, newline = (embed(torch.tensor(words.convert_tokens_to_ids([token]))) for token in (",", "Ċ"))

    def rows(picture: Image.Image) -> torch.Tensor:
        pixels = (torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1) / 255 - mean) / std
        out = clip(pixels[None], output_hidden_states=True, interpolate_pos_encoding=True).hidden_states[-2][0, 1:]
        return resampled(weights, out, (picture.height // PATCH, picture.width // PATCH), GRID, 1)

    made = []
    for number, chunk in enumerate(prompt.split("<image>")):
        made.append(embed(torch.tensor(words(chunk, add_special_tokens=number == 0)["input_ids"], dtype=torch.long)))
        if number == len(pictures):
            break
        image = Image.fromarray(pictures[number])
        whole, grid, each = slices(image.height, image.width, SIZE, PATCH, 9)
        resized = image.resize((each[1] * grid[1], each[0] * grid[0]), Image.Resampling.BICUBIC) if grid[0] else None
        for row in range(grid[0]):
            for column in range(grid[1]):
                left, top = column * each[1], row * each[0]
                made += [rows(resized.crop((left, top, left + each[1], top + each[0])))]
                made.append(comma if column < grid[1] - 1 else newline)
        made.append(rows(image.resize(whole[::-1], Image.Resampling.BICUBIC)))
    return llama(inputs_embeds=torch.cat(made)[None]).logits[0]


def requests() -> list[dict]:
    made = [{"prompt": f"hello <image> {h}x{w}:", "images": [tiny.picture(h, w)]} for h, w in SIZES]
    made.append({"prompt": "a <image><image>\nthe b", "images": [tiny.picture(*size) for size in SIZES[1:3]]})
    return [*made, {"prompt": "only text"}]


@torch.no_grad()
def test_logits_singly_and_batched(uhd):
    _, model, parts = uhd
    expected = [reference(model, parts, each["prompt"], each.get("images", [])) for each in requests()]
    for request, logits in zip(requests(), expected, strict=True):
        assert_close("LLaVA-UHD logits", model(model.prepare([request]), logits="all").logits, logits)
        assert model.processor.count(request).all == len(logits)
    together = model(model.prepare(requests()), logits="all").logits
    for found, logits in zip(together.split([len(each) for each in expected]), expected, strict=True):
        assert_close("LLaVA-UHD logits, packed batch", found, logits)
    padded = model(model.prepare(requests(), layout="padded"), logits="all").logits
    for found, logits in zip(padded, expected, strict=True):
        assert_close("LLaVA-UHD logits, padded batch", found[: len(logits)], logits)


def test_answers_alone_are_those_of_a_batch(uhd):
    _, model, parts = uhd
    together = model.generate(requests(), max_new_tokens=8, ignore_eos=True)
    for request, answer in zip(requests(), together, strict=True):
        (alone,) = model.generate([request], max_new_tokens=8, ignore_eos=True)
        assert alone.token_ids == answer.token_ids
        with torch.no_grad():
            logits = reference(model, parts, request["prompt"], request.get("images", []))
        assert answer.token_ids[0] == logits[-1].argmax()


def test_gradients(uhd):
    _, model, parts = uhd
    clip, llama, weights = parts
    turns = [{"role": "user", "content": "<image> what?"}, {"role": "assistant", "content": "the hello"}]
    request = {"messages": turns, "images": [tiny.picture(20, 90)]}
    batch = model.prepare([request], labels=True)
    model.zero_grad()
    model(batch).loss.backward()
    prompt = model.processor.template.render(turns, add_generation_prompt=False)
    logits = reference(model, parts, prompt, request["images"])
    rows = batch.column("supervised_row").long()
    for module in (clip, llama):
        module.zero_grad()
    torch.nn.functional.cross_entropy(logits[rows], batch.column("supervised_target").long()).backward()
    names = family_of_config(model.config).names
    expected = {names.from_stored(name): each.grad for name, each in llama.named_parameters()}
    expected |= {f"vision_tower.{k.removeprefix('vision_model.')}": each.grad for k, each in clip.named_parameters()}
    expected |= {f"projector.{name}": each.grad for name, each in weights.items()}
    floor = 1e-6 * max(grad.abs().max() for grad in expected.values() if grad is not None)
    for name, parameter in model.named_parameters():
        if expected[name] is None or parameter.grad is None:
            assert expected[name] is parameter.grad, name
        elif expected[name].abs().max() >= floor:
            assert_close("LLaVA-UHD gradients", parameter.grad, expected[name])
    model.zero_grad()


def test_saved_it_is_the_same_to_the_bit(uhd, tmp_path):
    folder, model, _ = uhd
    assert_saved_in_its_layout("llava_uhd", model, folder, tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"mm_projector_type": "adapt_spatial_resampler_v2"},
            "mm_projector_type is 'adapt_spatial_resampler_v2'; suppor",
        ),
        ({"model_mode": "uhd_v2"}, "model_mode is 'uhd_v2'; supported are uhd_v1"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type is 'spatial_unpad'; supported are flat"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature is 'cls_patch'"),
        ({"mm_resampler_type": "spatial_pool"}, "mm_resampler_type is 'spatial_pool'"),
        ({"hidden_size": 96}, "hidden_size is 96; the connector needs a multiple of 128"),
    ],
)
def test_what_it_cannot_be_is_refused(uhd, tmp_path, change, said):
    shutil.copytree(uhd[0], tmp_path / "copy")
    edit_json(tmp_path / "copy" / "config.json", **change)
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(tmp_path / "copy")


def test_the_published_connector_has_144_rows_a_slice(uhd, tmp_path):
    shutil.copytree(uhd[0], tmp_path / "copy")
    edit_json(tmp_path / "copy" / "config.json", mm_projector_type="adapt_spatial_resampler_v1", model_mode=None)
    config = load_checkpoint(tmp_path / "copy").config
    assert config.projector.queries == config.geometry.tiling.queries == 144
    assert config.projector.num_heads == 1


def test_videos_are_refused(uhd):
    frames = np.stack([tiny.picture(30, 30)] * 2)
    with pytest.raises(ImageError, match="videos are not supported for this kind of checkpoint"):
        uhd[1].prepare([{"prompt": "<video>", "video": frames}])
