"""Stage 0: pretrain the tiny vision tower on digits. LLaVA likewise starts from a pretrained CLIP tower.

    python examples/digits/tower.py OUT_DIR

OUT_DIR is a complete model, from which stage 1 starts: the trained tower, and a projector and a decoder with random
weights. A linear head, discarded afterwards, classifies each patch of a tile: the digit whose bounding box contains its
centre, or none. Such dense labels train a tower from scratch much faster than answers do. Ink is white on black at
first. The variety of colours, contrasts and backgrounds grows over the first part of the run.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from make_model import make_model
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import llava_fast
from llava_fast.demo import compose, split_scans
from llava_fast.inputs.pictures.tiles import make_tiles
from llava_fast.inputs.pictures.view import View
from llava_fast.inputs.tiling.anyres import VisualGeometry, image_views
from llava_fast.models.towers.vit import VisionTower

NO_DIGIT = 10
CANVASES = 8  # a step
LEARNING_RATE = 2e-3
FREQUENCIES = (0.8, 1.6, 2.4, 3.0)  # radians a patch
POSITION_SCALE = 3.0  # of the position code, relative to the pixel features
SHARPNESS = 12.0  # of attention at initialisation
NEIGHBOURS = [(dx, dy) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dx, dy) != (0, 0)]
PROJECTED_SCALE = 0.2  # of the projector's last layer, so that its output has the scale of text embeddings
PLAIN_UNTIL = 0.4  # share of the run in which white-on-black canvases are gradually replaced


def main(
    output: Annotated[Path, typer.Argument(help="The directory to write.")],
    minutes: Annotated[
        float, typer.Option(help="Processor minutes; on two idle cores half as long by the clock.")
    ] = 15,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed of the weights.")] = 0,
) -> None:
    """Create the untrained demo model, train its tower, and write the model to OUTPUT."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    make_model(output, seed)
    model = llava_fast.load(output, device="cpu")
    initialise(model.vision_tower, torch.Generator().manual_seed(seed))
    accuracy = train_tower(model.vision_tower, model.config.geometry, split_scans()[0], minutes)
    for parameter in model.projector.layers[-1].parameters():
        parameter.data *= PROJECTED_SCALE
    llava_fast.save(model, output, overwrite=True)
    print(f"{accuracy:.1%} of the patches with ink were named; the model for stage 1 is in {output}")


def initialise(tower: VisionTower, generator: torch.Generator) -> None:
    """Initialise each attention layer as a 3x3 convolution, which speeds up training from scratch many times
    (Cordonnier et al. 2020; Zheng et al. 2024, structured initialisation).

    The first head_dim channels contain the position as sines and cosines and nothing else. Queries and keys read only
    these channels. A query rotates them by one patch, so that each of eight heads attends to another neighbour. Patch
    filters see only brightness.
    """
    config = tower.config
    width, heads, side = config.hidden_size, config.num_heads, config.image_size // config.patch_size
    reserved = width // heads
    with torch.no_grad():
        embeddings = tower.embeddings
        embeddings.position_embedding.weight.zero_()
        embeddings.position_embedding.weight[1:, :reserved] = POSITION_SCALE * _position_code(side)
        embeddings.class_embedding.normal_(0, 0.02, generator=generator)
        embeddings.class_embedding[:reserved] = 0
        filters = torch.randn(width - reserved, 1, config.patch_size, config.patch_size, generator=generator)
        embeddings.patch_embedding.weight[:reserved] = 0
        embeddings.patch_embedding.weight[reserved:] = 2 * filters / (3 * config.patch_size)
        for layer in tower.encoder.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for linear, gain in ((attention.v_proj, 1), (attention.out_proj, 0.5), (mlp.fc1, 1), (mlp.fc2, 0.5)):
                linear.weight.normal_(0, gain * linear.in_features**-0.5, generator=generator)
                linear.bias.zero_()
            for linear in (attention.out_proj, mlp.fc2):
                linear.weight[:reserved] = 0
            scale = (SHARPNESS * reserved**0.5) ** 0.5
            for linear in (attention.q_proj, attention.k_proj):
                linear.weight.zero_()
                linear.bias.zero_()
            for head in range(heads):
                rows = slice(head * reserved, (head + 1) * reserved)
                attention.q_proj.weight[rows, :reserved] = scale * _shift(*NEIGHBOURS[head % 8])
                attention.k_proj.weight[rows, :reserved] = scale * torch.eye(reserved)


def guard_positions(tower: VisionTower) -> None:
    """Freeze the structure of `initialise`: queries, keys and the position channels are not trained."""
    reserved = tower.config.hidden_size // tower.config.num_heads
    embeddings = tower.embeddings
    leading = [embeddings.patch_embedding.weight, embeddings.class_embedding, *tower.pre_layrnorm.parameters()]
    for layer in tower.encoder.layers:
        layer.self_attn.q_proj.requires_grad_(False)
        layer.self_attn.k_proj.requires_grad_(False)
        leading += [
            *layer.self_attn.out_proj.parameters(),
            *layer.mlp.fc2.parameters(),
            *layer.layer_norm1.parameters(),
        ]
    for parameter in leading:
        parameter.register_hook(lambda grad: torch.cat([torch.zeros_like(grad[:reserved]), grad[reserved:]]))
    embeddings.position_embedding.weight.register_hook(
        lambda grad: torch.cat([torch.zeros_like(grad[:, :reserved]), grad[:, reserved:]], dim=1)
    )


