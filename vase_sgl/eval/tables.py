"""Markdown tables and the numbers in them."""

from __future__ import annotations

from collections.abc import Sequence

from vase_sgl.eval.statistics import Estimate

NOTHING = "-"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are aligned to the right."""
    lines = [list(header), ["---", *("---:" for _ in header[1:])], *map(list, rows)]
    return "\n".join(f"| {' | '.join(cell(part) for part in line)} |" for line in lines)


def cell(text: str) -> str:
    """Text that cannot end its cell."""
    return text.replace("|", "\\|").replace("\n", " ")


def percent(estimate: Estimate) -> str:
    """A share with its interval, in percent."""
    return f"{_hundred(estimate.value)} [{_hundred(estimate.low)}, {_hundred(estimate.high)}]"


def points(estimate: Estimate) -> str:
    """A difference of shares with its interval, in percentage points."""
    value, low, high = (100 * v for v in (estimate.value, estimate.low, estimate.high))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def number(estimate: Estimate) -> str:
    """A value with its interval."""
    return f"{estimate.value:.4f} [{estimate.low:.4f}, {estimate.high:.4f}]"


def difference(estimate: Estimate) -> str:
    """A difference of values with its interval."""
    return f"{estimate.value:+.4f} [{estimate.low:+.4f}, {estimate.high:+.4f}]"


def p_value(value: float) -> str:
    """Three digits, or that it is less."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def plain(value: float | None, digits: int = 1) -> str:
    """A number without an interval; `-` for none."""
    return NOTHING if value is None else f"{value:.{digits}f}"


def _hundred(share: float) -> str:
    return f"{100 * share:.1f}"
