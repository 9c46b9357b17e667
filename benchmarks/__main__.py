"""`python -m benchmarks compare A B` measures two commits alternately on this machine. `checkpoint SHAPE FOLDER` writes
a shape with random weights as a checkpoint directory. The other commands are those of run.py."""

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.compare import compare
from benchmarks.run import app

app.command()(compare)


@app.command()
def checkpoint(
    shape: Annotated[str, typer.Argument(help="A shape's name (shapes.py).")],
    folder: Annotated[Path, typer.Argument(help="Where to write it, in the Hugging Face layout.")],
    layers: Annotated[int | None, typer.Option(min=1, help="As for the suites.")] = None,
) -> None:
    """Write a shape with random weights as a checkpoint directory."""
    import torch

    from benchmarks.shapes import SHAPES
    from benchmarks.subject import Subject

    if shape not in SHAPES:
        raise typer.BadParameter(f"{shape!r}: choose from {', '.join(SHAPES)}")
    subject = Subject(shape, layers, torch.float32, "cpu")
    subject.hf.save_pretrained(folder)
    subject.hf_processor.save_pretrained(folder)
    subject.close()


if __name__ == "__main__":
    app()
