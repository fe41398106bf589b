"""`vase-sgl eval`: what does forgetting cost? Arms, tasks, budgets and seeds, and a report."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vase_sgl.cli.connection import ApiKey, CaFile, TlsFlag, connect_async
from vase_sgl.cli.failures import reported

if TYPE_CHECKING:
    from vase_sgl.eval.items import Task

_EPILOG = """Examples:

vase-sgl eval --model MODEL --tasks passkey,state-tracking --policies full,vase-attnv,random+keep
--budgets 256,512 --seeds 4 -o out

vase-sgl eval --gateway 127.0.0.1:50051 --tasks math500:math500.jsonl --policies full,vase-attnv
--budgets 1024

vase-sgl eval trace conversations.jsonl --worker http://127.0.0.1:30000 --policies full,vase-attnv
--budgets 2048

vase-sgl eval forced gpl-3.txt --model MODEL --policies full,vase-attnv,streaming --budgets 128,256

vase-sgl eval report out eval-forced"""

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


def register(app: typer.Typer) -> None:
    evaluation = typer.Typer(
        help="Compare full caches and eviction policies on tasks: answers, loops, memory, cost.",
        invoke_without_command=True,
        epilog=_EPILOG,
        no_args_is_help=True,
    )
    evaluation.callback()(run)
    evaluation.command("run", epilog=_EPILOG, help="The same as `vase-sgl eval` alone.")(run)
    evaluation.command()(trace)
    evaluation.command()(forced)
    evaluation.command()(report)
    app.add_typer(evaluation, name="eval")


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
) -> None:
    """Ask every item of every task under every arm, budget and seed; then write the report.

    One JSON line per sample goes to OUTPUT/rows.jsonl. After an interruption the same command goes
    on where it was. Exit status: 0 done, 1 an error or samples without an outcome, 130 interrupted.
    """
    if context.invoked_subcommand is not None:
        _refuse_options_before(context)
        return
    from vase_sgl.eval.tasks import TaskError, open_task

    specs = _parts("--tasks", tasks or [])
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
        sampling=(max_new_tokens, temperature, top_p, top_k, opens_think),
        concurrency=concurrency,
        price_per_hour=price_per_hour,
        worker_arg=worker_arg,
        connection=(api_key, tls, ca_file),
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
) -> None:
    """Replay recorded agent conversations turn by turn under every arm; cost per completed trace.

    Each assistant turn is generated anew after the recorded messages before it, so that all arms
    see the same context. A turn counts as right if it calls the tools that the recorded one called,
    with the same arguments.
    """
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
        sampling=(max_new_tokens, temperature, top_p, top_k, opens_think),
        concurrency=concurrency,
        price_per_hour=price_per_hour,
        worker_arg=worker_arg,
        connection=(api_key, tls, ca_file),
    )


def forced(
    texts: Annotated[list[Path], typer.Argument(help="Plain text files.", exists=True)],
    model: Annotated[
        str, typer.Option("--model", "--model-path", help="Folder of a transformers causal LM.")
    ],
    tasks: Annotated[
        list[str],
        typer.Option(
            help="nll: loss on consecutive chunks of the texts. passkey-forced, state-forced: a "
            "fact, a long passage of text as the thought, then the question.",
        ),
    ] = ["nll"],  # noqa: B006
    policies: Policies = ["full", "vase-attnv"],  # noqa: B006
    budgets: Budgets = None,
    window: Window = 64,
    seeds: Annotated[int, typer.Option(help="Eviction seeds per item.", min=1)] = 1,
    output: Output = Path("eval-forced"),
    seed: RunSeed = 0,
    prompt_tokens: Annotated[int, typer.Option(help="nll: cached whole, not scored.", min=1)] = 64,
    forced_tokens: Annotated[int, typer.Option(help="nll: scored tokens a chunk.", min=1)] = 1024,
    chunks: Annotated[int, typer.Option(help="nll: chunks per text.", min=1)] = 4,
    thought_tokens: Annotated[int, typer.Option(help="Length of a forced thought.", min=1)] = 1024,
    items: Annotated[int, typer.Option(help="Items per text of the other tasks.", min=1)] = 8,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
) -> None:
    """Force recorded text through each arm's KV cache, in this process; loss and greedy answers.

    Every arm reads the same tokens, so arms differ by what they forgot alone. Needs torch and
    transformers, no worker. After an interruption the same command goes on where it was.
    """
    from vase_sgl.eval.arms import ArmError, plan
    from vase_sgl.eval.configuration import ConfigurationError
    from vase_sgl.eval.forced_run import ForcedRun, ForcedTexts
    from vase_sgl.eval.progress import Progress
    from vase_sgl.eval.rows import RowError

    with reported(ArmError, ConfigurationError, RowError, OSError, ValueError):
        run = ForcedRun(
            output,
            model,
            ForcedTexts(
                tuple(texts),
                tuple(_parts("--tasks", tasks)),
                dtype=dtype,
                prompt_tokens=prompt_tokens,
                forced_tokens=forced_tokens,
                chunks=chunks,
                thought_tokens=thought_tokens,
                items=items,
            ),
            plan(_parts("--policies", policies), _numbers(budgets), window),
            seeds=seeds,
            seed=seed,
        )
        try:
            with Progress(total=run.total, left=run.left) as progress:
                run.execute(progress.add)
        except KeyboardInterrupt:
            typer.echo("interrupted; the same command goes on where it was", err=True)
            raise typer.Exit(130) from None
        finally:
            run.close()
    _write_report([output], output, None)


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
    _write_report(inputs, where, price_per_hour)


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
    sampling: tuple[int, float, float, int, bool],
    concurrency: int,
    price_per_hour: float | None,
    worker_arg: list[str] | None,
    connection: tuple[str | None, bool, Path | None],
) -> None:
    """Run, showing progress, then report."""
    from vase_sgl.eval.arms import ArmError, plan
    from vase_sgl.eval.configuration import Configuration, ConfigurationError, items_digest
    from vase_sgl.eval.connecting import Places, by_worker, connect
    from vase_sgl.eval.progress import Progress
    from vase_sgl.eval.rows import RowError
    from vase_sgl.eval.runner import Asked, Run, RunStopped
    from vase_sgl.eval.targets import Sampling, TargetError

    if sampling[1] == 0 and seeds > 1:
        raise typer.BadParameter(
            "greedy answers are the same for every seed, and copies would narrow the intervals; "
            "use --seeds 1 or a temperature above 0",
            param_hint="--temperature",
        )
    key, tls, ca_file = connection
    with reported(ArmError, ConfigurationError, RowError, TargetError, RunStopped, ValueError):
        arms = plan(_parts("--policies", policies), _numbers(budgets), window)
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
            limit=limit,
            arms=tuple(arms),
            settings=Sampling(*sampling),
            seeds=seeds,
            seed=seed,
        )
        evaluation = Run(output, configuration, asked)
        try:
            with Progress(
                evaluation.total, len(evaluation.left), warn_of_unopened=not sampling[4]
            ) as progress:
                asyncio.run(
                    evaluation.execute(
                        partial(
                            connect,
                            places,
                            folder=output,
                            windows=[arm.window or 0 for arm in arms],
                            dial=partial(connect_async, api_key=key, tls=tls, ca_file=ca_file),
                            say=progress.say,
                        ),
                        concurrency=concurrency,
                        on_row=progress.add,
                    )
                )
        except KeyboardInterrupt:
            typer.echo("interrupted; the same command goes on where it was", err=True)
            raise typer.Exit(130) from None
        finally:
            evaluation.close()
    _write_report([output], output, price_per_hour)


def _write_report(inputs: Sequence[Path], where: Path, price_per_hour: float | None) -> None:
    from vase_sgl.eval.cells import IncompleteError, load
    from vase_sgl.eval.configuration import ConfigurationError
    from vase_sgl.eval.report import write
    from vase_sgl.eval.rows import RowError
    from vase_sgl.eval.statistics import IncompleteCellError

    with reported(IncompleteError, IncompleteCellError, ConfigurationError, RowError):
        pages = write(load(inputs), where, price_per_hour)
    typer.echo(" ".join(str(page) for page in pages))


def _parts(option: str, values: Sequence[str]) -> list[str]:
    """The values of a repeatable option, each a list with commas."""
    parts = [part.strip() for value in values for part in value.split(",")]
    if "" in parts:
        raise typer.BadParameter("there is nothing between two commas", param_hint=option)
    if len(set(parts)) != len(parts):
        raise typer.BadParameter("names something twice", param_hint=option)
    return parts


def _numbers(budgets: str | None) -> list[int]:
    if budgets is None:
        return []
    parts = _parts("--budgets", [budgets])
    for part in parts:
        if not part.isdecimal():
            raise typer.BadParameter(f"{part!r} is not a number", param_hint="--budgets")
    return [int(part) for part in parts]


def _refuse_options_before(context: typer.Context) -> None:
    """Options left of a sub-command would be lost."""
    for name in context.params:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = "--" + name.replace("_", "-")
            raise typer.BadParameter(
                f"put it after `{context.invoked_subcommand}`", param_hint=option
            )
