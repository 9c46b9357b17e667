"""Train the digits demo model from nothing: the tower first, then the whole LLaVA on questions and answers.

python examples/digits/train.py OUT_DIR
python examples/digits/train.py OUT_DIR --more    # another round from where OUT_DIR is

Minutes are of processor time: on two otherwise idle cores half as many pass on the clock. OUT_DIR is a Hugging Face
llava_next directory that both llava_fast and transformers load. Training and held-out digits never share a scan.
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
from tower import guard_positions, initialise, train_tower
from tqdm import tqdm

import llava_fast
from llava_fast.demo import KINDS, answer, ask, compose, split_scans

LEARNING_RATE = 1e-3
MORE_RATE = 0.8  # of the learning rate, when a trained model goes on
TOWER_RATE = 0.2  # of the learning rate
PROJECTED_SCALE = 0.2  # of the projector's last layer at the start
TOWER_FROZEN = 0.7  # share of the run in which the tower stays as stage 0 left it
GROWING = 0.12  # share of the run over which canvases grow from one digit to five
CANVASES = 12  # a step
QUESTIONS = 3  # a canvas; 2 when a trained model goes on
COUNT_SHARES = (0.04, 0.08, 0.12, 0.2, 0.26, 0.3)  # of canvases with 0 to 5 digits once they have grown: order is hard


def main(
    output: Annotated[Path, typer.Argument(help="The directory to write; an existing model there is replaced.")],
    tower_minutes: Annotated[float, typer.Option(help="Processor minutes for the tower; 0 takes OUT_DIR's.")] = 15.0,
    minutes: Annotated[float, typer.Option(help="Processor minutes for the whole model.")] = 40.0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    more: Annotated[
        bool, typer.Option("--more", help="Go on from OUT_DIR at full difficulty and a lower rate.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of weights and canvases.")] = 0,
) -> None:
    """Train the digits demo model and write it to OUTPUT, every few minutes and at the end."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    tower_minutes = 0.0 if more else tower_minutes
    scans, _ = split_scans()
    if tower_minutes:
        make_model(output, seed)
    model = llava_fast.load(output, device="cpu")
    if tower_minutes:
        initialise(model.vision_tower, torch.Generator().manual_seed(seed))
        train_tower(model.vision_tower, model.config.geometry, scans, tower_minutes)
        # What the tower says starts near the scale of text embeddings, and the decoder learns from it sooner.
        for parameter in model.projector.layers[-1].parameters():
            parameter.data *= PROJECTED_SCALE
        llava_fast.save(model, output, overwrite=True)
    train(model, scans, minutes, seed, output, more)
    llava_fast.save(model.eval(), output, overwrite=True)


def train(model, scans: np.ndarray, minutes: float, seed: int, save_to: Path, more: bool) -> None:
    """An ordinary loop over `model(batch)`: AdamW, warm-up and cosine, the tower thawed towards the end. With
    `more` canvases are full from the start."""
    rng = np.random.default_rng(seed + 1)
    peak = LEARNING_RATE * (MORE_RATE if more else 1)
    model.train()
    guard_positions(model.vision_tower)
    inside = {id(p) for p in model.vision_tower.parameters()}
    tower = [p for p in model.vision_tower.parameters() if p.requires_grad]
    rest = [p for p in model.parameters() if id(p) not in inside]
    groups = [
        {"params": [p for p in rest if p.dim() > 1], "weight_decay": 0.05, "rate": peak},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0, "rate": peak},
        {"params": tower, "weight_decay": 0.01, "rate": peak * TOWER_RATE},
    ]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98), fused=True)
    losses: list[float] = []
    right: list[float] = []
    start, step, saved = time.process_time(), 0, 0.0
    with tqdm(total=100, desc="model", unit="%", bar_format="{l_bar}{bar}| {elapsed}{postfix}") as bar:
        while (done := (time.process_time() - start) / (60 * minutes)) < 1:
            for p in tower:
                p.requires_grad_(done > TOWER_FROZEN)
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * min(1, (step + 1) / 100) * (0.51 + 0.49 * math.cos(math.pi * done))
            batch = model.prepare(
                [example(rng, scans, *((1.0, 2) if more else (done / GROWING, QUESTIONS))) for _ in range(CANVASES)],
                labels=True,
            )
            out = model(batch)
            out.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(out.loss.item())
            right.append((out.logits.argmax(-1) == batch.column("supervised_target")).float().mean().item())
            step += 1
            bar.n = round(100 * done)
            bar.set_postfix(
                step=step, loss=f"{np.mean(losses[-200:]):.3f}", tokens_right=f"{np.mean(right[-200:]):.3f}"
            )
            if done - saved > 0.1:
                llava_fast.save(model, save_to, overwrite=True)
                saved = done


def example(rng: np.random.Generator, scans: np.ndarray, grown: float, questions: int) -> dict:
    """A canvas and several questions about it, as one conversation. `grown` below 1 limits the number of digits."""
    if grown < 1:
        count = int(rng.integers(1, 2 + round(4 * grown)))
    else:
        count = int(rng.choice(len(COUNT_SHARES), p=COUNT_SHARES))
    canvas = compose(rng, scans, count)
    others = [kind for kind in KINDS if kind != "read"]
    kinds = ["read", *rng.permutation(others)[: questions - 1]]
    rng.shuffle(kinds)
    messages = []
    for number, kind in enumerate(kinds):
        text = {"type": "text", "text": ask(rng, kind)}
        messages.append({"role": "user", "content": [text] if number else [{"type": "image"}, text]})
        messages.append({"role": "assistant", "content": answer(kind, canvas.digits)})
    return {"messages": messages, "images": [canvas.image]}


if __name__ == "__main__":
    typer.run(main)
