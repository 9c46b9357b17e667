"""Tiny SliME checkpoints, and their logits by the original's steps on transformers' CLIP and Llama."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from llava_fast.models.connectors.perceiver import positions
from tests.support import tiny
from tests.support.tiny_checkpoints import edit_json

PATCH, TILE, GRID, HIDDEN, SEPARATOR = 8, 32, 2, 128, 9
CONFIG = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava_llama",
    "mm_projector_type": "gated",
    "mm_resampler_type": "cosine",
    "mm_resampler_topp": 0.8,
    "mm_resampler_temp": 0.05,
    "mm_resampler_dim": GRID**2,
    "mm_learnable_gated": -1,
    "use_global_only": False,
    "use_local_only": False,
    "seperator": SEPARATOR,
    "mm_vision_tower": "tower",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_patch_merge_type": "spatial",
    "mm_hidden_size": HIDDEN,
    "use_mm_proj": True,
    "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": [[64, 64], [32, 64]],
}


class Parts(NamedTuple):
    """Original modules and weights: a tower, a language model, "projection.0.weight" and the like."""

    clip: CLIPVisionModel
    llama: LlamaForCausalLM
    weights: dict[str, Tensor]
    config: dict[str, Any]


def write(folder: Path, patch: int = PATCH, **changes: Any) -> Parts:
    """A checkpoint as the original code writes it. Its tiles are 4 x 4 patches, or 24 x 24 with another `patch`."""
    torch.manual_seed(0)
    tile = TILE if patch == PATCH else 24 * patch
    tower = {**tiny.TOWER, "hidden_size": HIDDEN, "intermediate_size": 64, "num_attention_heads": 2}
    clip = CLIPVisionModel(CLIPVisionConfig(**tower, image_size=tile, patch_size=patch)).eval()
    text = {**tiny.TEXT, "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": tiny.VOCABULARY}
    llama = LlamaForCausalLM(LlamaConfig(**text, num_attention_heads=4, num_key_value_heads=2)).eval()
    with torch.no_grad():
        for module in (clip, llama):
            for name, parameter in module.named_parameters():
                parameter.normal_(0, 0.2).add_(float("norm" in name and "weight" in name))
    weights: dict[str, Tensor] = {}
    for name, shape in {"0.weight": (32, HIDDEN), "0.bias": (32,), "2.weight": (32, 32), "2.bias": (32,)}.items():
        weights[f"mm_projector.projection.{name}"] = torch.randn(shape) * 0.2
    for where, grid in (("mm_projector.attn.", 24), ("sampler.post_qformer.", GRID)):
        shapes = {"query": (grid**2, HIDDEN), "attn.in_proj_weight": (3 * HIDDEN, HIDDEN)}
        shapes |= {"attn.in_proj_bias": (3 * HIDDEN,), "attn.out_proj.weight": (HIDDEN, HIDDEN)}
        shapes |= {"attn.out_proj.bias": (HIDDEN,)}
        shapes |= {f"ln_{name}.{leaf}": (HIDDEN,) for name in ("q", "kv", "post") for leaf in ("weight", "bias")}
        for name, shape in shapes.items():
            weights[where + name] = torch.randn(shape) * 0.1 + (name.startswith("ln") and "weight" in name)
        table = positions(grid, HIDDEN, (grid, grid), torch.device("cpu"), half=True)
        weights[where + "pos_embed"] = (table + torch.randn(table.shape) * 0.01).half().float()
    weights["mm_projector.w_gate"] = torch.randn(HIDDEN, 2) * 0.2
    weights["mm_projector.w_noise"] = torch.randn(HIDDEN, 2)
    weights["mm_projector.mean"], weights["mm_projector.std"] = torch.zeros(1), torch.ones(1)
    tensors = {f"model.{name}": value.clone() for name, value in weights.items()}
    tensors |= {
        f"model.vision_tower.vision_tower.vision_model.{name.removeprefix('vision_model.')}": value
        for name, value in clip.state_dict().items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    whole = llama.state_dict() | tensors
    save_file({name: value.contiguous() for name, value in whole.items()}, folder / "model.safetensors")
    llama.config.save_pretrained(folder)
    edit_json(folder / "config.json", **CONFIG | changes)
    clip.config.save_pretrained(folder / "tower")
    tiny.tokenizer().save_pretrained(folder)
    return Parts(clip, llama, {k: v.requires_grad_() for k, v in weights.items()}, CONFIG | changes)


def resampled(parts: Parts, where: str, rows: Tensor) -> Tensor:
    """The resampler of sampler.py, by its steps: [T, N, C] -> [T, queries, C]."""
    w = {name.removeprefix(where): value for name, value in parts.weights.items() if name.startswith(where)}
    table, side = w["pos_embed"].detach(), round(rows.shape[1] ** 0.5)
    grid = round(len(table) ** 0.5)
    at = F.interpolate(table.view(1, grid, grid, -1).permute(0, 3, 1, 2), size=(side, side), mode="bicubic")
    value = F.layer_norm(rows, (HIDDEN,), w["ln_kv.weight"], w["ln_kv.bias"], 1e-6)
    query = F.layer_norm(w["query"], (HIDDEN,), w["ln_q.weight"], w["ln_q.bias"], 1e-6) + table
    key = value + at.permute(0, 2, 3, 1).flatten(1, 2)
    thirds = w["attn.in_proj_weight"].chunk(3), w["attn.in_proj_bias"].chunk(3)
    made = []
    for of_tile, values in zip(key, value, strict=True):
        projected = [F.linear(x, m, b) for x, m, b in zip((query, of_tile, values), *thirds, strict=True)]
        heads = HIDDEN // 128
        q, k, v = (x.unflatten(1, (heads, -1)).transpose(0, 1) for x in projected)
        mixed = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1) @ v
        made.append(F.linear(mixed.transpose(0, 1).flatten(1), w["attn.out_proj.weight"], w["attn.out_proj.bias"]))
    return F.layer_norm(torch.stack(made), (HIDDEN,), w["ln_post.weight"], w["ln_post.bias"], 1e-6)


def mlp(parts: Parts, rows: Tensor) -> Tensor:
    w = {n.removeprefix("mm_projector.projection."): v for n, v in parts.weights.items() if "projection" in n}
    return F.linear(F.gelu(F.linear(rows, w["0.weight"], w["0.bias"])), w["2.weight"], w["2.bias"])


def image_rows(parts: Parts, pixels: Tensor, grid: tuple[int, int], text: Tensor) -> Tensor:
    """The rows of one image: pixels [1 + tiles, 3, H, W] of its overview and tiles, grid (rows, columns) of tiles, text
    [tokens, width] the embeddings that the router reads."""
    config = parts.config
    features = parts.clip(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    first = mlp(parts, features[0])
    if len(features[0]) == 576:
        second = mlp(parts, resampled(parts, "mm_projector.attn.", features[:1])[0])
        gates = (features[0] @ parts.weights["mm_projector.w_gate"]).softmax(-1)
        gates = gates / (gates.sum(-1, keepdim=True) + 1e-6)
        both = first * gates[:, :1] + second * gates[:, 1:]
        first = (first, second, both)[config["mm_learnable_gated"]]
    if config["use_global_only"]:
        return first
    local = mlp(parts, resampled(parts, "sampler.post_qformer.", features[1:]))
    if config["mm_patch_merge_type"] == "spatial":
        local = local.view(*grid, GRID, GRID, -1).permute(0, 2, 1, 3, 4)
    local = local.reshape(-1, local.shape[-1])
    local = local[kept(local, text, config["mm_resampler_topp"], config["mm_resampler_temp"])]
    if config["use_local_only"]:
        return local
    separator = parts.llama.get_input_embeddings()(torch.tensor([config["seperator"]]))
    return torch.cat([first, separator, local])


@torch.no_grad()
def kept(rows: Tensor, text: Tensor, top_p: float, temperature: float) -> Tensor:
    """TextGuidedSampler's rows in evaluation mode."""
    similar = F.cosine_similarity(rows[:, None], text[None], dim=-1).sum(-1)
    ordered, order = (similar / temperature).softmax(0).sort(descending=True)
    most = int((ordered.cumsum(0) <= top_p).sum()) if top_p < 1 else len(rows)
    return order[: most + 1].sort().values


