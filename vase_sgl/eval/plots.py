"""Plots of a report as SVG text, without a display and without fonts of their own."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_SIZE = (7.2, 4.0)
_MARKERS = "osD^vP*Xh<>"


@dataclasses.dataclass(frozen=True)
class Point:
    """One cell in a plot. x: budget, or slots; None for a full cache over budgets.

    low, high: the interval of y, if it has one. beside_prompt: its budget is of generated tokens
    alone, so that it holds more than others of the same budget.
    """

    arm: str
    x: float | None
    y: float
    low: float | None = None
    high: float | None = None
    beside_prompt: bool = False


def over_budget(title: str, y_label: str, points: Sequence[Point], styles: Styles) -> str:
    """A line per arm over the budget, with intervals; full caches as level lines.

    Lines of arms that keep the prompt beside their budget are dotted, with hollow markers.
    """

    def draw(axes: Axes) -> None:
        arms = dict.fromkeys(point.arm for point in points)
        budgets = sorted({point.x for point in points if point.x is not None})
        for number, arm in enumerate(arms):
            mine = sorted((p for p in points if p.arm == arm), key=lambda p: p.x or 0)
            style = styles[arm]
            if mine[0].x is None:
                (level,) = mine
                axes.axhline(level.y, label=arm, color=style["color"], linestyle="--")
                if level.low is not None and level.high is not None:
                    axes.axhspan(level.low, level.high, color=style["color"], alpha=0.07)
                continue
            # Side by side, so that intervals of the same budget can be told apart.
            shift = 1 + 0.012 * (number - len(arms) / 2)
            if mine[0].beside_prompt:
                style = {**style, "linestyle": ":", "markerfacecolor": "none"}
            axes.errorbar(
                [(p.x or 0) * shift for p in mine],
                [p.y for p in mine],
                yerr=_errors(mine),
                label=arm,
                capsize=2,
                linewidth=1.2,
                markersize=5,
                **style,
            )
        if budgets:
            axes.set_xscale("log", base=2)
            axes.set_xticks(budgets, [f"{budget:g}" for budget in budgets])
            axes.minorticks_off()
        label = "budget (KV entries kept per layer and KV head)"
        if any(point.beside_prompt for point in points):
            label += "\ndotted, hollow: kept beside the whole prompt"
        axes.set_xlabel(label)
        axes.set_ylabel(y_label)

    return _svg(title, draw)


def pareto(
    title: str,
    y_label: str,
    points: Sequence[Point],
    front: Sequence[Point],
    styles: Styles,
) -> str:
    """Every cell over the slots it takes; those on the front are joined."""

    def draw(axes: Axes) -> None:
        for arm in dict.fromkeys(point.arm for point in points):
            mine = [p for p in points if p.arm == arm]
            axes.errorbar(
                [p.x or 0 for p in mine],
                [p.y for p in mine],
                yerr=_errors(mine),
                label=arm,
                linestyle="none",
                capsize=2,
                markersize=6,
                **styles[arm],
            )
        ordered = sorted(front, key=lambda p: p.x or 0)
        axes.step(
            [p.x or 0 for p in ordered],
            [p.y for p in ordered],
            where="post",
            color="black",
            linewidth=0.8,
            linestyle=":",
            label="Pareto front",
        )
        axes.set_xlabel("KV slots per request (mean)")
        axes.set_ylabel(y_label)

    return _svg(title, draw)


#: How an arm is drawn, the same in every plot.
Styles = Mapping[str, Mapping[str, Any]]


def styles_of(arms: Sequence[str]) -> Styles:
    """A colour and a marker per arm; full caches are grey to black."""
    colors = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
    full = [arm for arm in arms if arm.startswith("full")]
    styles = {
        arm: {"color": str(0.55 * number / max(len(full), 1)), "marker": "s"}
        for number, arm in enumerate(full)
    }
    for number, arm in enumerate(arm for arm in arms if arm not in full):
        color = colors[number % len(colors)]
        styles[arm] = {
            "color": matplotlib.colors.to_hex(color),
            "marker": _MARKERS[(number + number // len(colors)) % len(_MARKERS)],
        }
    return styles


def _errors(points: Sequence[Point]) -> tuple[list[float], list[float]] | None:
    if any(p.low is None or p.high is None for p in points):
        return None
    return (
        [max(p.y - (p.low or 0.0), 0.0) for p in points],
        [max((p.high or 0.0) - p.y, 0.0) for p in points],
    )


def _svg(title: str, draw: Callable[[Axes], None]) -> str:
    """The same text for the same content: no date, no random ids."""
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    draw(axes)
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    columns = math.ceil(len(labels) / 14)
    figure.legend(handles, labels, loc="outside right upper", fontsize=7, ncols=columns)
    text = io.StringIO()
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif"}
    ):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    drawing = text.getvalue()
    return drawing[drawing.index("<svg") :]
