"""SliME's path from tiles to the decoder's inputs beside its published steps: time and peak memory, in one process, in
turns.

    python -m benchmarks.slime --layers 4 --output-json out.json

The tower is transformers' CLIP-L/336 with fewer layers, random weights, which both sides share. The reference does what
yfzhang114/SliME 5c89ec9 does: every layer of the tower, attention with its weights, all pairs of rows and text tokens
for the router.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from benchmarks import published_steps
from llava_fast.families.known_towers import KNOWN_TOWERS
from llava_fast.inputs.plan.plan import TextPiece, VisualPiece, build_plan
from llava_fast.inputs.prepared import Prepared
from llava_fast.inputs.tiling.anyres import VisualGeometry, image_rows
from llava_fast.inputs.tiling.canvas import CanvasTiling, canvas_of
from llava_fast.models.batch import Batch
from llava_fast.models.config import LlavaConfig
from llava_fast.models.connectors.overview_mixture import OverviewMixtureConfig
from llava_fast.models.connectors.perceiver import Perceiver
from llava_fast.models.decoders.llama import LlamaConfig
from llava_fast.models.router import RouterConfig
from llava_fast.models.towers.base import TowerConfig
from llava_fast.models.vlm import LlavaModel

SEPARATOR, TOP_P = 1919, 0.95


def clip_tower(layers: int, width: int) -> tuple[CLIPVisionModel, TowerConfig, dict[str, int]]:
    """transformers' tower with random weights, its config here, and that of a decoder of this width."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "image_size": 336}
    clip = CLIPVisionModel(CLIPVisionConfig(**sizes, patch_size=14, num_hidden_layers=layers)).eval()
    text = {"vocab_size": 32000, "hidden_size": width, "intermediate_size": 64, "num_hidden_layers": 1}
    text |= {"num_attention_heads": width // 128, "num_key_value_heads": width // 128}
    return clip, dataclasses.replace(KNOWN_TOWERS["openai/clip-vit-large-patch14-336"], num_layers=layers), text


def build(layers: int, width: int) -> tuple[LlavaModel, CLIPVisionModel]:
    """Ours, and transformers' tower with the same weights."""
    clip, vision, text = clip_tower(layers, width)
    decoder = LlamaConfig.from_hf(transformers.LlamaConfig(**text), tied=False)
    tiling = CanvasTiling(12, routed=True, separator=(SEPARATOR,))
    config = LlavaConfig(
        vision=vision,
        projector=OverviewMixtureConfig(1024, width, 8, 12, 24),
        geometry=VisualGeometry(336, 14, compat="llava", tiling=tiling),
        router=RouterConfig(TOP_P),
        decoder=decoder,
        layout="original",
        model_type="slime",
        image_token_id=-200,
    )
    model = LlavaModel(config).eval()
    weights = {name.removeprefix("vision_model."): value for name, value in clip.state_dict().items()}
    model.vision_tower.load_state_dict({name: weights[name] for name in model.vision_tower.state_dict()})
    torch.nn.init.normal_(model.projector.gate, std=0.1)  # type: ignore[arg-type]
    return model, clip


def resampled(module: Perceiver, rows_TNC: Tensor) -> Tensor:
    side, grid = round(rows_TNC.shape[1] ** 0.5), module.config.grid
    table = module.pos_embed.view(1, grid, grid, -1).permute(0, 3, 1, 2)
    at = F.interpolate(table, size=(side, side), mode="bicubic", align_corners=False)[0].flatten(1).T
    value = module.ln_kv(rows_TNC)
    query = (module.ln_q(module.query) + module.pos_embed).repeat(len(value), 1, 1)
    return module.ln_post(module.attn(query, value + at, value)[0])


def published(model: LlavaModel, clip: CLIPVisionModel, pixels: Tensor, text: Tensor, grid: tuple[int, int]) -> Tensor:
    """The rows of one image."""
    connector: Any = model.projector
    features = clip(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    overview, local = features[0], resampled(connector.compressor, features[1:])
    experts = [connector.mlp(overview), connector.mlp(resampled(connector.expert, overview[None])[0])]
    gates = (overview @ connector.gate).softmax(-1)
    gates = gates / (gates.sum(-1, keepdim=True) + 1e-6)
    first = (torch.stack(experts, -1) @ gates[..., None])[..., 0]
    local = connector.mlp(local).view(*grid, 12, 12, -1).permute(0, 2, 1, 3, 4).flatten(0, 3)
    similar = F.cosine_similarity(local[:, None], text[None], dim=-1).sum(-1)
    ordered, order = similar.softmax(0).sort(descending=True)
    kept = order[: int((ordered.cumsum(0) <= TOP_P).sum()) + 1].sort().values
    separator = model.decoder.embed_tokens(torch.tensor([SEPARATOR]))
    return torch.cat([first, separator, local[kept]])


def sides(model: LlavaModel, clip: CLIPVisionModel, size: tuple[int, int], tokens: int) -> dict[str, Callable]:
    rng = np.random.default_rng(0)
    rows = image_rows(model.config.geometry, size[1], size[0])
    tiles = rng.integers(0, 256, (rows.tiles, 3, 336, 336), dtype=np.uint8)
    ids = rng.integers(0, 32000, tokens).astype(np.int32)
    plan = build_plan([[VisualPiece(rows, instruction=ids), TextPiece(ids)]], model.config.geometry.tower_rows_per_tile)
    batch = Batch.from_prepared(Prepared(tiles, plan))
    mean, std = (torch.tensor(each)[:, None, None] for each in model.config.vision.normalisation)
    pixels = (batch.tiles / 255 - mean) / std
    canvas = canvas_of(size[1], size[0], 336, 6)

    def reference(_: int) -> Tensor:
        text = model.decoder.embed_tokens(torch.from_numpy(ids).long())
        return torch.cat([published(model, clip, pixels, text, (canvas[0] // 336, canvas[1] // 336)), text])

    return {"llava_fast": lambda _: model.routed(batch).embeds, "published steps": reference}


def measure(layers: int, width: int, size: tuple[int, int], tokens: int, iters: int, warmup: float) -> list[dict]:
    about = {"picture": f"{size[0]}x{size[1]}", "layers": layers, "width": width, "text_tokens": tokens}
    return published_steps.compare(sides(*build(layers, width), size, tokens), iters, warmup, about)


if __name__ == "__main__":
    published_steps.main(__doc__, "llava_fast-slime/1", measure)
