"""An evaluation run that Ctrl-C stops and the same command goes on with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Protocol

import typer


class _Run(Protocol):
    def close(self) -> None: ...


@contextmanager
def resumable(run: _Run) -> Iterator[None]:
    """Close the run at the end of the body; an interruption is said, with exit status 130."""
    with closing(run):
        try:
            yield
        except KeyboardInterrupt:
            typer.echo("interrupted; the same command goes on where it was", err=True)
            raise typer.Exit(130) from None
