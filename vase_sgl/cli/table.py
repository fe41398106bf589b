"""Tables of names and ids, which are there to be copied."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A line per row on stdout, whole in any terminal and in pipes."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*header, box=None, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*row)
    Console(width=1000).print(table)
