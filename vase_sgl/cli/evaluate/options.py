"""Options that subcommands of `vase-sgl eval` share, and lists in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

Tasks = Annotated[
    list[str] | None,
    typer.Option(
        help="NAME, NAME:FILE.jsonl or NAME:hf:DATASET[:SPLIT], with ?parameter=value after it; "
        "commas between several, or repeat. `passkey` and `state-tracking` need no data.",
        show_default=False,
    ),
]
Policies = Annotated[
    list[str],
    typer.Option(
        help="Arms: a policy, POLICY+keep (the prompt is never evicted), POLICY?field=value, "
        "full, full-constrained (with the flags other evicting engines need), full-fp8 (float8 "
        "KV), or `matrix` for all of them.",
    ),
]
Budgets = Annotated[
    str | None,
    typer.Option(help="KV entries kept per layer and KV head: 128,256,512.", show_default=False),
]
Window = Annotated[int, typer.Option(help="Recent tokens never evicted.", min=1)]
Seeds = Annotated[int, typer.Option(help="Samples of every item, each with its own seed.", min=1)]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "--model-path",
        help="Start a worker with this model, and another for arms that need other flags.",
    ),
]
Worker = Annotated[
    list[str] | None,
    typer.Option(
        help="A worker that runs: URL, or constrained=URL or fp8=URL for the arms that need one."
    ),
]
Gateway = Annotated[
    list[str] | None,
    typer.Option(
        help="A gateway that runs, in the same way: HOST:PORT. Every row can be replayed."
    ),
]
Output = Annotated[
    Path, typer.Option("--output", "-o", help="Folder of the run. An unfinished run goes on there.")
]
Limit = Annotated[
    int | None,
    typer.Option(help="Items per task; without it all of them.", min=1, show_default=False),
]
RunSeed = Annotated[
    int, typer.Option(help="Seed that generated items and request seeds come from.", min=0)
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", min=1)]
Temperature = Annotated[float, typer.Option(help="0 is greedy, with one seed.", min=0)]
TopP = Annotated[float, typer.Option(min=0, max=1)]
TopK = Annotated[int, typer.Option(help="-1: all.", min=-1)]
OpensThink = Annotated[
    bool,
    typer.Option(
        "--opens-think",
        help="The model's chat template ends in `<think>`, so answers begin inside a thought.",
    ),
]
Concurrency = Annotated[int, typer.Option(help="Requests at once.", min=1)]
Price = Annotated[
    float | None,
    typer.Option(
        help="What the machine costs an hour; the report then shows a price per completed task.",
        min=0,
        show_default=False,
    ),
]
WorkerArgs = Annotated[
    list[str] | None,
    typer.Option(
        "--worker-arg",
        help="Flag of every worker that --model starts, as --worker-arg=--max-total-tokens=8192; "
        "repeatable.",
    ),
]


def parts_of(option: str, values: Sequence[str]) -> list[str]:
    """The values of a repeatable option, each a list with commas."""
    parts = [part.strip() for value in values for part in value.split(",")]
    if "" in parts:
        raise typer.BadParameter("there is nothing between two commas", param_hint=option)
    if len(set(parts)) != len(parts):
        raise typer.BadParameter("names something twice", param_hint=option)
    return parts


def numbers_of(budgets: str | None) -> list[int]:
    if budgets is None:
        return []
    parts = parts_of("--budgets", [budgets])
    for part in parts:
        if not part.isdecimal():
            raise typer.BadParameter(f"{part!r} is not a number", param_hint="--budgets")
    return [int(part) for part in parts]