def reference(
    model, parts: Parts, prompt: str, pictures: list, unread: Tensor | None = None, answer: Sequence[int] = ()
) -> Tensor:
    """Logits [rows, vocabulary] of a prompt and an answer's tokens. unread: bool of the prompt's tokens that the router
    does not read; it reads no answer."""
    words, embed = model.tokenizer, parts.llama.get_input_embeddings()
    values = [getattr(model.config.vision, name) for name in ("image_mean", "image_std")]
    mean, std = (torch.tensor(value)[:, None, None] for value in values)
    chunks = [
        torch.tensor(words(chunk, add_special_tokens=not n)["input_ids"], dtype=torch.long)
        for n, chunk in enumerate(prompt.split("<image>"))
    ]
    every = torch.cat(chunks)
    text = embed(every if unread is None else every[~unread]).detach()
    tile, made = model.config.vision.image_size, []
    for number, ids in enumerate(chunks):
        made.append(embed(ids))
        if number < len(pictures):
            tiles, grid = cut(Image.fromarray(pictures[number]), tile)
            pixels = torch.stack([(torch.tensor(each).permute(2, 0, 1) / 255 - mean) / std for each in tiles])
            made.append(image_rows(parts, pixels, grid, text))
    made.append(embed(torch.tensor(answer, dtype=torch.long)))
    return parts.llama(inputs_embeds=torch.cat(made)[None]).logits[0]


def cut(image: Image.Image, tile: int) -> tuple[list, tuple[int, int]]:
    """process_anyres_image: the overview and the tiles as uint8 arrays, and the (rows, columns) of the latter."""
    import numpy as np

    from llava_fast.inputs.tiling.canvas import canvas_of

    height, width = canvas_of(image.height, image.width, tile, 6)  # against 400 sizes in test_canvas_tiling
    scale = width / image.width, height / image.height
    if scale[0] < scale[1]:
        size = width, min(-int(-(image.height * scale[0]) // 1), height)
    else:
        size = min(-int(-(image.width * scale[1]) // 1), width), height
    canvas = Image.new("RGB", (width, height))
    canvas.paste(image.resize(size), ((width - size[0]) // 2, (height - size[1]) // 2))
    tiles = [image.resize((tile, tile))]
    tiles += [canvas.crop((x, y, x + tile, y + tile)) for y in range(0, height, tile) for x in range(0, width, tile)]
    return [np.asarray(each).copy() for each in tiles], (height // tile, width // tile)
