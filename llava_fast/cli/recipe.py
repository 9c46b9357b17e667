"""`llava-fast recipe`, and the commands before and after a run: `plan` and `plot`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from llava_fast.errors import RecipeError

app = typer.Typer(
    help="Recipes: those of the papers, and one made from an original command line.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command("list")
def list_recipes() -> None:
    """List the recipes shipped with the package, with their purposes."""
    from llava_fast.train.recipe import SHIPPED, shipped_recipes

    names = shipped_recipes()
    for name in names:
        first = (SHIPPED / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
        typer.echo(f"{name:{max(map(len, names))}}  {first.removeprefix('# ')}")


@app.command()
def show(
    recipe: Annotated[str, typer.Argument(help="A name from `llava-fast recipe list`, or a YAML file.")],
    set_: Annotated[
        list[str], typer.Option("--set", "-s", help="Change a field: -s optimizer.learning_rate=1e-5; repeatable.")
    ] = [],  # noqa: B006
) -> None:
    """Validate and print a recipe with its comments; with changes, print all fields of the resulting recipe.

    llava-fast recipe show llava-1.5-stage2 > mine.yaml
    """
    import yaml

    from llava_fast.train.recipe import find_recipe, load_recipe

    loaded = load_recipe(recipe, set_)
    if set_:
        typer.echo(yaml.safe_dump(loaded.model_dump(mode="json"), sort_keys=False), nl=False)
    else:
        typer.echo(find_recipe(recipe).read_text(encoding="utf-8"), nl=False)


@app.command("from-args", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def from_args(
    context: typer.Context,
    gpus: Annotated[int | None, typer.Option(min=1, help="Number of GPUs, if the command does not state it.")] = None,
    output: Annotated[
        Path | None, typer.Option("--write", help="Write the recipe to this file instead of printing it.")
    ] = None,
) -> None:
    """Convert the command line (or shell script) of an original LLaVA or LLaVA-NeXT training to a recipe.

    \b
    llava-fast recipe from-args --gpus 8 scripts/v1_5/finetune.sh
    llava-fast recipe from-args -- torchrun --nproc_per_node 8 llava/train/train_mem.py --version v1 ...

    Arguments that have no effect here or are unknown are listed in the recipe's comments.
    """
    from llava_fast.train.recipes.from_args import recipe_from_args

    if not context.args:
        raise RecipeError("give a script, or a command line after `--`: llava-fast recipe from-args finetune.sh")
    text = recipe_from_args(context.args, gpus)
    if output is None:
        typer.echo(text, nl=False)
    else:
        output.write_text(text, encoding="utf-8")
        typer.echo(f"wrote {output}")


def plan(
    recipe: Annotated[str, typer.Argument(help="A recipe's file, or a name from `llava-fast recipe list`.")],
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs.")] = 8,
    gpu: Annotated[
        Literal["A100-40G", "A100-80G", "H100", "H100-PCIe", "H200"], typer.Option(help="Their kind.")
    ] = "A100-80G",
    samples: Annotated[
        int | None, typer.Option(min=1, help="Samples per epoch. Default: counted, if the data exists here.")
    ] = None,
    tokens_per_sample: Annotated[
        int | None, typer.Option(min=1, help="Decoder rows of a mean sample, images included (see `data check`).")
    ] = None,
    tiles_per_sample: Annotated[
        int | None, typer.Option(min=0, help="Image tiles of a mean sample. Default: those of a 1024x768 image.")
    ] = None,
    share: Annotated[float, typer.Option(min=0.01, max=1.0, help="Assumed share of the GPUs' peak FLOP/s.")] = 0.4,
    set_: Annotated[
        list[str], typer.Option("--set", "-s", help="Change a field: -s optimizer.learning_rate=1e-5; repeatable.")
    ] = [],  # noqa: B006
) -> None:
    """Estimate memory per GPU and hours before starting a run, and show how each figure is calculated.

    \b
    llava-fast plan llava-1.5-stage2 --gpus 8 --samples 665298
    llava-fast plan recipe.yaml --gpus 16 --gpu H100 --tokens-per-sample 2900

    Only the model's config is read. The figures are not measured: compare them with the first steps of a run.
    """
    from llava_fast.train.estimate.cost import plan as estimate
    from llava_fast.train.recipe import load_recipe

    loaded = load_recipe(recipe, set_)
    made = estimate(loaded, gpus, gpu, samples, tokens_per_sample, tiles_per_sample, share)
    typer.echo(made.to_text())


def plot(
    runs: Annotated[list[Path], typer.Argument(help="The `output` directories of one run or several.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The file to write. Default: curves.png in the first run's directory."),
    ] = None,
) -> None:
    """Plot a run's curves: loss, learning rate, gradient norm, tokens per second, seconds waited for data, and rewards.

    \b
    llava-fast plot runs/llava-1.5-stage2
    llava-fast plot runs/a runs/b -o both.png

    It also works during training. Needs matplotlib.
    """
    from llava_fast.train.data.check import check_picture_path
    from llava_fast.train.plot import read_runs, save_curves

    found = read_runs(runs)
    path = output or runs[0] / "curves.png"
    check_picture_path(path, "a picture of curves")
    save_curves(found, path)
    typer.echo(f"wrote {path}")
