"""llava-fast judge: scores of free answers by a language model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from llava_fast.cli.endpoint import Asking, with_endpoint

COUNTED = {
    "requests": "requests",
    "failed": "failed",
    "malformed": "replies that could not be read",
    "unread": "requests without a reply that could",
    "without_score": "answers without a score",
}


@with_endpoint
def judge(
    asking: Asking,
    out: Annotated[Path, typer.Argument(help="The --out of llava-fast eval.", file_okay=False)],
    tasks: Annotated[
        list[str] | None,
        typer.Argument(help="Which of its tasks. Default: those that only a judge scores (not scienceqa)."),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A folder of your own prompts; those that it lacks are ours.", file_okay=False)
    ] = None,
    write_prompts: Annotated[
        Path | None,
        typer.Option("--write-prompts", help="Write our prompts into this folder and end."),
    ] = None,
    both_orders: Annotated[
        bool, typer.Option(help="Ask about each pair twice, each answer first once. The papers ask once.")
    ] = True,
    runs: Annotated[int, typer.Option(min=1, help="How often MM-Vet's answers are graded; the paper's 5.")] = 1,
    tries: Annotated[int, typer.Option(min=1, help="How often a request is asked whose reply cannot be read.")] = 3,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Start without asking back.")] = False,
    report: Annotated[bool, typer.Option(help="Write the report anew.")] = True,
) -> None:
    """Score the answers of LLaVA-Bench and MM-Vet, and ensemble ScienceQA, by an OpenAI-compatible endpoint.

    \b
    llava-fast eval MODEL llava-bench mm-vet --data playground/data/eval --out out
    llava-fast judge out --endpoint-model gpt-4.1 --price-in 2 --price-out 8
    llava-fast judge out scienceqa --endpoint http://127.0.0.1:8000/v1 --endpoint-model NAME --yes
    llava-fast judge out --dry-run        # shows a prompt and the estimate, asks nothing

    LLaVA-Bench: the answer and a reference are graded from 1 to 10, in both orders; the score is the ratio of their
    means. Without the picture the judge reads captions; of Wilder it sees the picture, and the reference has 10.
    MM-Vet: a grade from 0 to 1. ScienceQA: the judge answers alone, and weighs both answers where they differ.

    Replies that cannot be read are asked again, then counted and left without a score; none is guessed. Every raw reply
    is kept in OUT/judge/, so the same command goes on where it stopped and asks nothing twice.
    """
    from llava_fast.cli.evaluate import print_table
    from llava_fast.evaluate.judge.judges import Judging
    from llava_fast.evaluate.judge.prompts import Prompts, write
    from llava_fast.evaluate.judge.run import judge_tasks, tasks_to_judge
    from llava_fast.evaluate.results import lines_of, load_results

    if write_prompts is not None:
        write(write_prompts)
        typer.echo(f"wrote {write_prompts}")
        return
    judging = Judging(Prompts(prompts), both_orders, runs, tries)
    names = tasks_to_judge(load_results(out), tasks or [])
    asking = dataclasses.replace(asking, confirm=not yes)
    results = judge_tasks(out, names, judging, asking.opened, asking.endpoint.model)
    print_table(lines_of(results, names))
    for name in names:
        counts = results["tasks"][name]["judge"]
        said = [f"{counts[key]:,} {word}" for key, word in COUNTED.items()]
        typer.echo(f"{name}: {', '.join(said)}")
    typer.echo(f"wrote {out / 'results.json'}")
    if report:
        from llava_fast.evaluate.report import write as write_report

        typer.echo(f"wrote {write_report(results, out)}")
