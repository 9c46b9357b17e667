"""Stage 0: teach the tiny tower digits, as CLIP's tower knows the world before LLaVA begins.

Each patch of a tile is classified by a linear head that is thrown away: which digit's ink box holds its centre, or
none. Dense labels teach a tower from scratch far sooner than answers do. Ink starts white on black and takes its full
variety of colours, contrasts and backgrounds over the first part of the run.
"""

from __future__ import annotations

import math
import time

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from llava_fast.demo import compose
from llava_fast.inputs import anyres, images
from llava_fast.models.vision import VisionTower

NO_DIGIT = 10
CANVASES = 8  # a step
LEARNING_RATE = 1.5e-3
PLAIN_UNTIL = 0.4  # share of the run over which plain white-on-black canvases give way to all kinds


def initialise(tower: VisionTower, generator: torch.Generator) -> None:
    """Weights that learn sooner: brightness-only patch filters without a mean, sine positions of both axes (Beyer et
    al. 2022), keys equal to queries so that attention starts with near and alike patches (Trockman and Kolter 2023)."""
    side = tower.config.image_size // tower.config.patch_size
    with torch.no_grad():
        for name, weight in tower.named_parameters():
            if weight.dim() == 2 and "position" not in name:
                gain = 0.5 if "out_proj" in name or "fc2" in name else 1.0
                weight.normal_(0, gain * weight.shape[1] ** -0.5, generator=generator)
        patches = tower.embeddings.patch_embedding.weight
        filters = torch.randn(patches[:, :1].shape, generator=generator)
        filters -= filters.mean((2, 3), keepdim=True)
        patches.copy_((filters / (3 * patches.shape[-1])).expand_as(patches))
        tower.embeddings.position_embedding.weight[1:] = 0.5 * _sine_positions(side, tower.config.hidden_size)
        for layer in tower.encoder.layers:
            layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)


def train_tower(tower: VisionTower, geometry: anyres.VisualGeometry, scans: np.ndarray, minutes: float) -> float:
    """Train for so many minutes of processor time; returns the last steps' accuracy on patches with ink."""
    rng = np.random.default_rng(0)
    head = nn.Linear(tower.config.feature_size, NO_DIGIT + 1)
    parameters = [*tower.parameters(), *head.parameters()]
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
            logits = head(tower(tiles))
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
    geometry: anyres.VisualGeometry,
    scans: np.ndarray,
    plain: float,
) -> tuple[Tensor, Tensor]:
    """(uint8 tiles [tiles, 3, T, T], labels [tiles, patches]) of a few canvases; tiles without ink are left out."""
    tiles, labels = [], []
    for _ in range(CANVASES):
        canvas = compose(rng, scans, plain=bool(rng.random() < plain))
        height, width = canvas.image.shape[:2]
        views = anyres.image_views(geometry, height, width)
        cut = images.make_tiles(canvas.image, views, geometry.tile_size, threads=1)
        marks = np.concatenate([_patch_labels(canvas, view, geometry) for view in views])
        has_ink = (marks != NO_DIGIT).any(1)
        tiles.append(cut[has_ink])
        labels.append(marks[has_ink])
    return torch.from_numpy(np.concatenate(tiles)), torch.from_numpy(np.concatenate(labels))


def _patch_labels(canvas, view: anyres.View, geometry: anyres.VisualGeometry) -> np.ndarray:
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


def _sine_positions(side: int, width: int) -> Tensor:
    """[side * side, width]: sines and cosines of x and of y, from about 3 patches' wavelength up."""
    quarter = width // 4
    frequency = math.pi / (1.5 * side ** (torch.arange(quarter) / (quarter - 1)))
    y, x = torch.meshgrid(torch.arange(side).float(), torch.arange(side).float(), indexing="ij")
    x, y = x.flatten()[:, None] * frequency, y.flatten()[:, None] * frequency
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)
