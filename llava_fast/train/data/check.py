"""`llava-fast data check`: reports all problems of training data, and its lengths, before any GPU time is spent."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from llava_fast.errors import CheckpointError, DataError, MissingPackageError
from llava_fast.inputs.processor import Processor
from llava_fast.train.data.lengths import LabelMask, Lengths, measure
from llava_fast.train.data.mixture import epoch_counts
from llava_fast.train.data.samples import SampleTable, Source, read_sources

if TYPE_CHECKING:
    from llava_fast.checkpoints.assemble import Assembly
    from llava_fast.train.objective import Objective

_BAD_FILE = "data file"
_SHOWN = 20  # problems shown on screen; the JSON report has all
_OR_SKIP = ", or write `on_problem: skip` under the recipe's `data`"
_PICTURES = (".png", ".pdf", ".svg")


@dataclass(frozen=True)
class Plan:
    """What to check: a recipe's data, or data files. Without a `model` no tokens are counted. objective: the recipe's,
    whose processor counts them."""

    sources: list[Source]
    model: str | Assembly | None = None
    mixing: Literal["concat", "sqrt"] = "concat"
    template: str | None = None
    labels: LabelMask = "answers"
    max_length: int | None = None
    video_frames: int | None = None
    cache: Path | None = None
    skips_problems: bool = False
    cuts: bool = False
    time_instruction: bool = False
    video_fps: float | None = None
    objective: Objective | None = None


@dataclass(frozen=True)
class Report:
    """The results of a check. Lists hold plain values, as in `to_json`.

    left        number of samples that are trained on: without a problem, and short enough or cut.
    tokens      for each of text, visual, supervised and all (text and visual): sum, mean, p50, p95, max per sample;
                empty if no model was given.
    sources     for each: path, samples, samples per epoch, problems, too long, tokens.
    problems    {"sample", "kind", "problem"}: samples that would stop a training run or be skipped.
    too_long    {"sample", "tokens"}: samples longer than `max_length`, which are dropped, or cut if the recipe says so.
    keys_not_read  keys that training ignores -> number of samples that have them.
    oddities    likely mistakes in samples that are still trained on -> number of such samples.
    skips_problems  whether the recipe skips samples with a problem.
    lengths     of every sample, for a histogram; not in the JSON.
    """

    samples: int
    left: int
    max_length: int | None
    tokens: dict[str, dict[str, float]]
    sources: list[dict[str, Any]]
    problems: list[dict[str, str]]
    too_long: list[dict[str, Any]]
    keys_not_read: dict[str, int]
    oddities: dict[str, int]
    skips_problems: bool
    lengths: Lengths = field(repr=False)

    @property
    def stops(self) -> bool:
        """Whether this data would stop a training run: it has a problem that is not skipped, or no usable sample."""
        bad_files = any(each["kind"] == _BAD_FILE for each in self.problems)
        return not self.left or bad_files or (bool(self.problems) and not self.skips_problems)

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        kept = {name: value for name, value in vars(self).items() if name != "lengths"}
        kinds = Counter(each["kind"] for each in self.problems)
        return {"stops_a_training": self.stops, "problem_kinds": dict(kinds), **kept}


def plan_for(
    path: str,
    model: str | None = None,
    images: str = "",
    max_length: int | None = None,
    template: str | None = None,
    labels: LabelMask | None = None,
    changes: Sequence[str] = (),
) -> Plan:
    """A plan for a recipe (a YAML file without `datasets:`, or the name of a shipped recipe) or for data files.
    Arguments override the recipe's values; changes: as for `load_recipe`.

    Raises RecipeError or DataError.
    """
    from llava_fast.train.recipe import find_recipe, load_recipe

    path = str(find_recipe(path))
    if path.lower().endswith((".yaml", ".yml")) and not _is_mixture(path):
        recipe = load_recipe(path, list(changes))
        data = recipe.data
        sources = [each.model_copy(update={"images": images}) if images else each for each in data.sources]
        return Plan(
            sources,
            model or recipe.model,
            data.mixing,
            template or data.template,
            labels or data.label_mask,
            max_length or data.max_length,
            data.video_frames,
            recipe.output / "lengths",
            data.on_problem == "skip",
            data.too_long == "cut",
            data.time_instruction,
            data.video_fps,
            recipe.objective(),
        )
    if changes:
        raise DataError(f"{path} is a data file, not a recipe: leave out --set {changes[0]}")
    return Plan(
        [Source(path=path, images=images)],
        model,
        template=template,
        labels=labels or "answers",
        max_length=max_length,
    )


def check(plan: Plan, workers: int = 2, decode: bool = True, progress: bool = True) -> Report:
    """Check all samples of a plan. decode: decode every image and video, instead of reading only its header.

    Raises CheckpointError for an invalid model; problems of the data are part of the report.
    """
    processor = None if plan.model is None else _processor(plan)
    max_length = plan.max_length or (processor.max_rows if processor else None)
    good = list(range(len(plan.sources)))
    problems: list[dict[str, str]] = []
    table: SampleTable | None
    try:
        table = read_sources(plan.sources)
    except DataError:  # report unreadable files and check the others
        good, problems = _readable(plan.sources)
        table = read_sources([plan.sources[number] for number in good]) if good else None
    if table is None:
        none = np.zeros(0, np.int32)
        lengths = Lengths(none, none, none, {}, {})
        by_source = _by_source(plan, good, None, lengths, None)
        return Report(0, 0, max_length, {}, by_source, problems, [], {}, {}, plan.skips_problems, lengths)

    lengths = measure(table, processor, plan.labels, workers, plan.cache, decode=decode, progress=progress)
    rows = lengths.text + lengths.visual
    over = np.flatnonzero(rows > max_length) if max_length else np.zeros(0, np.int64)
    problems += [
        {"sample": table.name(number), "kind": lengths.kinds[number], "problem": problem}
        for number, problem in lengths.problems.items()
    ]
    return Report(
        samples=len(table),
        left=len(table) - len(lengths.problems) - len(over) * (not plan.cuts),
        max_length=max_length,
        tokens=_statistics(lengths) if processor else {},
        sources=_by_source(plan, good, table, lengths, over),
        problems=problems,
        too_long=[{"sample": table.name(number), "tokens": int(rows[number])} for number in over.tolist()],
        keys_not_read=dict(sorted(table.unread.items(), key=lambda each: -each[1])),
        oddities=table.oddities,
        skips_problems=plan.skips_problems,
        lengths=lengths,
    )


def show(report: Report, console: Console) -> None:
    """Print the report."""
    if report.tokens:
        table = Table("tokens per sample", title_justify="left")
        for column in ("sum", "mean", "p50", "p95", "max"):
            table.add_column(column, justify="right")
        for name, numbers in report.tokens.items():
            table.add_row(name, *(f"{numbers[each]:,.0f}" for each in ("sum", "mean", "p50", "p95", "max")))
        console.print(table)
    table = Table()
    table.add_column("source", overflow="fold")
    for column in ("samples", "per epoch", "problems", "too long", "tokens"):
        table.add_column(column, justify="right")
    for each in report.sources:
        table.add_row(_printable(each["path"]), *(f"{each[key]:,}" for key in list(each)[1:]))
    console.print(table)

    def say(text: str) -> None:
        console.print(_printable(text), markup=False, highlight=False, soft_wrap=True)

    if report.keys_not_read:
        keys = ", ".join(f"{key} ({count:,})" for key, count in list(report.keys_not_read.items())[:10])
        say(f"Keys that training does not read: {keys}")
    for oddity, count in report.oddities.items():
        say(f"{count:,} samples {oddity}.")
    if report.too_long:
        longest = max(report.too_long, key=lambda each: each["tokens"])
        say(
            f"{len(report.too_long):,} of {report.samples:,} samples are longer than {report.max_length:,} tokens (the "
            f"longest: {longest['sample']}, {longest['tokens']:,}): a recipe's `too_long` says what becomes of them"
        )
    if report.problems:
        kinds = Counter(each["kind"] for each in report.problems)
        say(f"{len(report.problems):,} problems: " + ", ".join(f"{n:,} {kind}" for kind, n in kinds.most_common()))
        for each in report.problems[:_SHOWN]:
            say(f"  [{each['kind']}] {each['problem']}")
        if len(report.problems) > _SHOWN:
            say(f"  ... and {len(report.problems) - _SHOWN:,} more; --json FILE lists every one")
    if not report.problems:
        say(f"{report.samples:,} samples, no problem found.")
    if not report.left:
        say("No sample is left to train on." + " Raise the length, or use smaller images." * bool(report.too_long))
    elif report.stops:
        say("Training would stop: fix or remove these samples" + _OR_SKIP * (not report.skips_problems) + ".")
    elif report.problems:
        say("Training skips these samples, as the recipe says.")


def save_histogram(report: Report, path: Path) -> None:
    """Save a histogram of the samples' numbers of tokens. Raises DataError if no tokens were counted."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingPackageError("a histogram", "matplotlib", "plot") from None
    if not report.tokens:
        raise DataError("a histogram needs tokens: give a model, and data that can be read")
    fine = ~np.isin(np.arange(report.samples), list(report.lengths.problems))
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    columns = _columns(report.lengths)
    edges = np.linspace(0, max(int(columns["all"].max()), 1), 61).tolist()
    axes.hist(columns.pop("all")[fine], edges, label="all", alpha=0.25)
    for name, rows in columns.items():
        axes.hist(rows[fine], edges, label=name, histtype="step", linewidth=1.5)
    if report.max_length and report.max_length <= 2 * edges[-1]:
        axes.axvline(report.max_length, color="black", linestyle="--", label=f"max length {report.max_length:,}")
    axes.set(xlabel="tokens of a sample", ylabel="samples", yscale="log", title=f"{fine.sum():,} samples")
    axes.legend()
    figure.savefig(path, dpi=120)


