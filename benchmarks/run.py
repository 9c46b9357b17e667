"""Measure llava_fast beside transformers: `python benchmarks/run.py --help`."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a checkout as it is

if TYPE_CHECKING:
    from benchmarks.case import Row, Settings
    from llava_fast.models.quantised import Quantisation

SUITE_NAMES = (
    "preprocess",
    "encode",
    "prefill",
    "decode",
    "generate",
    "train-step",
    "loss",
    "packing",
    "dpo",
    "accelerate",
)
DTYPES = ("float32", "bfloat16", "float16")
SCHEMES = ("none", "int8", "int4")
QUANTISED_SUITES = ("prefill", "decode", "generate")

app = typer.Typer(
    help=__doc__,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[
    str,
    typer.Option(
        help="A shape with random weights (tiny, tinyllama-1.1b, llava-1.5-7b, llava-next-7b) or a checkpoint "
        "directory in the Hugging Face layout. Several, with commas, run one after the other."
    ),
]
Layers = Annotated[
    int | None,
    typer.Option(
        min=1, help="Cut a wide shape to this many decoder and tower layers; its widths stay. Default: all of them."
    ),
]
ImageSize = Annotated[str, typer.Option(help="WIDTHxHEIGHT of the photograph, in pixels.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Requests in a batch, one photograph each.")]
Backend = Annotated[
    str,
    typer.Option(
        help="Which sides run, with commas: llava_fast, llava_fast-graphs (encode on CUDA alone), hf-eager "
        "(transformers as it is), hf-compile (transformers under torch.compile; minutes to compile on a CPU), "
        "llama.cpp (its decoder in decode, generate, and prefill of text on a CPU; see --llama-bench). "
        "Ratios are against hf-eager, or hf-compile without it."
    ),
]
Dtype = Annotated[str, typer.Option(help=f"Of weights and arithmetic: {', '.join(DTYPES)}.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads of both sides.")]
Warmup = Annotated[float, typer.Option(min=0, help="Seconds each side runs before it is timed.")]
Iters = Annotated[int, typer.Option(min=1, help="Timed calls of each side.")]
NewTokens = Annotated[int, typer.Option(min=2, help="Tokens an answer has (decode, generate).")]
Context = Annotated[
    int | None,
    typer.Option(min=1, help="Rows already cached (decode). Default: what a prompt with one image takes."),
]
TextRows = Annotated[
    int | None, typer.Option(min=1, help="Tokens of text in place of a photograph and its prompt (prefill).")
]
Quantize = Annotated[
    str,
    typer.Option(help=f"llava_fast's decoder, rounded: {', '.join(SCHEMES)} (decode, prefill; without transformers)."),
]
Group = Annotated[
    int | None, typer.Option(help="Elements that share a scale: 32, 64 or 128. Default: 32 for int4, a row for int8.")
]
LlamaBench = Annotated[
    Path | None,
    typer.Option(help="llama.cpp's llama-bench, for --backend llama.cpp; llama-quantize must lie beside it."),
]
GgufDir = Annotated[
    Path | None,
    typer.Option(help="Keep the model's GGUF files here and reuse those that are. Default: a temporary directory."),
]
Only = Annotated[str, typer.Option(help="Cases with these words in their title alone.")]
OutputJson = Annotated[Path | None, typer.Option(help="Write every row here as JSON.")]
Quick = Annotated[
    bool, typer.Option("--quick", help="The tiny shape and a 7B width of two layers, few calls: see README.md.")
]


@app.callback(invoke_without_command=True)
def main(context: typer.Context, quick: Quick = False, output_json: OutputJson = None) -> None:
    """Measure llava_fast beside transformers, on the same weights and the same inputs.

    python benchmarks/run.py --quick
    python benchmarks/run.py decode --model llava-next-7b --layers 2
    python benchmarks/run.py all --model tiny,llava-next-7b --layers 2 --output-json results.json
    python benchmarks/run.py plot results.json speedups.png

    Every result is checked against the reference before anything is timed. A result that fails its check gets no
    speed-up, and the exit code is 1.
    """
    if context.invoked_subcommand is None:
        if not quick:
            typer.echo(context.get_help())
            raise typer.Exit()
        _execute(_quick_jobs(SUITE_NAMES), threads=1, output_json=output_json)


def _add_suite(name: str) -> None:
    suites = SUITE_NAMES if name == "all" else (name,)

    def command(
        model: Model = "tiny",
        layers: Layers = None,
        image_size: ImageSize = "1024x768",
        batch_size: BatchSize = 1,
        backend: Backend = "llava_fast,hf-eager",
        dtype: Dtype = "float32",
        device: Device = "cpu",
        threads: Threads = 1,
        warmup: Warmup = 1.0,
        iters: Iters = 20,
        new_tokens: NewTokens = 32,
        context: Context = None,
        text_rows: TextRows = None,
        quantize: Quantize = "none",
        group: Group = None,
        llama_bench: LlamaBench = None,
        gguf_dir: GgufDir = None,
        only: Only = "",
        quick: Quick = False,
        output_json: OutputJson = None,
    ) -> None:
        if quick:
            _execute(_quick_jobs(suites), threads, output_json)
            return
        _limit_threads(threads)
        from benchmarks.case import Settings

        settings = Settings(
            backends=_backends(backend, suites, device),
            image_size=_image_size(image_size),
            batch_size=batch_size,
            dtype=_choice(dtype, DTYPES, "--dtype"),
            device=device,
            threads=threads,
            warmup=warmup,
            iters=iters,
            new_tokens=new_tokens,
            context=context,
            text_rows=text_rows,
            quantize=None if _choice(quantize, SCHEMES, "--quantize") == "none" else quantize,
            group=group,
            llama_bench=llama_bench,
            gguf_dir=gguf_dir,
        )
        _check_quantised(settings, suites)
        _check_llama_cpp(settings, suites)
        _execute([(one, layers, suites, settings) for one in model.split(",")], threads, output_json, only)

    app.command(name, help=_HELP[name])(command)


_HELP = {
    "preprocess": "A decoded photograph to uint8 tiles, against transformers' Pillow processor.",
    "encode": "Tiles to the decoder's inputs: vision tower, projector, packing.",
    "prefill": "A prepared batch to the logits after its last row.",
    "decode": "Greedy tokens after a full cache, by each side's own generation loop.",
    "generate": "Photographs and prompts to text, everything included.",
    "train-step": "Forward, loss and backward of a batch with labels; the vision tower is frozen.",
    "loss": "The output head and its loss: supervised rows in parts, against a table of logits for every row.",
    "packing": "A step's samples of mixed lengths, packed end to end, against padded to the longest.",
    "dpo": "A preference pair's loss and gradients: image and question run once, against two ordinary sequences.",
    "accelerate": "A transformers model and processor, stock against accelerated: training step and its peak memory, "
    "a forward, pixels. Always against hf-eager; --new-tokens is how many are supervised.",
    "all": "Every suite in turn.",
}
for _name in _HELP:
    _add_suite(_name)


@app.command()
def plot(
    results: Annotated[list[Path], typer.Argument(help="JSON files written by --output-json, then the PNG to write.")],
) -> None:
    """Draw the speed-ups of result files: `plot a.json b.json out.png`."""
    from benchmarks.plot import plot as draw
    from benchmarks.report import read_json

    *sources, output = results
    if not sources or output.suffix != ".png":
        raise typer.BadParameter("give one or more JSON files and then a .png to write")
    draw([row for source in sources for row in read_json(source)], output)
    typer.echo(f"wrote {output}")


Job = tuple[str, int | None, tuple[str, ...], "Settings"]
"""(model, layers, suites, settings)"""


def _quick_jobs(suites: tuple[str, ...]) -> list[Job]:
    """Two minutes on two cores: every suite at the tiny shape, and at a 7B width those whose calls take seconds."""
    _limit_threads(1)
    from benchmarks.case import Settings

    tiny = Settings(warmup=0.3, iters=12)
    wide = replace(tiny, warmup=0.0, iters=3, new_tokens=4)
    wide_suites = tuple(suite for suite in suites if suite in ("preprocess", "encode", "decode"))
    return [("tiny", None, suites, tiny), ("llava-next-7b", 2, wide_suites, wide)]


def _execute(jobs: list[Job], threads: int, output_json: Path | None, only: str = "") -> None:
    """Run the jobs, printing each case when it is done. Exits with 1 if a check failed."""
    _limit_threads(threads)
    import torch

    if jobs[0][3].device != "cpu" and not torch.cuda.is_available():
        raise typer.BadParameter(f"{jobs[0][3].device!r}: there is no CUDA device here", param_hint="--device")
    torch.set_num_threads(threads)
    from benchmarks import machine, report
    from benchmarks.case import measure
    from benchmarks.subject import Subject
    from benchmarks.suites import SUITES

    started = time.perf_counter()
    about = machine.describe(jobs[0][3].device, threads)
    versions, commit = machine.versions(), machine.commit()
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    rows: list[Row] = []
    typer.echo(f"{about['kind']} ({about['cpu']}), {threads} thread(s), commit {commit}")
    typer.echo(", ".join(f"{name} {version}" for name, version in versions.items()))
    if (about["load_before"] or 0) > 0.5:
        typer.echo(f"this machine is busy (load average {about['load_before']:.1f}): expect noise", err=True)
    for model, layers, suites, settings in jobs:
        ceilings = machine.measure_ceilings(settings.device, settings.torch_dtype)
        measured = {**about, "ceilings": machine.as_dict(ceilings)}
        typer.echo(
            f"ceilings here: {ceilings.bytes_per_second / 1e9:.1f} GB/s, "
            f"{ceilings.flops_per_second / 1e9:.0f} GFLOP/s {settings.dtype}"
        )
        quantisation = _quantisation(settings)
        subject = Subject(model, layers, settings.torch_dtype, settings.device, quantisation)
        for suite in suites:
            done: list[Row] = []
            for case in SUITES[suite].cases(subject, settings):
                if only not in case.label:
                    continue
                new = measure(case, settings, ceilings)
                for row in new:
                    row.machine, row.versions = measured, versions | row.versions
                    row.commit, row.date = commit, date
                done += new
                typer.echo("\n" + report.table(new))
            rows += done
            if hasattr(SUITES[suite], "summary") and not only:
                typer.echo("\n" + SUITES[suite].summary(done))
        subject.close()
    if output_json is not None:
        report.write_json(rows, output_json)
        typer.echo(f"\nwrote {output_json}")
    typer.echo(f"\n{time.perf_counter() - started:.0f} s")
    if any(report.failed(row) for row in rows):
        typer.echo("a check failed: its rows have no speed-up", err=True)
        raise typer.Exit(1)


def _limit_threads(threads: int) -> None:
    """Before torch and the compiled extension are loaded, since both read it then."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def _backends(text: str, suites: tuple[str, ...], device: str) -> tuple[str, ...]:
    from benchmarks.case import BACKENDS, GRAPHS

    names = tuple(dict.fromkeys(text.split(",")))
    for name in names:
        _choice(name, BACKENDS, "--backend")
    if GRAPHS in names and (suites != ("encode",) or not device.startswith("cuda")):
        raise typer.BadParameter(f"{GRAPHS} is a side of `encode --device cuda` alone", param_hint="--backend")
    return names


