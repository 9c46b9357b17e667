"""llava-fast eval: measure a model, compare two."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from llava_fast.cli.options import Device, Dtype, KvCache, ModelBase, Quantize, Template
from llava_fast.errors import EvaluationError

UNDEFINED = "undefined"


class _RunByDefault(TyperGroup):
    """`eval MODEL TASK` is `eval run MODEL TASK`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in self.commands:
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_RunByDefault,
    help="Measure a model on benchmarks and on data of your own; `eval compare A B` compares two.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _list_tasks(value: bool) -> None:
    if not value:
        return
    from llava_fast.evaluate.tasks import TASKS

    for name in TASKS:
        task = TASKS[name]
        typer.echo(f"{name}: {task.title}")
        if task.arguments:
            typer.echo(f"  {name}:ARGUMENT   {task.arguments}")
        place = f"{task.folder}/" if task.folder else ""
        for file in task.files:
            also = f" (or {', '.join(file.instead)})" if file.instead else ""
            typer.echo(f"  {place}{file.path}{also}   {file.what}")
        typer.echo(f"  from {task.source}")
        typer.echo(f"  scored by {task.scorer}\n")
    typer.echo("lmms:NAME: a task of lmms-eval (pip install lmms-eval), with its own files and scorer")
    raise typer.Exit