def check_picture_path(path: Path, what: str = "a histogram") -> None:
    """Raise DataError before anything is measured if a plot could not be written to `path`, and MissingPackageError
    without matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingPackageError(what, "matplotlib", "plot") from None
    if path.suffix.lower() not in _PICTURES:
        raise DataError(f"{what} is a {', '.join(_PICTURES)} file, not {path.name}")
    check_parent(path)


def check_parent(path: Path) -> None:
    """Raise DataError if the parent folder of a file does not exist."""
    if not path.absolute().parent.is_dir():
        raise DataError(f"there is no folder {path.absolute().parent} to write {path.name} into: create it first")


def _is_mixture(path: str) -> bool:
    try:
        given = yaml.safe_load(Path(path).read_bytes())
    except (OSError, ValueError, yaml.YAMLError):
        return False  # reading it as a recipe raises the error
    return isinstance(given, dict) and "datasets" in given


def _processor(plan: Plan) -> Processor:
    """The model's processor; its weights are not read."""
    from llava_fast.api import load_processor
    from llava_fast.checkpoints.assemble import open_checkpoint

    if plan.model is None:
        raise CheckpointError("a processor needs a model, and none is given")
    if plan.objective is not None:
        processor = plan.objective.read_processor(plan.model, plan.template)
    else:
        processor = load_processor(*open_checkpoint(plan.model), plan.template)
    frames = plan.video_frames or processor.video_frames
    fps = processor.video_fps if plan.video_fps is None else plan.video_fps
    return dataclasses.replace(processor, video_frames=frames, video_fps=fps, time_instruction=plan.time_instruction)


