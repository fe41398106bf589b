"""`vase-sgl eval run` and `trace`: a worker or a gateway answers under every arm."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vase_sgl.cli.connection import (
    ApiKey,
    CaFile,
    ClientCert,
    ClientKey,
    TlsFlag,
    connect_async,
    encryption,
)
from vase_sgl.cli.evaluate.options import (
    Budgets,
    Concurrency,
    Gateway,
    Limit,
    MaxNewTokens,
    Model,
    OpensThink,
    Output,
    Policies,
    Price,
    RunSeed,
    Seeds,
    Tasks,
    Temperature,
    TopK,
    TopP,
    Window,
    Worker,
    WorkerArgs,
    numbers_of,
    parts_of,
)
from vase_sgl.cli.evaluate.reporting import write_report
from vase_sgl.cli.evaluate.resuming import resumable
from vase_sgl.cli.failures import reported

if TYPE_CHECKING:
    from vase_sgl.eval.connecting import Dial
    from vase_sgl.eval.items import Task
    from vase_sgl.eval.targets import Sampling


def run(
    context: typer.Context,
    tasks: Tasks = None,
    policies: Policies = ["full", "vase-attnv"],  # noqa: B006
    budgets: Budgets = None,
    window: Window = 64,
    seeds: Seeds = 1,
    model: Model = None,
    worker: Worker = None,
    gateway: Gateway = None,
    output: Output = Path("eval"),
    limit: Limit = None,
    seed: RunSeed = 0,
    max_new_tokens: MaxNewTokens = 2048,
    temperature: Temperature = 0.6,
    top_p: TopP = 0.95,
    top_k: TopK = -1,
    opens_think: OpensThink = False,
    concurrency: Concurrency = 16,
    price_per_hour: Price = None,
    worker_arg: WorkerArgs = None,
    api_key: ApiKey = None,
    tls: TlsFlag = False,
    ca_file: CaFile = None,
    client_cert: ClientCert = None,
    client_key: ClientKey = None,
) -> None:
    """Ask every item of every task under every arm, budget and seed; then write the report.

    One JSON line per sample goes to OUTPUT/rows.jsonl. After an interruption the same command goes
    on where it was. Exit status: 0 done, 1 an error or samples without an outcome, 130 interrupted.
    """
    if context.invoked_subcommand is not None:
        _refuse_options_before(context)
        return
    from vase_sgl.eval.targets import Sampling
    from vase_sgl.eval.tasks import TaskError, open_task

    specs = parts_of("--tasks", tasks or [])
    if not specs:
        raise typer.BadParameter("name at least one task", param_hint="--tasks")
    with reported(TaskError, ValueError):
        opened = [open_task(spec) for spec in specs]
    _evaluate(
        opened,
        specs,
        policies=policies,
        budgets=budgets,
        window=window,
        seeds=seeds,
        model=model,
        worker=worker,
        gateway=gateway,
        output=output,
        limit=limit,
        seed=seed,
        sampling=Sampling(max_new_tokens, temperature, top_p, top_k, opens_think),
        concurrency=concurrency,
        price_per_hour=price_per_hour,
        worker_arg=worker_arg,
        dial=partial(
            connect_async,
            api_key=api_key,
            tls=encryption(tls, ca_file, client_cert, client_key),
        ),
    )


def trace(
    file: Annotated[
        Path,
        typer.Argument(
            help="JSON lines, a conversation each: {messages: […], tools: […]}.", exists=True
        ),
    ],
    policies: Policies = ["full", "vase-attnv"],  # noqa: B006
    budgets: Budgets = None,
    window: Window = 64,
    seeds: Seeds = 1,
    model: Model = None,
    worker: Worker = None,
    gateway: Gateway = None,
    output: Output = Path("eval-trace"),
    limit: Annotated[
        int | None, typer.Option(help="Conversations; without it all.", min=1, show_default=False)
    ] = None,
    seed: RunSeed = 0,
    max_new_tokens: MaxNewTokens = 1024,
    temperature: Temperature = 0.6,
    top_p: TopP = 0.95,
    top_k: TopK = -1,
    opens_think: OpensThink = False,
    concurrency: Concurrency = 16,
    price_per_hour: Price = None,
    worker_arg: WorkerArgs = None,
    api_key: ApiKey = None,
    tls: TlsFlag = False,
    ca_file: CaFile = None,
    client_cert: ClientCert = None,
    client_key: ClientKey = None,
) -> None:
    """Replay recorded agent conversations turn by turn under every arm; cost per completed trace.

    Each assistant turn is generated anew after the recorded messages before it, so that all arms
    see the same context. A turn counts as right if it calls the tools that the recorded one called,
    with the same arguments.
    """
    from vase_sgl.eval.targets import Sampling
    from vase_sgl.eval.trace import TraceError, TraceTask

    with reported(TraceError):
        task = TraceTask.read(file, limit)
    _evaluate(
        [task],
        [task.name],
        policies=policies,
        budgets=budgets,
        window=window,
        seeds=seeds,
        model=model,
        worker=worker,
        gateway=gateway,
        output=output,
        limit=None,
        seed=seed,
        sampling=Sampling(max_new_tokens, temperature, top_p, top_k, opens_think),
        concurrency=concurrency,
        price_per_hour=price_per_hour,
        worker_arg=worker_arg,
        dial=partial(
            connect_async,
            api_key=api_key,
            tls=encryption(tls, ca_file, client_cert, client_key),
        ),
    )


def _evaluate(
    tasks: Sequence[Task],
    specs: Sequence[str],
    *,
    policies: Sequence[str],
    budgets: str | None,
    window: int,
    seeds: int,
    model: str | None,
    worker: list[str] | None,
    gateway: list[str] | None,
    output: Path,
    limit: int | None,
    seed: int,
    sampling: Sampling,
    concurrency: int,
    price_per_hour: float | None,
    worker_arg: list[str] | None,
    dial: Dial,
) -> None:
    """Run, showing progress, then report."""
    from vase_sgl.eval.arms import ArmError, plan
    from vase_sgl.eval.configuration import Configuration, ConfigurationError, items_digest
    from vase_sgl.eval.connecting import Places, by_worker, connect
    from vase_sgl.eval.progress import Progress
    from vase_sgl.eval.rows import RowError
    from vase_sgl.eval.runner import Asked, Run, RunStopped
    from vase_sgl.eval.targets import TargetError

    if sampling.temperature == 0 and seeds > 1:
        raise typer.BadParameter(
            "greedy answers are the same for every seed, and copies would narrow the intervals; "
            "use --seeds 1 or a temperature above 0",
            param_hint="--temperature",
        )
    with reported(ArmError, ConfigurationError, RowError, TargetError, RunStopped, ValueError):
        arms = plan(parts_of("--policies", policies), numbers_of(budgets), window)
        places = Places(
            by_worker("--worker", worker or []),
            by_worker("--gateway", gateway or []),
            model,
            worker_arg or [],
        )
        places.check(arms)
        asked = [Asked(task, task.items(limit, seed)) for task in tasks]
        configuration = Configuration(
            tasks=tuple(specs),
            items={each.task.name: tuple(i.item_id for i in each.items) for each in asked},
            items_digest=items_digest([item for each in asked for item in each.items]),
            task_digests={each.task.name: items_digest(each.items) for each in asked},
            limit=limit,
            arms=tuple(arms),
            settings=sampling,
            seeds=seeds,
            seed=seed,
        )
        evaluation = Run(output, configuration, asked)
        with (
            resumable(evaluation),
            Progress(
                evaluation.total, len(evaluation.left), warn_of_unopened=not sampling.opens_think
            ) as progress,
        ):
            asyncio.run(
                evaluation.execute(
                    partial(
                        connect,
                        places,
                        folder=output,
                        windows=[arm.window or 0 for arm in arms],
                        dial=dial,
                        say=progress.say,
                    ),
                    concurrency=concurrency,
                    on_row=progress.add,
                )
            )
    write_report([output], output, price_per_hour)


def _refuse_options_before(context: typer.Context) -> None:
    """Options left of a sub-command would be lost."""
    for name in context.params:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = "--" + name.replace("_", "-")
            raise typer.BadParameter(
                f"put it after `{context.invoked_subcommand}`", param_hint=option
            )
