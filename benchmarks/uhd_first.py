"""The path of LLaVA-UHD's first release from tiles to the decoder's inputs beside its steps: time and peak memory.

    python -m benchmarks.uhd_first --layers 4 --output-json out.json

The tower is transformers' CLIP-L/336 with fewer layers, random weights, which both sides share. The reference runs
every slice through the tower and the resampler by itself, at its own size: what the published code pads to 576 rows,
and the model attends to, is left out on both sides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPVisionModel

from benchmarks import published_steps
from benchmarks.slime import clip_tower
from llava_fast.inputs.plan.plan import TextPiece, VisualPiece, build_plan
from llava_fast.inputs.prepared import Prepared
from llava_fast.inputs.tiling.anyres import VisualGeometry, image_rows
from llava_fast.inputs.tiling.slices import FirstSliceTiling
from llava_fast.models.batch import Batch
from llava_fast.models.config import LlavaConfig
from llava_fast.models.connectors.perceiver import SlicePerceiverConfig
from llava_fast.models.decoders.llama import LlamaConfig
from llava_fast.models.towers.clip_slices import ClipSlicesConfig
from llava_fast.models.vlm import LlavaModel

PATCH = 14


def build(layers: int, width: int) -> tuple[LlavaModel, CLIPVisionModel]:
    """Ours, and transformers' tower with the same weights."""
    clip, plain, text = clip_tower(layers, width)
    tiling = FirstSliceTiling(336, 64, between=(), after=())
    config = LlavaConfig(
        vision=ClipSlicesConfig.of(plain),
        projector=SlicePerceiverConfig(1024, width, 8, 8, 24, own_positions=True),
        geometry=VisualGeometry(PATCH, PATCH, compat="llava", tiling=tiling, filter="bilinear"),
        decoder=LlamaConfig.from_hf(transformers.LlamaConfig(**text), tied=False),
        layout="original",
        model_type="llava_uhd",
        image_token_id=-200,
    )
    model = LlavaModel(config).eval()
    weights = {name.removeprefix("vision_model."): value for name, value in clip.state_dict().items()}
    model.vision_tower.load_state_dict({name: weights[name] for name in model.vision_tower.state_dict()})
    return model, clip


def published(model: LlavaModel, clip: CLIPVisionModel, pixels: Tensor) -> Tensor:
    """The rows of one slice."""
    connector: Any = model.projector
    out = clip(pixels, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states[-2][:, 1:]
    shape = pixels.shape[2] // PATCH, pixels.shape[3] // PATCH
    table = connector.pos_embed.view(1, 8, 8, -1).permute(0, 3, 1, 2)
    at = F.interpolate(table, size=shape, mode="bicubic", align_corners=False)[0].flatten(1).T
    value = connector.ln_kv(connector.kv_proj(out))
    query = (connector.ln_q(connector.query) + connector.pos_embed)[None]
    return (connector.ln_post(connector.attn(query, value + at, value)[0]) @ connector.proj)[0]


def sides(
    model: LlavaModel, clip: CLIPVisionModel, size: tuple[int, int], tokens: int
) -> dict[str, Callable[[int], Tensor]]:
    rng = np.random.default_rng(0)
    rows = image_rows(model.config.geometry, size[1], size[0])
    tiles = rng.integers(0, 256, (rows.tiles, 3, PATCH, PATCH), dtype=np.uint8)
    ids = rng.integers(0, 32000, tokens).astype(np.int32)
    batch = Batch.from_prepared(Prepared(tiles, build_plan([[VisualPiece(rows), TextPiece(ids)]], 1)))
    mean, std = (torch.tensor(each)[:, None, None] for each in model.config.vision.normalisation)
    patches = ((batch.tiles / 255 - mean) / std).split([down * across for down, across in rows.grids])
    slices = [
        each.unflatten(0, grid).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)[None]
        for each, grid in zip(patches, rows.grids, strict=True)
    ]

    def reference(_: int) -> Tensor:
        text = model.decoder.embed_tokens(torch.from_numpy(ids).long())
        return torch.cat([*(published(model, clip, each) for each in slices), text])

    return {"llava_fast": lambda _: model.inputs_embeds(batch), "published steps": reference}


def measure(layers: int, width: int, size: tuple[int, int], tokens: int, iters: int, warmup: float) -> list[dict]:
    about = {"picture": f"{size[0]}x{size[1]}", "layers": layers, "width": width, "text_tokens": tokens}
    return published_steps.compare(sides(*build(layers, width), size, tokens), iters, warmup, about)


if __name__ == "__main__":
    published_steps.main(__doc__, "llava_fast-uhd-first/1", measure)
