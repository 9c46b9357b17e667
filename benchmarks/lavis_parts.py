"""The visual paths of InternLM-XComposer 1 and LLaMA-VID, from tiles to the decoder's inputs, beside their published
steps: time and peak memory, in one process, in turns.

    python -m benchmarks.lavis_parts --layers 4 --output-json out.json

Widths are the published ones, EVA's tower has fewer layers, and weights are random and shared. The published steps run
in transformers' modules of BLIP-2 and InstructBLIP on normalised pixels; ours start from uint8 tiles. No figure is
printed unless both give the same rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2VisionConfig, InstructBlipQFormerConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel, Blip2VisionModel
from transformers.models.instructblip.modeling_instructblip import InstructBlipQFormerModel

from benchmarks import machine
from benchmarks.memory import peak_beside_gradients
from benchmarks.timing import Timed, time_in_turns
from llava_fast.families import read_config
from llava_fast.inputs.plan.plan import VisualPiece, build_plan
from llava_fast.inputs.prepared import Prepared
from llava_fast.inputs.tiling.anyres import image_rows
from llava_fast.models.batch import Batch
from llava_fast.models.vlm import LlavaModel

TEXT = {"hidden_size": 4096, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 32}
TEXT |= {"vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu"}
XCOMPOSER = {"model_type": "InternLMXComposer", "num_query_token": 64, **TEXT}
LLAMA_VID = {
    "model_type": "llava",
    "bert_type": "qformer_pretrain",
    "mm_vision_tower": "eva_vit_g.pth",
    "mm_projector_type": "mlp2x_gelu",
    "image_aspect_ratio": "pad",
    "tie_word_embeddings": False,
    **TEXT,
}
CASES: dict[str, tuple[dict, int]] = {
    "xcomposer, 4 images": (XCOMPOSER, 4),
    "llama-vid, 1 image": (LLAMA_VID, 1),
    "llama-vid, 8 frames": (LLAMA_VID | {"compress_type": "mean"}, 8),
}
"""config.json and the number of tiles."""
QUESTION = 16  # tokens


def build(source: dict, layers: int) -> LlavaModel:
    """A model with random weights; the keys have no bias in the tower."""
    with tempfile.TemporaryDirectory() as folder:
        tower = {"num_hidden_layers": layers}
        (Path(folder) / "config.json").write_text(json.dumps(source | {"vision_config": tower}))
        config, _ = read_config(Path(folder))
    torch.manual_seed(0)
    model = LlavaModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("class_embedding", "position_embedding", "_bias", "start", "end")):
                parameter.normal_(0, 0.02)
    return model


def tower_of(model: LlavaModel) -> nn.Module:
    """transformers' tower with the model's weights."""
    vision: Any = model.config.vision
    made = Blip2VisionModel(Blip2VisionConfig(num_hidden_layers=vision.num_layers, image_size=vision.image_size))
    weights = dict(model.vision_tower.state_dict())
    for name in [name for name in weights if name.endswith("q_bias")]:
        query, value = weights.pop(name), weights.pop(name.replace("q_bias", "v_bias"))
        weights[name.replace("q_bias", "qkv.bias")] = torch.cat([query, torch.zeros_like(query), value])
    made.load_state_dict(weights, strict=vision.final_norm_eps is not None)
    if vision.final_norm_eps is None:
        made.post_layernorm = nn.Identity()
    else:
        made.post_layernorm.eps = vision.final_norm_eps
    return made.eval()


def published(model: LlavaModel) -> Callable[[Tensor, Tensor], Tensor]:
    """(normalised pixels, the question's ids) -> rows [tiles * M, width]."""
    tower, connector = tower_of(model), model.projector
    own = connector.qformer if hasattr(connector, "qformer") else connector
    kind: Any = Blip2QFormerModel
    sizes: Any = Blip2QFormerConfig()
    if hasattr(connector, "qformer"):
        kind, sizes = InstructBlipQFormerModel, InstructBlipQFormerConfig(vocab_size=own.config.vocabulary)
    qformer = kind(sizes).eval()
    rest = ("query_tokens", "language_projection.", "start", "end")
    weights = {name: value for name, value in own.state_dict().items() if not name.startswith(rest)}
    missing = [
        name for name in qformer.load_state_dict(weights, strict=False).missing_keys if "position_ids" not in name
    ]
    assert not missing, missing

    def composer(pixels: Tensor, _: Tensor) -> Tensor:
        queries = own.query_tokens.expand(len(pixels), -1, -1)
        made = own.language_projection(qformer(query_embeds=queries, encoder_hidden_states=tower(pixels)[0])[0])
        ends = (each.expand(len(made), -1, -1) for each in (connector.start, connector.end))
        return torch.cat([next(ends), made, next(ends)], dim=1).flatten(0, 1)

    def vid(pixels: Tensor, ids: Tensor) -> Tensor:
        config: Any = connector.config
        whole, queries = tower(pixels)[0], own.query_tokens.expand(len(pixels), -1, -1)
        mask = torch.ones(len(pixels), queries.shape[1] + ids.shape[1])
        given = {"query_embeds": queries, "encoder_hidden_states": connector.norm(whole)}
        seen = qformer(ids, mask, **given)[0][:, : queries.shape[1]]
        patches, asks = whole[:, 1:], own.language_projection(seen)
        scores = asks @ connector.key(patches).transpose(1, 2) / whole.shape[-1] ** 0.5
        context = connector.value((scores.softmax(-1) @ patches).mean(1, keepdim=True))
        content = connector.content(patches.mean(1, keepdim=True) if config.grid == 1 else patches)
        return torch.cat([context, content], dim=1).flatten(0, 1)

    return vid if hasattr(connector, "qformer") else composer


def sides(model: LlavaModel, tiles: int) -> dict[str, Callable[[int], Tensor]]:
    rng, geometry = np.random.default_rng(0), model.config.geometry
    side, reads = geometry.tile_size, model.config.projector.reads_text
    pixels = rng.integers(0, 256, (tiles, 3, side, side), dtype=np.uint8)
    ids = rng.integers(1000, 30000, QUESTION).astype(np.int32)
    rows = image_rows(geometry, side, side)
    pieces = [VisualPiece(rows, instruction=ids if reads else None) for _ in range(tiles)]
    batch = Batch.from_prepared(Prepared(pixels, build_plan([list(pieces)], geometry.tower_rows_per_tile)))
    mean, std = (torch.tensor(each)[:, None, None] for each in model.config.vision.normalisation)
    normalised, reference = (batch.tiles / 255 - mean) / std, published(model)
    question = torch.from_numpy(ids).long().expand(tiles, -1)
    return {
        "llava_fast": lambda _: model.inputs_embeds(batch),
        "published steps": lambda _: reference(normalised, question),
    }


@torch.inference_mode()
def measure(name: str, layers: int, iters: int, warmup: float = 1.0) -> list[dict]:
    source, tiles = CASES[name]
    model = build(source, layers)
    found, results, peaks = sides(model, tiles), {}, {}
    for side, run in found.items():
        results[side] = run(0)
        peaks[side] = peak_beside_gradients(functools.partial(run, 0), [])
    ours, theirs = results.values()
    error = float((ours - theirs).abs().max() / theirs.abs().max()) if ours.shape == theirs.shape else float("inf")
    if error > 1e-4:
        raise SystemExit(f"{name}: the results differ by {error:.1e}: there is nothing to compare")
    times = time_in_turns([Timed(run) for run in found.values()], iters, warmup, torch.device("cpu"))
    about = {"case": name, "tower_layers": layers, "tiles": tiles, "rows": len(ours), "error": error}
    return [
        {"side": side, **about, **dataclasses.asdict(time), "peak_tensor_bytes": peaks[side]}
        for side, time in zip(found, times, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="of the tower; 39 in the published models")
    parser.add_argument("--iters", type=int, default=5)
    parser.add_argument("--output-json", type=Path)
    chosen = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    about = {"machine": machine.describe("cpu", 1), "versions": machine.versions(), "commit": machine.commit()}
    rows = [row for name in CASES for row in measure(name, chosen.layers, chosen.iters)]
    for row in rows:
        print(row)
    if chosen.output_json:
        made = {"schema": "llava_fast-lavis_parts/1", **about, "rows": rows}
        chosen.output_json.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