@app.command("run")
def run(
    model: Annotated[str, typer.Argument(help="A checkpoint directory or a Hub id; `demo` is the one that ships.")],
    tasks: Annotated[list[str], typer.Argument(help="Tasks: NAME or NAME:ARGUMENT; `--tasks` lists them.")],
    data: Annotated[
        Path, typer.Option(help="The folder of the tasks' files, laid out as `--tasks` says.", file_okay=False)
    ] = Path(),
    out: Annotated[
        Path | None,
        typer.Option(
            help="Where answers, results and report go. Default: evaluations/MODEL's last part.", file_okay=False
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most so many questions of a task, drawn the same for every model.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="The most tokens of an answer. Default: the task's.")
    ] = None,
    choose: Annotated[
        Literal["answer", "likelihood", "mean-likelihood"],
        typer.Option(
            help="How an option is chosen (scienceqa, mmbench, seed, ai2d): answer, the model writes its letter; "
            "likelihood, the option whose tokens' log-probabilities have the largest sum, as InstructBLIP ranks; "
            "mean-likelihood, the largest mean."
        ),
    ] = "answer",
    batch: Annotated[int, typer.Option(min=1, help="How many answers are made at once.")] = 32,
    processes: Annotated[
        int, typer.Option(min=1, help="Processes with a model each: one a GPU, or a share of the cores each.")
    ] = 1,
    ray: Annotated[
        int, typer.Option(min=0, help="Actors of a Ray cluster (RAY_ADDRESS, or one on this machine). 0: no Ray.")
    ] = 0,
    shard: Annotated[
        str | None,
        typer.Option(
            help="Answer only this share, as 0/4, and score nothing: for machines that share --out. Default: RANK and "
            "WORLD_SIZE, where torchrun sets them. The command without it then scores."
        ),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget the answers that --out holds.")] = False,
    report: Annotated[bool, typer.Option(help="Write the report that a browser shows.")] = True,
    model_base: ModelBase = None,
    chat_template: Template = None,
    device: Device = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    kv_cache: KvCache = None,
    list_tasks: Annotated[
        bool, typer.Option("--tasks", is_eager=True, callback=_list_tasks, help="List the tasks and their files.")
    ] = False,
) -> None:
    """Answer the questions of tasks and score the answers.

    \b
    llava-fast eval demo demo                          # the demo model on its digits: no file needed
    llava-fast eval llava-hf/llava-1.5-7b-hf pope mme gqa --data playground/data/eval
    llava-fast eval out/my-model llava:questions.json --data pictures/
    llava-fast eval out/my-model lmms:mmmu_val         # through lmms-eval
    llava-fast eval compare evaluations/a evaluations/b

    \b
    --out holds answers/TASK.jsonl (a line as soon as an answer ends: the same command
    goes on after a kill), results.json (metrics and every answer) and report/index.html.
    Answers are greedy, as in the papers.
    """
    from llava_fast.evaluate import lmms
    from llava_fast.evaluate.model import ModelSpec
    from llava_fast.evaluate.results import failures_of, lines_of, make_folder, save
    from llava_fast.evaluate.run import Plan
    from llava_fast.evaluate.run import run as evaluate

    if model == "demo" and not Path(model).exists():
        from llava_fast.demo.run import model_path

        model = str(model_path())
    spec = ModelSpec(model, device, dtype, chat_template, model_base, quantize, kv_cache)
    out = out or Path("evaluations") / (Path(model).name or "model")
    own = tuple(name for name in tasks if not name.startswith(lmms.PREFIX))
    theirs = [name for name in tasks if name.startswith(lmms.PREFIX)]
    share = _shard(shard)
    if theirs and choose != "answer":
        raise EvaluationError("lmms: tasks say themselves how options are chosen: leave --choose out")
    if choose != "answer" and max_new_tokens is not None:
        raise EvaluationError("--max-new-tokens is for answers that are generated: leave it out with --choose")
    how: Any = choose.replace("-", "_")
    plan = Plan(own, data, out, spec.identity(), limit, max_new_tokens, share, fresh, report, how)
    results = {}
    if own:
        results = evaluate(plan, _answerer(spec, batch, processes, ray), _Bars())
    if share is not None:
        rest = "the command without --shard asks again what failed, then scores"
        typer.echo(f"shard {share[0]} of {share[1]} is done; {rest}", err=True)
        return
    if theirs:
        make_folder(out)
        found = lmms.evaluate(spec, theirs, limit, batch)
        results = save(out, plan.model, {"max_new_tokens": max_new_tokens, "limit": limit}, found)
        tasks = [*own, *found]
    print_table(lines_of(results, tasks))
    for failure in failures_of(results, tasks):
        typer.echo(failure, err=True)
    typer.echo(f"wrote {out / 'results.json'}")
    if report:
        from llava_fast.evaluate.report import write

        typer.echo(f"wrote {write(results, out)}")


@app.command("compare")
def compare(
    a: Annotated[Path, typer.Argument(help="The --out of one evaluation, or its results.json.")],
    b: Annotated[Path, typer.Argument(help="That of another.")],
    resamples: Annotated[int, typer.Option(min=100, help="How often the pictures are drawn anew.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Of these draws.")] = 0,
    json_output: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """The metrics of two evaluations on the questions that both answered, and 95% intervals of B - A.

    Intervals are by a paired bootstrap over pictures: both evaluations are scored on the same draws.
    """
    import json

    from rich.console import Console
    from rich.table import Table

    from llava_fast.evaluate.compare import compare as compared

    found = compared(a, b, resamples, seed)
    if json_output:
        rows = [{key: _defined(value) for key, value in vars(each).items()} for each in found]
        typer.echo(json.dumps(rows, indent=1, allow_nan=False))
        return
    table = Table()
    for name in ("task", "metric", "A", "B", "B - A", "95% interval", "B above A", "units"):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right")
    for each in found:
        certain = " *" if each.low > 0 or each.high < 0 else ""
        known = not math.isnan(each.low)
        table.add_row(
            each.task,
            each.metric,
            _shown(each.a, ".2f"),
            _shown(each.b, ".2f"),
            _shown(each.b - each.a, "+.2f"),
            f"{each.low:+.2f} to {each.high:+.2f}{certain}" if known else UNDEFINED,
            _shown(each.better, ".1%"),
            str(each.units),
        )
    Console().print(table)
    typer.echo("* the interval does not hold 0")


def _defined(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def _shown(value: float, form: str) -> str:
    return UNDEFINED if math.isnan(value) else format(value, form)


def _answerer(spec: Any, batch: int, processes: int, ray: int) -> Any:
    from llava_fast.evaluate import workers

    if ray and processes > 1:
        raise EvaluationError("--ray and --processes exclude each other: Ray's actors are processes")
    if ray:
        return workers.on_ray(spec, ray, batch)
    if processes > 1:
        return workers.in_processes(spec, processes, batch)
    return workers.in_this_process(spec, batch)


def _shard(text: str | None) -> tuple[int, int] | None:
    """(number, of how many) of "0/4", or of what torchrun set. Raises EvaluationError."""
    if text is None:
        if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return None
        text = f"{os.environ['RANK']}/{os.environ['WORLD_SIZE']}"
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise EvaluationError(f"--shard is {text!r}: write the number from 0 and how many, as 0/4")
    return int(number), int(count)


class _Bars:
    """A progress bar for each task."""

    def __init__(self) -> None:
        self.bars: dict[str, Any] = {}

    def __call__(self, task: str, done: int, total: int) -> None:
        from tqdm import tqdm

        if task not in self.bars:
            self.bars[task] = tqdm(total=total, initial=done, desc=task, disable=None)
        bar = self.bars[task]
        bar.update(done - bar.n)
        if done == total:
            bar.close()


def print_table(lines: list[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    table.add_column("task")
    table.add_column("metric")
    for name in ("value", "95% interval", "questions"):
        table.add_column(name, justify="right")
    for line in lines:
        table.add_row(*line)
    Console().print(table)
