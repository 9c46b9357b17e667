"""Stage 0: teach the tiny tower digits, as CLIP's tower knows the world before LLaVA begins.

    python examples/digits/tower.py OUT_DIR

OUT_DIR is a whole model, for stage 1 to start from: a tower that knows digits, and a projector and a decoder with
random weights. Each patch of a tile is classified by a linear head that is thrown away: which digit's ink box holds its
centre, or none. Dense labels teach a tower from scratch far sooner than answers do. Ink starts white on black and takes
its full variety of colours, contrasts and backgrounds over the first part of the run.
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
POSITION_SCALE = 3.0  # of the code, so that it stays visible beside what the pixels say
SHARPNESS = 12.0  # of attention at the start
NEIGHBOURS = [(dx, dy) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dx, dy) != (0, 0)]
PROJECTED_SCALE = 0.2  # of the projector's last layer: what it says starts near the scale of text embeddings
PLAIN_UNTIL = 0.4  # share of the run over which plain white-on-black canvases give way to all kinds


def main(
    output: Annotated[Path, typer.Argument(help="The directory to write.")],
    minutes: Annotated[
        float, typer.Option(help="Processor minutes; on two idle cores half as long by the clock.")
    ] = 15,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed of the weights.")] = 0,
) -> None:
    """Make the untrained demo model, train its tower, and write both as a checkpoint to OUTPUT."""
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
    """Weights that make each attention layer begin as a 3x3 convolution, which a tower from scratch learns from many
    times sooner (Cordonnier et al. 2020; Zheng et al. 2024, structured initialisation).

    The first head_dim channels hold the position as sines and cosines, and nothing else is written there. Queries and
    keys read only those; a query turns them by one patch, so that each of eight heads looks at another neighbour.
    Patch filters see brightness alone.
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
    """Keep what `initialise` set up: queries and keys stay, and no gradient reaches the position channels."""
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
    """Train for so many minutes of processor time; returns the last steps' accuracy on patches with ink."""
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
    """(uint8 tiles [tiles, 3, T, T], labels [tiles, patches]) of a few canvases; tiles without ink are left out."""
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
    """int64 [tiles, patches]: the digit in whose ink box each patch's centre lies, or NO_DIGIT."""
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
    """[side * side, 16]: sine and cosine of x and of y at four frequencies, which tell neighbours well apart."""
    y, x = torch.meshgrid(torch.arange(side).float(), torch.arange(side).float(), indexing="ij")
    angles = [axis.flatten()[:, None] * torch.tensor(FREQUENCIES) for axis in (x, y)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)


def _shift(dx: int, dy: int) -> Tensor:
    """[16, 16]: turns the code of (x, y) into that of (x + dx, y + dy)."""
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
