"""`vase-sgl eval report`: rows to HTML and Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from vase_sgl.cli.evaluate.options import Price
from vase_sgl.cli.failures import reported


def report(
    inputs: Annotated[
        list[Path],
        typer.Argument(help="Folders of runs, or files of rows; together one comparison."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder for the report; without it that of the first input."
        ),
    ] = None,
    price_per_hour: Price = None,
) -> None:
    """Write report.html (opens without a network), report.md and its plots.

    Refuses incomplete or unpaired cells by name, with exit status 1.
    """
    for path in inputs:
        if not path.exists():
            raise typer.BadParameter(f"{path} does not exist", param_hint="inputs")
    where = output or (inputs[0] if inputs[0].is_dir() else inputs[0].parent)
    write_report(inputs, where, price_per_hour)


def write_report(inputs: Sequence[Path], where: Path, price_per_hour: float | None) -> None:
    """Write the report of `inputs` into folder `where` and say where it is."""
    from vase_sgl.eval.cells import IncompleteError, load
    from vase_sgl.eval.configuration import ConfigurationError
    from vase_sgl.eval.report import write
    from vase_sgl.eval.rows import RowError
    from vase_sgl.eval.statistics import IncompleteCellError

    with reported(IncompleteError, IncompleteCellError, ConfigurationError, RowError):
        pages = write(load(inputs), where, price_per_hour)
    typer.echo(" ".join(str(page) for page in pages))
