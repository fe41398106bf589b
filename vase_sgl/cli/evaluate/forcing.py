"""`vase-sgl eval forced`: recorded text through every arm's cache, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vase_sgl.cli.evaluate.options import (
    Budgets,
    Output,
    Policies,
    RunSeed,
    Window,
    numbers_of,
    parts_of,
)
from vase_sgl.cli.evaluate.reporting import write_report
from vase_sgl.cli.evaluate.resuming import resumable
from vase_sgl.cli.failures import reported


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
                tuple(parts_of("--tasks", tasks)),
                dtype=dtype,
                prompt_tokens=prompt_tokens,
                forced_tokens=forced_tokens,
                chunks=chunks,
                thought_tokens=thought_tokens,
                items=items,
            ),
            plan(parts_of("--policies", policies), numbers_of(budgets), window),
            seeds=seeds,
            seed=seed,
        )
        with resumable(run), Progress(total=run.total, left=run.left) as progress:
            run.execute(progress.add)
    write_report([output], output, None)
