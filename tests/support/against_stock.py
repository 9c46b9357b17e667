"""Comparing an accelerated transformers model with the stock one: models, padded batches, and what "same" means."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

import llava_fast
from tests.support import tiny
from tests.support.parity import assert_close, assert_same_answer

VISUAL = ("image_hidden_states", "video_hidden_states", "image_outputs", "video_outputs")
SAMPLES = {  # prompt, (height, width) of images, frames of a video
    "a": ("<image> what is this, then?", [(60, 90)], 0),
    "wide": ("<image>", [(30, 300)], 0),
    "tall": ("hello <image>", [(200, 50)], 0),
    "large": ("hello <image> there", [(400, 410)], 0),
    "two": ("<image> or <image>?", [(1, 300), (90, 30)], 0),
    "none": ("text alone, somewhat longer than the others, no picture", [], 0),
    "film": ("<video> tell", [], 3),
    "both": ("see <image> and <video>", [(50, 60)], 3),
    "after": ("<video> and then <image>", [(70, 40)], 3),
}


def fresh(name: str) -> nn.Module:
    """A stock model of its own, in eval mode."""
    return tiny.hf_model(tiny.CASES[name])


def shallow(name: str) -> nn.Module:
    """One with a decoder layer and two of the tower, for what takes long for each layer."""
    fewer = {"text_options": {"num_hidden_layers": 1}, "tower_options": {"num_hidden_layers": 2}}
    return tiny.hf_model(dataclasses.replace(tiny.CASES[name], **fewer))


def both(name: str, *args, **kwargs) -> tuple[nn.Module, nn.Module]:
    """(stock, accelerated)."""
    return fresh(name), llava_fast.accelerate(fresh(name), *args, **kwargs)


def batch(name: str, which: str = "a none two tall", side: str = "left", labels: bool = False) -> dict:
    """What transformers' model takes for a padded batch of SAMPLES, with different numbers of tiles."""
    pair, each, counts = tiny.pair(name), [], []
    for number, key in enumerate(which.split()):
        prompt, sizes, frames = SAMPLES[key]
        film = [torch.from_numpy(tiny.picture(64, 80, 10 * number + frame)) for frame in range(frames)]
        pictures = [tiny.picture(*size, seed) for seed, size in enumerate(sizes)]
        each.append(pair.reference_inputs(prompt, pictures, torch.stack(film).numpy() if film else None))
        counts += [len(sizes)] if sizes else []
    longest = max(item["input_ids"].shape[1] for item in each)

    def pad(row: Tensor, value: int) -> Tensor:
        short = longest - len(row)
        return nn.functional.pad(row, (short, 0) if side == "left" else (0, short), value=value)

    inputs = {
        "input_ids": torch.stack([pad(item["input_ids"][0], tiny.PAD_ID) for item in each]),
        "attention_mask": torch.stack([pad(item["attention_mask"][0], 0) for item in each]),
    }
    pixels = [tiles for item in each for tiles in item.get("pixel_values", ())]
    if pixels:
        if pixels[0].dim() == 4:  # AnyRes: every image filled up to the most tiles
            most = max(len(tiles) for tiles in pixels)
            pixels = [nn.functional.pad(tiles, (0, 0, 0, 0, 0, 0, 0, most - len(tiles))) for tiles in pixels]
            inputs["image_sizes"] = torch.cat([item["image_sizes"] for item in each if "image_sizes" in item])
        inputs["pixel_values"] = torch.stack(pixels)
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


def gradients(model: nn.Module, inputs: dict, **kwargs) -> tuple[dict, dict[str, Tensor | None]]:
    """(outputs, gradients by name) of one backward pass."""
    model.zero_grad()
    out = model(**inputs, **kwargs)
    out.loss.backward()
    return out, {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def assert_same_gradients(what: str, found: dict, expected: dict) -> None:
    """Within 1e-4 of each tensor's largest, with a floor, as tests/test_parity_gradients.py; None matches None."""
    floor = 1e-6 * max(g.abs().max().item() for g in expected.values() if g is not None)
    assert found.keys() == expected.keys()
    for name, reference in expected.items():
        gradient = found[name]
        if gradient is None or reference is None:
            # a row or layer that no loss reaches: stock may give zeros where nothing is computed here
            other = gradient if reference is None else reference
            assert other is None or not other.any(), name
        elif reference.abs().max() < floor:
            assert gradient.abs().max() < floor, name
        else:
            assert_close(what, gradient, reference)


def flat(value) -> list[Tensor]:
    """All tensors in nested tuples, lists and mappings, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in (value.values() if isinstance(value, Mapping) else value or ()) for tensor in flat(part)]


def visual_outputs(out) -> dict[str, list[Tensor]]:
    """What a model's answer tells of images and videos: their rows, since transformers 5.24 also the tower's states."""
    return {name: flat(out[name]) for name in VISUAL if out.get(name) is not None}


def assert_same_outputs(model, stock, inputs: dict, **kwargs) -> None:
    """The same fields; logits, loss and what is told of images and videos within 1e-5."""
    with torch.no_grad():
        found, expected = model(**inputs, **kwargs), stock(**inputs, **kwargs)
    assert list(found) == list(expected)
    assert type(found) is type(expected)
    for field in ("logits", "loss"):
        if expected.get(field) is not None:
            assert_close(f"accelerated {field}", found[field], expected[field], 1e-5)
    assert_same_visual_outputs("accelerated", found, expected)


def assert_same_visual_outputs(what: str, found, expected, together: bool = False) -> None:
    """`together`: the rows of images may come as one tensor, or as one of each image."""
    found, expected = visual_outputs(found), visual_outputs(expected)
    assert found.keys() == expected.keys()
    for field in expected:
        parts = [found[field], expected[field]]
        if together and field == "image_outputs":
            rows = [torch.cat([part for part in each if part.dim() == 2]) for each in parts]
            parts = [[*(part for part in each if part.dim() == 3), row] for each, row in zip(parts, rows, strict=True)]
        for mine, theirs in zip(*parts, strict=True):
            assert_close(f"{what} {field}", mine, theirs, 1e-5)


def assert_same_tokens(model, stock, inputs: dict, others: dict | None = None, **how) -> None:
    """Greedy answers, those of beams, and draws from one seed; the model may be given `others` in place of inputs."""
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
