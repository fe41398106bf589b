"""Plots of the results, as SVG. Needs matplotlib: pip install '.[bench]'."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import matplotlib
except ImportError as error:  # said before an hour is measured, not after
    raise SystemExit("plots need matplotlib: pip install '.[bench]' in a checkout") from error

matplotlib.use("svg")

from matplotlib import pyplot

from benchmarks.results import Report

#: The same SVG for the same numbers.
_RC: Any = {"svg.hashsalt": "vase_sgl", "axes.spines.top": False, "axes.spines.right": False}


@contextmanager
def _figure(path: Path, panels: int) -> Iterator[Any]:
    with matplotlib.rc_context(_RC):
        figure, axes = pyplot.subplots(
            1, panels, figsize=(4.8 * panels, 3.4), squeeze=False, layout="constrained"
        )
        yield axes[0]
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


def serving(report: Report, path: Path) -> None:
    """Tokens per second over time, one panel per cell, one line per arm (first round)."""
    samples = [sample for sample in report["samples"] if sample["round"] == 0]
    cells = list(dict.fromkeys(sample["cell"] for sample in samples))
    with _figure(path, len(cells)) as axes:
        for panel, cell in zip(axes, cells, strict=True):
            for sample in samples:
                if sample["cell"] == cell:
                    rates = _smooth(sample["tokens_by_second"])
                    panel.plot(range(len(rates)), rates, label=sample["arm"])
            panel.set(title=f"{cell} tokens", xlabel="seconds", ylabel="tokens/s", ylim=(0, None))
            panel.legend(frameon=False)


def bars(report: Report, path: Path, *, value: str, label: str, name: str) -> None:
    """One bar per line of the summary."""
    lines = report["summary"]
    with _figure(path, 1) as (panel,):
        names = [str(line[name]) for line in lines]
        panel.barh(names, [line[value] or 0.0 for line in lines])
        panel.invert_yaxis()
        panel.set(xlabel=label)


def overhead(report: Report, path: Path) -> None:
    """Share of a decode step by part, over the window; on a GPU of the host's time alone."""
    lines, gpu = report["summary"], report["settings"]["gpu"]
    parts = ("eviction", "scheduler") if gpu else ("eviction", "query ring", "scheduler")
    with _figure(path, 1) as (panel,):
        bottom = [0.0] * len(lines)
        names = [str(line["window"]) for line in lines]
        for part in parts:
            shares = [100 * line["shares"].get(part, 0.0) for line in lines]
            panel.bar(names, shares, bottom=bottom, label=part)
            bottom = [low + share for low, share in zip(bottom, shares, strict=True)]
        what = "host time, % of decode time" if gpu else "% of decode time"
        panel.set(xlabel="window", ylabel=what)
        panel.legend(frameon=False)


def _smooth(bins: list[int], width: int = 5) -> list[float]:
    """Means over `width` seconds; the last second is cut and says nothing."""
    whole = bins[:-1] or bins
    return [
        sum(whole[max(0, i - width + 1) : i + 1]) / min(width, i + 1) for i in range(len(whole))
    ]
