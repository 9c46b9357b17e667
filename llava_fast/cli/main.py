"""The command line `llava-fast COMMAND`. This module registers the commands, which the other modules define."""

from __future__ import annotations

import sys

import typer

from llava_fast.cli import ask, batch, checkpoints, data, evaluate, judge, machine, make_data, recipe, serving, training
from llava_fast.errors import LlavaFastError

app = typer.Typer(
    name="llava-fast",
    help="Run and convert LLaVA vision-language models, fast and exactly. `llava-fast COMMAND --help` has examples.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (ask.generate, ask.chat, batch.batch, serving.serve):
    app.command()(command)
for training_command in (training.train, training.dpo, recipe.plan, recipe.plot):
    app.command()(training_command)
app.add_typer(data.app, name="data")
app.add_typer(make_data.app, name="make-data")
app.add_typer(evaluate.app, name="eval")
app.command()(judge.judge)
app.add_typer(recipe.app, name="recipe")
app.command()(checkpoints.convert)
app.command("merge-lora")(checkpoints.merge_lora)
app.command()(machine.doctor)
app.command()(machine.tune)
app.command()(machine.demo)


def main() -> None:
    """Entry point. Errors of the package are printed as one line, with exit code 1."""
    try:
        app()
    except LlavaFastError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
