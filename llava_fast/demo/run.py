"""`llava-fast demo`: questions about an image of digits, the answers, and the time per stage, against transformers."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llava_fast.api import count_tokens, load
from llava_fast.demo import canvas, questions
from llava_fast.errors import CheckpointError, ImageError
from llava_fast.inputs.pictures.reading import open_image

STAGES = ("image to tiles and token ids", "to the first token", "each further token")
STAGE_TOKENS = 33  # the first token, and 32 more to average over
REPEATS = 5


def model_path() -> Path:
    """The directory of the demo model that ships with the package. Raises CheckpointError if it is missing."""
    path = Path(str(files("llava_fast"))) / "demo_model"
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} has no demo model: reinstall llava_fast, or train it (examples/digits)")
    return path


def run_demo(image: Path | None, question: str, seed: int, output: Path, compare: bool) -> None:
    """Run the demo and print the results. With `image`: ask `question` about it. Otherwise: compose a canvas of
    held-out scans from `seed`, save it to `output`, and ask one question of each kind."""
    console = Console()
    path = model_path()
    model = load(path, device="cpu")
    if image is not None:
        pixels = open_image(image)
        asked: list[tuple[str, str | None]] = [(question, None)]
    else:
        rng = np.random.default_rng(seed)
        composed = canvas.compose(rng, canvas.split_scans()[1], count=int(rng.integers(1, canvas.MAX_DIGITS + 1)))
        pixels = composed.image
        try:
            Image.fromarray(pixels).save(output)
        except (OSError, ValueError) as error:  # ValueError: a suffix that Pillow does not know
            raise ImageError(f"--output {output} cannot be written ({error}): give another, as canvas.png") from None
        console.print(f"A canvas of handwritten digits that the model has never seen, saved as [bold]{output}[/bold]")
        asked = [(questions.ask(rng, kind), questions.answer(kind, composed.digits)) for kind in questions.KINDS]
    if console.is_terminal:
        console.print(_in_blocks(pixels, min(console.width, 72)))
    height, width = pixels.shape[:2]
    console.print(f"{width}x{height} pixels: {count_tokens(model, height, width)} visual tokens\n")

    answers = model.generate([_request(text, pixels) for text, _ in asked], max_new_tokens=32)
    for (text, expected), answer in zip(asked, answers, strict=True):
        verdict = (
            ""
            if expected is None
            else "  [green]right[/]"
            if answer.text.strip() == expected
            else (f"  [red]wrong[/], it is {expected!r}")
        )
        console.print(f"Q: {text}\nA: [bold]{answer.text.strip()}[/bold]{verdict}")
    console.print()
    console.print(_timing_table(model, path, _request(asked[0][0], pixels), compare))


def _request(question: str, pixels: np.ndarray) -> dict:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": content}], "images": [pixels]}


def _timing_table(model, path: Path, request: dict, compare: bool) -> Table:
    """Milliseconds of each stage in llava_fast and, with `compare`, in transformers with the same weights."""
    ours = _stage_times(
        lambda: model.prepare([request]), lambda n: model.generate([request], max_new_tokens=n, ignore_eos=True)
    )
    table = Table(title=f"milliseconds, median of {REPEATS}, CPU, {torch.get_num_threads()} threads, float32")
    table.add_column("stage")
    table.add_column("llava_fast", justify="right")
    rows = [[stage, f"{own:.2f}"] for stage, own in zip(STAGES, ours, strict=True)]
    theirs = _transformers_times(path, model, request) if compare else None
    if theirs is not None:
        table.add_column("transformers", justify="right")
        table.add_column("ratio", justify="right")
        for row, own, other in zip(rows, ours, theirs, strict=True):
            row += [f"{other:.2f}", f"{other / own:.1f}x"]
    elif compare:
        table.caption = "no comparison: transformers gave different tokens (does it use torchvision?)"
    for row in rows:
        table.add_row(*row)
    return table


def _transformers_times(path: Path, model, request: dict) -> tuple[float, float, float] | None:
    """Milliseconds of the three stages in transformers, or None if its tokens differ: then times are not comparable."""
    from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    theirs = LlavaNextForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
    processor = LlavaNextProcessor.from_pretrained(path)
    segments, images, _ = model.processor.render(request)
    prompt = "".join(segment.text for segment in segments)

    def inputs():
        return processor(images=Image.fromarray(images[0]), text=prompt, return_tensors="pt")

    def generate(tokens: int):
        prepared = inputs()
        out = theirs.generate(**prepared, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        return out[0, prepared["input_ids"].shape[1] :].tolist()

    # min_new_tokens keeps transformers from giving an end token, so compare up to ours.
    answer = model.generate([request], max_new_tokens=STAGE_TOKENS)[0].token_ids[:-1]
    if generate(STAGE_TOKENS)[: len(answer)] != answer:
        return None
    return _stage_times(inputs, generate)


def _stage_times(prepare: Callable[[], object], generate: Callable[[int], object]) -> tuple[float, float, float]:
    """Milliseconds to prepare, from then to the first token, and per further token."""
    first, all_tokens = (_median_ms(functools.partial(generate, n)) for n in (1, STAGE_TOKENS))
    prepared = _median_ms(prepare)
    return prepared, max(first - prepared, 0.0), (all_tokens - first) / (STAGE_TOKENS - 1)


def _median_ms(work: Callable[[], object]) -> float:
    work()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times)[REPEATS // 2]


def _in_blocks(pixels: np.ndarray, columns: int) -> Text:
    """The image as coloured half-block characters; each cell shows two pixels, one above the other."""
    height, width = pixels.shape[:2]
    columns = min(columns, width)
    rows = max(1, min(round(height / width * columns / 2), 36))
    small = np.asarray(Image.fromarray(pixels).resize((columns, 2 * rows), Image.Resampling.BILINEAR))
    text = Text()
    for y in range(0, 2 * rows, 2):
        for x in range(columns):
            upper, lower = (f"rgb({r},{g},{b})" for r, g, b in small[y : y + 2, x])
            text.append("\u2580", style=f"{upper} on {lower}")
        text.append("\n")
    return text
