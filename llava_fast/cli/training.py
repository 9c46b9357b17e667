"""`llava-fast train` and `llava-fast dpo`: run a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llava_fast.errors import RecipeError

RecipeFile = Annotated[Path, typer.Argument(help="A recipe: a YAML file, such as the one above.")]
Changes = Annotated[
    list[str], typer.Option("--set", "-s", help="Change a field: -s optimizer.learning_rate=1e-5; repeatable.")
]
Resume = Annotated[
    bool, typer.Option(help="Continue from the newest checkpoint in the recipe's output, if there is one.")
]


def train(
    recipe: RecipeFile,
    set_: Changes = [],  # noqa: B006
    resume: Resume = True,
) -> None:
    """Train a model on LLaVA-format data, according to a recipe. The same command resumes an interrupted run.

    \b
    model: llava-hf/llava-1.5-7b-hf
    output: runs/mine
    trainable:
      - projector
      - decoder
    data:
      sources: [{path: data.json, images: images/}]
    optimizer: {learning_rate: 2e-5}
    batch_size: 128

    One process: llava-fast train recipe.yaml. Eight GPUs: torchrun --nproc-per-node 8 -m llava_fast train recipe.yaml.
    The output has metrics.jsonl, tensorboard/, checkpoints/ and, at the end, model/.

    A section `dpo` or `kto` selects another objective than supervised fine-tuning: preference pairs (see llava-fast dpo
    --help), or answers labelled desirable or undesirable, with data lines such as

    \b
    {"id": 7, "image": "7.jpg", "prompt": "What is this?", "completion": "A dog.", "label": false}
    """
    import logging

    from llava_fast.train.recipe import load_recipe
    from llava_fast.train.run import train as run

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    loaded = load_recipe(recipe, set_)
    typer.echo(f"the trained model is in {run(loaded, resume)}")


def dpo(
    recipe: RecipeFile,
    set_: Changes = [],  # noqa: B006
    resume: Resume = True,
) -> None:
    """Train a model on preference pairs (DPO): `train` for a recipe that must have a section `dpo`.

    \b
    model: llava-hf/LLaVA-NeXT-Video-7B-hf
    output: runs/preferred
    trainable:
      - projector
      - decoder
    dpo: {beta: 0.1}
    data:
      sources: [{path: pairs.jsonl, images: frames/}]
    optimizer: {learning_rate: 5e-7, schedule: linear, warmup: 0.1}
    batch_size: 128

    A line of pairs.jsonl, with "image" or "video", or neither:

    \b
    {"id": 7, "image": "7.jpg", "prompt": "What is this?", "chosen": "A red cup.", "rejected": "A dog."}

    The starting model's log-probabilities are computed first and kept in the output's references/. Watch reward_margin
    and reward_accuracy in metrics.jsonl go up.
    """
    import logging

    from llava_fast.train.recipe import load_recipe
    from llava_fast.train.run import train as run

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    loaded = load_recipe(recipe, set_)
    if loaded.dpo is None:
        raise RecipeError("the recipe has no section `dpo`: add one (`dpo: {beta: 0.1}`), or run `llava-fast train`")
    typer.echo(f"the trained model is in {run(loaded, resume)}")
