"""`vase-sgl replay`: run a record again and compare."""

from __future__ import annotations

import asyncio
import datetime
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, TextIO

import typer

from vase_sgl.cli.connection import (
    DEFAULT_TARGET,
    ApiKey,
    AsJson,
    CaFile,
    ClientCert,
    ClientKey,
    Target,
    TlsFlag,
    connect,
    connect_async,
    encryption,
)
from vase_sgl.cli.failures import reported

if TYPE_CHECKING:
    from vase_sgl.client import AsyncClient, Tls, Verdict

#: Exit status by outcome; 1 is an error.
EXIT_STATUS = {"MATCH": 0, "DIVERGED": 3, "INCOMPARABLE": 4}


def register(app: typer.Typer) -> None:
    app.command()(replay)


def replay(
    record_id: Annotated[
        str | None, typer.Argument(help="The request id that `generate` showed.")
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(help="Instead of one: what arrived at this date or time (UTC), or later."),
    ] = None,
    until: Annotated[str | None, typer.Option(help="With --since: what arrived before.")] = None,
    sample: Annotated[
        str | None,
        typer.Option(help="With --since: the share of the records to replay.", show_default="100%"),
    ] = None,
    sample_seed: Annotated[
        int | None,
        typer.Option(help="With --since: another seed chooses other records.", show_default="0"),
    ] = None,
    parallel: Annotated[
        int | None,
        typer.Option(min=1, help="With --since: replays to ask for at once.", show_default="2"),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="With --since: new JSON file for every verdict.")
    ] = None,
    as_json: AsJson = False,
    target: Target = DEFAULT_TARGET,
    api_key: ApiKey = None,
    tls: TlsFlag = False,
    ca_file: CaFile = None,
    client_cert: ClientCert = None,
    client_key: ClientKey = None,
) -> None:
    """Run recorded generations again; compare token by token and round by round.

    Exit status: 0 match, 3 diverged, 4 incomparable, 1 error. With --since the worst of them all,
    in the order 3, 1, 4; 5 if there was nothing to replay; 130 if it was interrupted.
    """
    if (record_id is None) == (since is None):
        raise typer.BadParameter("give a record id, or --since for many", param_hint="--since")
    encrypted = encryption(tls, ca_file, client_cert, client_key)
    if record_id is not None:
        many: dict[str, object] = {"--until": until, "--sample": sample, "--report": report}
        many |= {"--sample-seed": sample_seed, "--parallel": parallel}
        for option, value in many.items():
            if value is not None:
                raise typer.BadParameter("needs --since", param_hint=option)
        _replay_one(record_id, as_json, target, api_key, encrypted)
    from vase_sgl.cli import replay_many, times
    from vase_sgl.client import VaseError

    start = times.moment(str(since), "--since")
    end = None if until is None else times.moment(until, "--until")
    share = replay_many.share(sample or "100%")
    with reported(VaseError, OSError):
        try:
            status = asyncio.run(
                _replay_many(
                    partial(connect_async, target, api_key, encrypted),
                    (start, end),
                    share,
                    sample_seed or 0,
                    parallel or 2,
                    report,
                    as_json,
                )
            )
        except (KeyboardInterrupt, asyncio.CancelledError):
            status = replay_many.INTERRUPTED
    raise typer.Exit(status)


def _replay_one(
    record_id: str,
    as_json: bool,
    target: str,
    api_key: str | None,
    tls: Tls | None,
) -> NoReturn:
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
    with reported(VaseError), connect(target, api_key, tls) as client, bar:
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


