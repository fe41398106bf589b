"""Result files: NAME.json with every sample, NAME.md with the table, NAME.svg with the plot."""

from __future__ import annotations

import json
import math
import signal
import statistics
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT, describe

FORMAT = "vase-sgl-benchmark/1"
FOLDER = ROOT / "benchmarks" / "results"
#: Of a result that a dry run wrote; no table shows it.
DRY_RUN = "dry_run"

Report = dict[str, Any]


def new_report(benchmark: str, settings: dict[str, Any], *, dry_run: bool = False) -> Report:
    """A report without samples yet. Call it before measuring: it notes the load of the machine."""
    return {
        "format": FORMAT,
        "benchmark": benchmark,
        DRY_RUN: dry_run,
        "environment": describe(),
        "settings": settings,
    }


@contextmanager
def until_cut(report: Report) -> Iterator[None]:
    """Measure within. SIGTERM, Ctrl-C or an error ends that, not the program.

    What there is can be written then, by `finish`. `report["cut"]` says that it was stopped,
    `report["error"]` what went wrong.
    """

    def cut(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, cut)
    report["cut"] = False
    try:
        yield
    except KeyboardInterrupt:
        report["cut"] = True
        print("cut: writing what was measured", file=sys.stderr, flush=True)
    except SystemExit as error:
        report["error"] = reason(error)
        print(error, file=sys.stderr, flush=True)
    except Exception as error:
        report["error"] = f"{type(error).__name__}: {reason(error)}"
        traceback.print_exc()
    finally:
        signal.signal(signal.SIGTERM, before)


def reason(error: BaseException) -> str:
    """The last line of what an error says: of a worker's log, that is the one that matters."""
    said = str(error).strip().splitlines() or ["no reason given"]
    return said[-1][:200]


def finish(
    report: Report,
    folder: Path,
    name: str,
    *,
    markdown: Callable[[Report], str],
    plot: Callable[[Report, Path], None] | None = None,
) -> int:
    """Write and print what there is. Returns the exit status: 1 if an error ended the measuring."""
    write(report, folder, name, markdown=markdown, plot=plot)
    print(markdown(report), flush=True)
    if "error" in report:
        print(report["error"], file=sys.stderr)
        return 1
    return 0


def write(
    report: Report,
    folder: Path,
    name: str,
    *,
    markdown: Callable[[Report], str],
    plot: Callable[[Report, Path], None] | None = None,
) -> Path:
    """Write what there is; a dry run has no samples, so only its JSON. Returns the JSON's path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps(report, indent=1, default=str) + "\n")
    partial.rename(path)
    if not report[DRY_RUN]:
        (folder / f"{name}.md").write_text(markdown(report))
        if plot is not None:
            picture = folder / f"{name}.svg"
            picture.unlink(missing_ok=True)  # an earlier run's would stand beside this table
            if report["samples"]:
                plot(report, picture)
    return path


def read(path: Path) -> Report:
    """Raises ValueError unless it is a result of this format."""
    report = json.loads(path.read_text())
    if not isinstance(report, dict) or report.get("format") != FORMAT:
        raise ValueError(f"{path.name} is no benchmark result in format {FORMAT}")
    return report


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A markdown table; the first column is text, the others are numbers."""
    lines = [_line(head), _line([":--", *["--:"] * (len(head) - 1)])]
    return "\n".join([*lines, *map(_line, rows)]) + "\n"


def number(value: float | None, digits: int = 3) -> str:
    """`digits` significant digits without an exponent; "-" for None."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}" if abs(value) >= 1e-3 else f"{value:.1e}"


def ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None


def median(values: Iterable[float | None]) -> float | None:
    """Of those that are there."""
    found = [value for value in values if value is not None]
    return statistics.median(found) if found else None


def percentile(values: Sequence[float], share: float) -> float | None:
    """Nearest rank."""
    if not values:
        return None
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def _line(cells: Iterable[object]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"
