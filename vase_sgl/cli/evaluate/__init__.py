"""`vase-sgl eval`: what does forgetting cost? Arms, tasks, budgets and seeds, and a report."""

from __future__ import annotations

import typer

from vase_sgl.cli.evaluate.forcing import forced
from vase_sgl.cli.evaluate.reporting import report
from vase_sgl.cli.evaluate.sampled import run, trace

_EPILOG = """Examples:

vase-sgl eval --model MODEL --tasks passkey,state-tracking --policies full,vase-attnv,random+keep
--budgets 256,512 --seeds 4 -o out

vase-sgl eval --gateway 127.0.0.1:50051 --tasks math500:math500.jsonl --policies full,vase-attnv
--budgets 1024

vase-sgl eval trace conversations.jsonl --worker http://127.0.0.1:30000 --policies full,vase-attnv
--budgets 2048

vase-sgl eval forced gpl-3.txt --model MODEL --policies full,vase-attnv,streaming --budgets 128,256

vase-sgl eval report out eval-forced"""


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