async def _replay_many(
    connect: Callable[[], AsyncClient],
    period: tuple[datetime.datetime, datetime.datetime | None],
    share: float,
    seed: int,
    parallel: int,
    report: Path | None,
    as_json: bool,
) -> int:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from vase_sgl.cli import replay_many
    from vase_sgl.cli.jsonout import print_json, write_json

    console = Console(stderr=True)
    counts: dict[str, int] = {}
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=as_json or not console.is_terminal,
    )
    with _terminated_as_interrupted(), _new_file(report) as file:
        async with connect() as client:
            records = client.list_records(page_size=1000, since=period[0], until=period[1])
            sample = await replay_many.choose(records, share, seed)
            begun = time.monotonic()
            with bar:
                task = bar.add_task("replaying", total=len(sample.chosen))

                def count(done: replay_many.Replayed) -> None:
                    counts[done.outcome] = counts.get(done.outcome, 0) + 1
                    words = ", ".join(f"{number} {name}" for name, number in counts.items())
                    bar.update(task, advance=1, description=words)

                results = await replay_many.replay_all(
                    client, sample.chosen, parallel=parallel, on_done=count
                )
            seconds = time.monotonic() - begun
        interrupted = len(results) < len(sample.chosen)
        content = {
            "since": period[0],
            "until": period[1],
            "sample": share,
            "sample_seed": seed,
            "listed": sample.listed,
            "not_known": sample.not_known,
            "not_kept": sample.not_kept,
            "interrupted": interrupted,
            **replay_many.summarize(results, seconds),
            "records": results,
        }
        if file is not None:
            write_json(file, content)
    if as_json:
        print_json(content)
    elif results:
        replay_many.show(Console(markup=False, soft_wrap=True), sample, results, seconds)
    else:
        typer.echo(
            f"nothing to replay: {sample.listed} completed records in that time, "
            f"{sample.not_kept} of the sample hold digests only, {sample.not_known} are of a newer "
            "gateway"
        )
    if interrupted:
        typer.echo(f"interrupted after {len(results)} of {len(sample.chosen)} replays", err=True)
        return replay_many.INTERRUPTED
    return replay_many.exit_status(results)


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM cancels the task of the body, as Ctrl-C does under `asyncio.run`."""
    if threading.current_thread() is not threading.main_thread():
        yield  # where no signal arrives
        return
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    before = signal.signal(
        signal.SIGTERM, lambda number, frame: loop.call_soon_threadsafe(task.cancel)
    )
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _new_file(path: Path | None) -> Iterator[TextIO | None]:
    """A file of that name, if there is one; a body that fails leaves none.

    Opened at once: hours of replays must not end at a file that cannot be written.
    """
    if path is None:
        yield None
        return
    with path.open("x", encoding="utf-8") as file:
        try:
            yield file
        except BaseException:
            path.unlink()
            raise


def describe(verdict: Verdict) -> str:
    """A verdict in words; the first word is the outcome."""
    return "\n".join([_outcome(verdict), *_SEED_CHECKS.get(verdict.seed_check, ())])


#: What is said of recorded seeds that could not be derived again. A replay takes those recorded.
_SEED_CHECKS = {
    "MISMATCH": [
        "  the recorded seeds are not what the tenant's master secret gives, or not its own"
    ],
    "VERSION_REMOVED": [
        "  the seeds cannot be derived again: their version of the tenant's master secret was "
        "removed"
    ],
}


def _outcome(verdict: Verdict) -> str:
    compared = f"{verdict.tokens_compared} tokens and {verdict.rounds_compared} eviction rounds"
    differences = [
        f"  {d.key}: recorded {_or_nothing(d.recorded)}, now {_or_nothing(d.current)}"
        for d in verdict.differences
    ]
    match verdict.outcome:
        case "MATCH":
            return f"MATCH: {compared} are equal"
        case "INCOMPARABLE":
            recorded = {d.key: d.recorded for d in verdict.differences}
            if "num_retractions" in recorded:
                why = f"one of the two was retracted; {compared} are equal, and then one differs"
            elif "finish_reason" in recorded:
                why = f"a ceiling of the worker ended the replay early; {compared} are equal"
            elif recorded.get("deterministic") == "false":
                why = "the worker that made this record was not deterministic"
            else:
                why = "another worker made this record"
            return "\n".join([f"INCOMPARABLE: {why}", *differences])
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
            return "\n".join([*lines, *differences])


def _or_nothing(value: str | None) -> str:
    return "nothing" if value is None else value


def _or_end(token: int | None) -> str:
    return "the end" if token is None else str(token)
