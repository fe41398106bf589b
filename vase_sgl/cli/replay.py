"""`vase-sgl replay`: run a record again and compare."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from vase_sgl.cli.connection import DEFAULT_TARGET, ApiKey, AsJson, CaFile, Target, TlsFlag, connect
from vase_sgl.cli.failures import reported

if TYPE_CHECKING:
    from vase_sgl.client import Verdict

#: Exit status by outcome; 1 is an error.
EXIT_STATUS = {"MATCH": 0, "DIVERGED": 3, "INCOMPARABLE": 4}


def register(app: typer.Typer) -> None:
    app.command()(replay)


def replay(
    record_id: Annotated[str, typer.Argument(help="The request id that `generate` showed.")],
    as_json: AsJson = False,
    target: Target = DEFAULT_TARGET,
    api_key: ApiKey = None,
    tls: TlsFlag = False,
    ca_file: CaFile = None,
) -> None:
    """Run a recorded generation again; compare token by token and round by round.

    Exit status: 0 match, 3 diverged, 4 incomparable, 1 error.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from vase_sgl.cli.jsonout import print_json
    from vase_sgl.client import VaseError

    console = Console(stderr=True)
    bar = Progress(
        TextColumn("comparing"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tokens, round {task.fields[round]}"),
        console=console,
        transient=True,
        disable=as_json or not console.is_terminal,
    )
    with reported(VaseError), connect(target, api_key, tls, ca_file) as client, bar:
        running = client.replay(record_id)
        task = bar.add_task("", total=None, round="0")
        for step in running:
            bar.update(
                task,
                completed=step.tokens_compared,
                total=step.tokens_total,
                round=f"{step.rounds_compared}/{step.rounds_total}",
            )
        verdict = running.verdict
    if as_json:
        print_json(verdict)
    else:
        typer.echo(describe(verdict))
    raise typer.Exit(EXIT_STATUS[verdict.outcome])


def describe(verdict: Verdict) -> str:
    """A verdict in words; the first word is the outcome."""
    compared = f"{verdict.tokens_compared} tokens and {verdict.rounds_compared} eviction rounds"
    match verdict.outcome:
        case "MATCH":
            return f"MATCH: {compared} are equal"
        case "INCOMPARABLE":
            lines = [
                f"  {d.key}: recorded {_or_nothing(d.recorded)}, now {_or_nothing(d.current)}"
                for d in verdict.differences
            ]
            return "\n".join(["INCOMPARABLE: another worker made this record", *lines])
        case "DIVERGED":
            lines = [f"DIVERGED after {compared}"]
            if verdict.first_differing_token is not None:
                lines.append(
                    f"  token {verdict.first_differing_token}: "
                    f"expected {_or_end(verdict.expected_token)}, "
                    f"got {_or_end(verdict.actual_token)}"
                )
            if verdict.first_differing_round is not None:
                lines.append(f"  eviction round {verdict.first_differing_round} differs")
            return "\n".join(lines)


def _or_nothing(value: str | None) -> str:
    return "nothing" if value is None else value


def _or_end(token: int | None) -> str:
    return "the end" if token is None else str(token)
