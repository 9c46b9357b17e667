"""LLaVA-UHD's first release, against its parts put together by hand: whole slices are read by 64 queries, and
separators stand between them only if config.json says so."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import llava_fast
from llava_fast.checkpoints.load import load_checkpoint
from llava_fast.errors import CheckpointError
from llava_fast.families import family_of_config
from llava_fast.inputs.tiling.slices import adapted, first_slices
from tests.checkpoints.test_llava_uhd import GRID, PATCH, SIZE, SIZES, requests, write
from tests.support import tiny
from tests.support.parity import assert_close
from tests.support.tiny_checkpoints import edit_json

FIXTURE = Path(__file__).parents[1] / "fixtures" / "llava_uhd_first_slices.json"


@pytest.fixture(scope="module", params=[False, True], ids=["released", "separators"])
def uhd(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("first") / "vicuna-uhd"
    parts = write(folder, mm_projector_type="uhd_first", uhd_separators=request.param)
    return folder, llava_fast.load(folder), parts, request.param


def test_slices_are_the_originals():
    cases = json.loads(FIXTURE.read_text())["cases"]
    for (width, height), slices, size in cases:
        whole, grid, each = first_slices(height, width, 336, 14, 6)
        assert (grid if grid[0] else (1, 1)) == (slices[1], slices[0]), (width, height)
        assert whole == adapted(height, width, 336, 14) == tuple(size[:2]), (width, height)
        assert all(sides[0] * sides[1] <= 576 * 14**2 for sides in (whole, each))
    assert len(cases) == 400
    assert first_slices(300, 300, 336, 14, 6) == ((336, 336), (0, 0), (0, 0))  # its only view is the whole
    assert first_slices(336, 672, 336, 14, 6)[1:] == ((1, 2), (336, 336))


def resampled(weights: dict, rows_NC: torch.Tensor, shape) -> torch.Tensor:
    """resampler.py's steps with one head."""
    norm = lambda x, name: F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)  # noqa: E731
    table = weights["pos_embed"]
    at = F.interpolate(table.view(1, GRID, GRID, -1).permute(0, 3, 1, 2), size=shape, mode="bicubic")
    value = norm(rows_NC, "ln_kv")
    given = norm(weights["query"], "ln_q") + table, value + at[0].flatten(1).T, value
    thirds = weights["attn.in_proj_weight"].chunk(3), weights["attn.in_proj_bias"].chunk(3)
    q, k, v = (F.linear(x, m, b) for x, m, b in zip(given, *thirds, strict=True))
    mixed = (q @ k.T / q.shape[-1] ** 0.5).softmax(-1) @ v
    return (
        norm(F.linear(mixed, weights["attn.out_proj.weight"], weights["attn.out_proj.bias"]), "ln_post")
        @ weights["proj"]
    )


def reference(model, parts, separated: bool, prompt: str, pictures: list) -> torch.Tensor:
    clip, llama, weights = parts
    words, embed = model.tokenizer, llama.get_input_embeddings()
    values = [getattr(model.config.vision, name) for name in ("image_mean", "image_std")]
    mean, std = (torch.tensor(value)[:, None, None] for value in values)
    comma, newline = (embed(torch.tensor(words.convert_tokens_to_ids([token]))) for token in (",", "Ċ"))

    def rows(picture: Image.Image) -> torch.Tensor:
        pixels = (torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1) / 255 - mean) / std
        out = clip(pixels[None], output_hidden_states=True, interpolate_pos_encoding=True).hidden_states[-2][0, 1:]
        return resampled(weights, out, (picture.height // PATCH, picture.width // PATCH))

    made = []
    for number, chunk in enumerate(prompt.split("<image>")):
        made.append(embed(torch.tensor(words(chunk, add_special_tokens=number == 0)["input_ids"], dtype=torch.long)))
        if number == len(pictures):
            break
        image = Image.fromarray(pictures[number])
        whole, grid, each = first_slices(image.height, image.width, SIZE, PATCH, 6)
        for place in range(grid[0] * grid[1]):
            resized = image.resize((each[1] * grid[1], each[0] * grid[0]), Image.Resampling.BILINEAR)
            top, left = place // grid[1] * each[0], place % grid[1] * each[1]
            made.append(rows(resized.crop((left, top, left + each[1], top + each[0]))))
            if separated:
                made.append(comma if (place + 1) % grid[1] else newline)
        made.append(rows(image.resize(whole[::-1], Image.Resampling.BILINEAR)))
    return llama(inputs_embeds=torch.cat(made)[None]).logits[0]


@torch.no_grad()
def test_logits_and_answers(uhd):
    _, model, parts, separated = uhd
    expected = [reference(model, parts, separated, r["prompt"], r.get("images", [])) for r in requests()]
    for request, logits in zip(requests(), expected, strict=True):
        assert_close("LLaVA-UHD logits", model(model.prepare([request]), logits="all").logits, logits)
    together = model(model.prepare(requests()), logits="all").logits
    for found, logits in zip(together.split([len(each) for each in expected]), expected, strict=True):
        assert_close("LLaVA-UHD logits, packed batch", found, logits)
    answers = model.generate(requests(), max_new_tokens=4, ignore_eos=True)
    for request, answer, logits in zip(requests(), answers, expected, strict=True):
        assert answer.token_ids[0] == logits[-1].argmax()
        assert model.generate([request], max_new_tokens=4, ignore_eos=True)[0].token_ids == answer.token_ids


def test_gradients(uhd):
    _, model, parts, separated = uhd
    clip, llama, weights = parts
    request = {"prompt": "hello <image> b", "images": [tiny.picture(*SIZES[1])]}
    model.zero_grad()
    model(model.prepare([request]), logits="all").logits.square().mean().backward()
    for module in (clip, llama):
        module.zero_grad()
    reference(model, parts, separated, request["prompt"], request["images"]).square().mean().backward()
    names = family_of_config(model.config).names
    expected = {names.from_stored(name): each.grad for name, each in llama.named_parameters()}
    expected |= {f"vision_tower.{k.removeprefix('vision_model.')}": each.grad for k, each in clip.named_parameters()}
    expected |= {f"projector.{name}": each.grad for name, each in weights.items()}
    floor = 1e-6 * max(grad.abs().max() for grad in expected.values() if grad is not None)
    assert model.projector.pos_embed.grad is not None
    for name, parameter in model.named_parameters():
        if expected[name] is None or parameter.grad is None:
            assert expected[name] is parameter.grad, name
        elif expected[name].abs().max() >= floor:
            assert_close("LLaVA-UHD gradients", parameter.grad, expected[name])
    model.zero_grad()
    for weight in weights.values():
        weight.grad = None


def test_saved_and_read_again(uhd, tmp_path):
    _, model, _, _ = uhd
    llava_fast.save(model, tmp_path / "saved", layout="original")
    again = llava_fast.load(tmp_path / "saved")
    assert again.config == model.config
    assert again.processor.geometry == model.processor.geometry
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_width_that_its_heads_do_not_divide(uhd, tmp_path):
    edit_json(uhd[0] / "tower" / "config.json", hidden_size=64)
    try:
        with pytest.raises(CheckpointError, match="the connector has 0 heads"):
            load_checkpoint(uhd[0])
    finally:
        edit_json(uhd[0] / "tower" / "config.json", hidden_size=128)