def _readable(sources: Sequence[Source]) -> tuple[list[int], list[dict[str, str]]]:
    """(indices of readable sources, problems of the others)."""
    good, problems = [], []
    for number, source in enumerate(sources):
        try:
            read_sources([source])
            good.append(number)
        except DataError as error:
            problems.append({"sample": source.path, "kind": _BAD_FILE, "problem": str(error)})
    return good, problems


def _columns(lengths: Lengths) -> dict[str, np.ndarray]:
    return {
        "text": lengths.text,
        "visual": lengths.visual,
        "supervised": lengths.supervised,
        "all": lengths.text + lengths.visual,
    }


def _statistics(lengths: Lengths) -> dict[str, dict[str, float]]:
    """Statistics per column, over samples without a problem."""
    fine = ~np.isin(np.arange(len(lengths.text)), list(lengths.problems))
    if not fine.any():
        return {}
    return {
        name: {
            "sum": int(rows[fine].sum(dtype=np.int64)),
            "mean": round(float(rows[fine].mean()), 1),
            "p50": round(float(np.percentile(rows[fine], 50)), 1),
            "p95": round(float(np.percentile(rows[fine], 95)), 1),
            "max": int(rows[fine].max()),
        }
        for name, rows in _columns(lengths).items()
    }


def _by_source(
    plan: Plan, good: list[int], table: SampleTable | None, lengths: Lengths, over: np.ndarray | None
) -> list[dict[str, Any]]:
    sizes, bad, long, tokens = np.zeros((4, len(plan.sources)), np.int64)
    if table is not None:
        number = np.array(good)[table.source_of]
        sizes += np.bincount(number, minlength=len(sizes))
        bad += np.bincount(number[list(lengths.problems)], minlength=len(sizes))
        long += np.bincount(number[over], minlength=len(sizes))
        np.add.at(tokens, number, lengths.text + lengths.visual)
    per_epoch = epoch_counts(sizes, plan.sources, plan.mixing)
    names = ("path", "samples", "samples_per_epoch", "problems", "too_long", "tokens")
    return [
        dict(zip(names, (source.path, *(int(each[i]) for each in (sizes, per_epoch, bad, long, tokens))), strict=True))
        for i, source in enumerate(plan.sources)
    ]


def _printable(text: str) -> str:
    """The text with lone surrogates, which JSON allows and terminals do not, escaped."""
    return text.encode("utf-8", "backslashreplace").decode()
