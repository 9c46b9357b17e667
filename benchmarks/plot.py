"""Bar chart of the speed-ups in result files, one bar per case. Models of realistic width are coloured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.case import Row

REAL, SMALL = "#1f6f8b", "#b9c4c9"


def plot(rows: Sequence[Row], output: Path) -> None:
    """Write a PNG. Only rows with a speed-up (those that passed their check) are drawn.

    Raises ValueError if there is none, RuntimeError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure  # no pyplot: no display and no global state
    except ImportError:
        raise RuntimeError("plotting needs matplotlib: pip install matplotlib") from None
    drawn = [row for row in rows if row.ratio is not None]
    if not drawn:
        raise ValueError("no row has a speed-up: run with a transformers backend too, and see that checks pass")
    drawn = sorted(drawn, key=lambda row: row.real_width, reverse=True)[::-1]  # drawn from the bottom up
    figure = Figure(figsize=(9, 1.4 + 0.55 * len(drawn)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(drawn):
        axes.barh(place, row.ratio - 1, left=1, height=0.62, color=REAL if row.real_width else SMALL)
        inside = {"ha": "left" if row.ratio >= 1 else "right", "va": "center", "fontsize": 9}
        axes.annotate(
            f"{row.ratio:.2f}x{' (disturbed)' * row.disturbed}",
            (row.ratio, place),
            (4 if row.ratio >= 1 else -4, 0),
            textcoords="offset points",
            **inside,
        )
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    low, high = min(1.0, *(row.ratio for row in drawn)), max(1.0, *(row.ratio for row in drawn))
    axes.set_xlim(low / 1.4, high * 1.6)
    ticks = [tick for tick in (0.25, 0.5, 1, 2, 3, 5, 10, 20, 50) if low / 1.4 <= tick <= high * 1.4]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(drawn)), [_name(row) for row in drawn], fontsize=8)
    axes.set_xlabel(f"times as fast as transformers ({', '.join(sorted({row.reference for row in drawn}))}), log scale")
    row = drawn[-1]
    figure.suptitle(
        f"{row.machine['kind']}, {row.machine['threads']} thread(s), {row.settings['dtype']}, "
        f"torch {row.versions['torch']}, transformers {row.versions['transformers']}, commit {row.commit}\n"
        "coloured: real width (bound by memory or arithmetic); grey: small models (launch overhead)",
        fontsize=8,
        x=0.01,
        ha="left",
    )
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150, format="png")


def _name(row: Row) -> str:
    backend = "" if row.backend == "llava_fast" else f" [{row.backend}]"
    return f"{row.suite}{backend}, {row.model}\n{row.case}"