def _check_quantised(settings: Settings, suites: tuple[str, ...]) -> None:
    if settings.quantize is None:
        if settings.group is not None:
            raise typer.BadParameter("needs --quantize int8 or int4", param_hint="--group")
        return
    if not set(suites) <= set(QUANTISED_SUITES):
        raise typer.BadParameter(f"only of {', '.join(QUANTISED_SUITES)}", param_hint="--quantize")
    if others := [name for name in settings.providers if name != "llava_fast"]:
        text = f"{', '.join(others)} does not run rounded weights: use --backend llava_fast or llava_fast,llama.cpp"
        raise typer.BadParameter(text, param_hint="--quantize")
    from llava_fast.errors import QuantisationError

    try:
        _quantisation(settings)
    except QuantisationError as problem:
        raise typer.BadParameter(str(problem), param_hint="--group") from None


def _quantisation(settings: Settings) -> Quantisation | None:
    from llava_fast.models.quantised import Quantisation

    return Quantisation(settings.quantize, settings.group) if settings.quantize else None


def _check_llama_cpp(settings: Settings, suites: tuple[str, ...]) -> None:
    from benchmarks.case import LLAMA_CPP

    if LLAMA_CPP not in settings.backends:
        return
    if not set(suites) <= set(QUANTISED_SUITES) or ("prefill" in suites and settings.text_rows is None):
        raise typer.BadParameter(
            f"{LLAMA_CPP} runs decode, generate, and prefill with --text-rows", param_hint="--backend"
        )
    if not settings.providers:
        raise typer.BadParameter(f"{LLAMA_CPP} runs beside another side: add llava_fast", param_hint="--backend")
    if settings.device != "cpu" or settings.batch_size != 1:
        raise typer.BadParameter(f"{LLAMA_CPP} runs with --device cpu and --batch-size 1", param_hint="--backend")
    if settings.llama_bench is None:
        raise typer.BadParameter(f"{LLAMA_CPP} needs --llama-bench PATH", param_hint="--backend")
    if not settings.llama_bench.is_file():
        raise typer.BadParameter(f"there is no file {settings.llama_bench}", param_hint="--llama-bench")
    from benchmarks.llama_cpp import check_package

    try:
        check_package()
    except ValueError as problem:
        raise typer.BadParameter(str(problem), param_hint="--backend") from None


def _image_size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise typer.BadParameter(f"{text!r}: write WIDTHxHEIGHT, such as 1024x768", param_hint="--image-size")
    return int(width), int(height)


def _choice(value: str, allowed: tuple[str, ...], option: str) -> str:
    if value not in allowed:
        raise typer.BadParameter(f"{value!r}: choose from {', '.join(allowed)}", param_hint=option)
    return value


if __name__ == "__main__":
    app()