def train_tower(tower: VisionTower, geometry: VisualGeometry, scans: np.ndarray, minutes: float) -> float:
    """Train for `minutes` of processor time. Returns the last steps' accuracy on patches with ink."""
    rng = np.random.default_rng(0)
    head = nn.Linear(tower.config.feature_size, NO_DIGIT + 1)
    guard_positions(tower)
    parameters = [p for p in (*tower.parameters(), *head.parameters()) if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98), fused=True)
    accuracy: list[float] = []
    start, step = time.process_time(), 0
    with tqdm(total=100, desc="tower", unit="%", bar_format="{l_bar}{bar}| {elapsed}{postfix}") as bar:
        while (done := (time.process_time() - start) / (60 * minutes)) < 1:
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * min(1, (step + 1) / 50) * (0.51 + 0.49 * math.cos(math.pi * done))
            tiles, labels = dense_batch(rng, geometry, scans, plain=max(0.0, 1 - done / PLAIN_UNTIL))
            logits = head(tower(tiles)[:, geometry.dropped_rows :])
            ink = labels != NO_DIGIT
            loss = 0.7 * F.cross_entropy(logits[ink], labels[ink]) + 0.3 * F.cross_entropy(logits[~ink], labels[~ink])
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            accuracy.append((logits.argmax(-1) == labels)[ink].float().mean().item())
            step += 1
            bar.n = round(100 * done)
            bar.set_postfix(step=step, ink_accuracy=f"{np.mean(accuracy[-200:]):.3f}")
    return float(np.mean(accuracy[-200:]))


def dense_batch(
    rng: np.random.Generator,
    geometry: VisualGeometry,
    scans: np.ndarray,
    plain: float,
) -> tuple[Tensor, Tensor]:
    """Return (uint8 tiles [tiles, 3, T, T], labels [tiles, patches]) of a few canvases, without tiles that have no
    ink."""
    tiles, labels = [], []
    for _ in range(CANVASES):
        canvas = compose(rng, scans, plain=bool(rng.random() < plain))
        height, width = canvas.image.shape[:2]
        views = image_views(geometry, height, width)
        cut = make_tiles(canvas.image, views, geometry.tile_size, threads=1)
        marks = np.concatenate([_patch_labels(canvas, view, geometry) for view in views])
        has_ink = (marks != NO_DIGIT).any(1)
        tiles.append(cut[has_ink])
        labels.append(marks[has_ink])
    return torch.from_numpy(np.concatenate(tiles)), torch.from_numpy(np.concatenate(labels))


def _patch_labels(canvas, view: View, geometry: VisualGeometry) -> np.ndarray:
    """Return int64 [tiles, patches]: the digit whose bounding box contains the patch centre, or NO_DIGIT."""
    patch, side = geometry.patch_size, geometry.side
    scale_y, scale_x = view.size[0] / canvas.image.shape[0], view.size[1] / canvas.image.shape[1]
    rows, columns = view.canvas[0] // patch, view.canvas[1] // patch
    y, x = (np.arange(rows) + 0.5) * patch, (np.arange(columns) + 0.5) * patch
    marks = np.full((rows, columns), NO_DIGIT, np.int64)
    for digit, (left, top, right, bottom) in zip(canvas.digits, canvas.boxes, strict=True):
        inside_y = (y >= top * scale_y + view.offset[0]) & (y < bottom * scale_y + view.offset[0])
        inside_x = (x >= left * scale_x + view.offset[1]) & (x < right * scale_x + view.offset[1])
        marks[np.ix_(inside_y, inside_x)] = digit
    return marks.reshape(rows // side, side, columns // side, side).transpose(0, 2, 1, 3).reshape(-1, side * side)


def _position_code(side: int) -> Tensor:
    """Return [side * side, 16]: sine and cosine of x and of y at four frequencies."""
    y, x = torch.meshgrid(torch.arange(side).float(), torch.arange(side).float(), indexing="ij")
    angles = [axis.flatten()[:, None] * torch.tensor(FREQUENCIES) for axis in (x, y)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)


def _shift(dx: int, dy: int) -> Tensor:
    """Return [16, 16]: the rotation from the code of (x, y) to that of (x + dx, y + dy)."""
    number = len(FREQUENCIES)
    turn = torch.zeros(4 * number, 4 * number)
    for axis, step in enumerate((dx, dy)):
        for i, frequency in enumerate(FREQUENCIES):
            sine, cosine = 2 * number * axis + i, 2 * number * axis + number + i
            turn[sine, sine] = turn[cosine, cosine] = math.cos(frequency * step)
            turn[sine, cosine] = math.sin(frequency * step)
            turn[cosine, sine] = -math.sin(frequency * step)
    return turn


if __name__ == "__main__":
    typer.run(main)
