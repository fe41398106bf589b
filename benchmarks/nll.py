"""Loss of a static KV budget on recorded text, policy by policy: teacher-forced, in this process.

    python -m benchmarks.nll run rows.jsonl --model MODEL --budgets 128 256
    python -m benchmarks.nll tasks rows.jsonl --model MODEL --budgets 128
    python -m benchmarks.nll report rows.jsonl... [--json results.json]

As `vase-sgl eval forced`, by the same code (`vase_sgl.eval.forced`), but for one fixed set of arms,
candidates that no worker knows among them (`benchmarks.candidates`), and with eviction seeds 0 and
1 instead of one derived for each sample. A row has its `case` beside the evaluation's fields, so
`vase-sgl eval report` does not read it; `report` here wrote `results/nll_smollm2.json`.

Texts are those of `benchmarks/texts`: by default the two that no policy was chosen on. Every arm
sees the same chunks, so that differences pair chunk by chunk. A run that was interrupted goes on
where it stopped. Intervals are percentile bootstraps over chunks or questions (10,000 draws, seed
0), after the mean over eviction seeds within a chunk, and over the texts of a question that was
asked after several.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.candidates import Candidate, register
from vase_sgl.eval.forced import (
    ForcedArm,
    ForcedModel,
    nll_rows,
    passkey_items,
    state_items,
    task_rows,
    text_chunks,
)
from vase_sgl.eval.rows import question_of
from vase_sgl.eviction import EvictionParams

TEXTS = Path(__file__).parent / "texts"
HELD_OUT = ("gpl-3", "rust-book-ownership")
#: Policies with fields that differ from the defaults, and the eviction seeds of those that draw.
ARMS: tuple[tuple[str, dict[str, Any], int], ...] = (
    ("vase-attnv", {}, 2),
    ("vase-attnv", {"pool_width": 1}, 2),
    ("vase-attnv", {"protected_share": 0}, 2),
    ("vase-dkv", {}, 1),
    ("curdkv", {}, 1),
    ("snapkv", {}, 1),
    ("snapkv", {"pool_width": 1}, 1),
    ("snapkv", {"num_sinks": 4}, 1),
    ("rkv", {}, 1),
    ("rkv", {"mix_lambda": 0.5}, 1),
    ("rkv", {"mix_lambda": 0.5, "pool_width": 1, "num_sinks": 4}, 1),
    ("random", {}, 2),
    ("random", {"num_sinks": 0}, 1),
    ("streaming", {}, 1),
    ("streaming", {"num_sinks": 0}, 1),
    ("knorm", {}, 1),
    ("evict-largest-values", {}, 1),
)
#: Candidates for a policy of our own, see `candidates.py`.
CANDIDATES: tuple[dict[str, Any], ...] = (
    {},
    {"pool_width": 1},
    {"pool_width": 1, "protected_share": 0.1},
    {"pool_width": 1, "draw": True},
)


def arm_name(policy: str, fields: dict[str, Any]) -> str:
    return policy + "".join(f" {name}={value}" for name, value in fields.items())


def arms(budget: int, window: int) -> list[ForcedArm]:
    found = [ForcedArm("full", None)]
    for policy, fields, seeds in ARMS:
        for seed in range(seeds):
            raw = {"budget": budget, "window": window, "policy": policy, "seed": seed, **fields}
            found.append(ForcedArm(arm_name(policy, fields), EvictionParams.parse(raw), seed))
    for own in CANDIDATES:
        params = EvictionParams(budget, window, Candidate(**own), "evict", seed=0)
        found.append(ForcedArm(arm_name("candidate", own), params))
    return found


def run(options: argparse.Namespace) -> None:
    """Append what is missing to the file of rows, one chunk or item at a time."""
    torch.set_num_threads(options.threads)
    register()
    done = {key(row) for row in read(options.rows)} if options.rows.exists() else set()
    model = ForcedModel(options.model, getattr(torch, options.dtype))
    with options.rows.open("a") as out:
        for budget in options.budgets:
            for item, rows in work(model, options, arms(budget, options.window)):
                if (item, budget, options.window) not in done:
                    out.writelines(
                        json.dumps(row | {"case": [item, budget, options.window]}) + "\n"
                        for row in list(rows)
                    )
                    out.flush()
                    print(item, budget, options.window, flush=True)


def work(
    model: ForcedModel, options: argparse.Namespace, todo: Sequence[ForcedArm]
) -> Iterator[tuple[str, Iterator[dict[str, Any]]]]:
    """Items of the run, each with the rows that it gives when they are read."""
    run_id = fingerprint(options)
    for name in options.texts:
        tokens = model.tokenizer((TEXTS / f"{name}.txt").read_text()).input_ids
        if options.command == "run":
            for chunk in text_chunks(
                name,
                tokens,
                prompt_tokens=options.prompt,
                forced_tokens=options.forced,
                count=options.chunks,
            ):
                yield chunk.item_id, nll_rows(model, [chunk], todo, run_id)
        else:
            for make in (passkey_items, state_items):
                for item in make(
                    name,
                    model.tokenizer,
                    tokens,
                    thought_tokens=options.thought,
                    count=options.items,
                    seed=options.seed,
                ):
                    yield item.item_id, task_rows(model, [item], todo, run_id)


def fingerprint(options: argparse.Namespace) -> str:
    """Names what the rows depend on beside their own fields."""
    told = {k: str(v) for k, v in sorted(vars(options).items()) if k not in ("rows", "budgets")}
    return hashlib.sha256(json.dumps(told | versions()).encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": cpu_model(),
        "cores": str(os.cpu_count()),
    }


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), "?")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row["case"])


def report(options: argparse.Namespace) -> None:
    """Print tables; write them as JSON if asked to."""
    rows = [row for path in options.rows for row in read(path)]
    tables = []
    for task in sorted({row["task"] for row in rows}):
        own = [row for row in rows if row["task"] == task]
        for budget, window in sorted({tuple(row["case"][1:]) for row in own}):
            cell = [row for row in own if row["case"][1:] == [budget, window]]
            found = {"task": task, "budget": budget, "window": window}
            tables.append(found | table(cell, options.against))
    for found in tables:
        print(f"\n{found['task']}, budget {found['budget']}, window {found['window']}: ", end="")
        print(
            f"{found['items']} items of {found['questions']} questions, "
            f"full KV {found['full']:.4f} nats a token\n"
        )
        print(f"| policy | nats a token above full KV | above {options.against} | correct |")
        print("|---|---|---|---|")
        for line in found["arms"]:
            share = "" if line["correct"] is None else f"{line['correct']:.2f}"
            against, above = (interval(line[name]) for name in ("against", "above_full"))
            print(f"| {line['arm']} | {above} | {against} | {share} |")
    if options.json is not None:
        sources = sorted({row["run_id"] for row in rows})
        content = {"commands": options.note, "versions": versions(), "run_ids": sources}
        content |= {"against": options.against, "tables": tables}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


def interval(x: dict[str, Any]) -> str:
    return f"{x['mean']:+.4f} ({x['low']:+.4f} to {x['high']:+.4f})"


def table(rows: list[dict[str, Any]], against: str) -> dict[str, Any]:
    """One cell: every arm against the full cache and against one arm, chunk by chunk."""
    losses: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    correct: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        losses[row["arm"]][row["case"][0]].append(row["nll_sum"] / row["nll_tokens"])
        if row.get("correct") is not None:
            correct[row["arm"]].append(row["correct"])
    items = sorted(losses["full"])
    for arm, by_item in losses.items():
        if sorted(by_item) != items:
            sys.exit(f"{arm} lacks {sorted(set(items) - set(by_item))}: run the cell to its end")
    mean = {arm: np.array([np.mean(x[item]) for item in items]) for arm, x in losses.items()}
    if against not in mean:
        sys.exit(f"no arm {against!r}; choose one of {', '.join(sorted(mean))}")
    questions = [question_of(item)[0] for item in items]
    lines = [
        {
            "arm": arm,
            "above_full": paired(values - mean["full"], questions),
            "against": paired(values - mean[against], questions),
            "correct": float(np.mean(correct[arm])) if correct[arm] else None,
            "by_item": [round(float(x), 5) for x in values],
        }
        for arm, values in sorted(mean.items(), key=lambda pair: float(pair[1].mean()))
    ]
    full = float(mean["full"].mean())
    count = {"items": len(items), "questions": len(set(questions))}
    return count | {"item_ids": items, "full": full, "arms": lines}


def paired(values: np.ndarray[Any, Any], questions: Sequence[str]) -> dict[str, Any]:
    """Mean of paired differences, its bootstrap interval, and how many are above 0.

    A question counts once, with the mean of its items.
    """
    asked = np.array(questions)
    differences = np.array([values[asked == one].mean() for one in dict.fromkeys(questions)])
    count = len(differences)
    draws = np.random.default_rng(0).integers(count, size=(10_000, count))
    low, high = np.percentile(differences[draws].mean(1), [2.5, 97.5])
    worse = int((differences > 0).sum())
    mean = float(differences.mean())
    return {"mean": mean, "low": float(low), "high": float(high), "worse": worse}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "tasks"):
        command = commands.add_parser(name)
        command.add_argument("rows", type=Path)
        command.add_argument("--model", required=True, help="folder of a transformers causal LM")
        command.add_argument("--budgets", type=int, nargs="+", required=True)
        command.add_argument("--window", type=int, default=32)
        command.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
        command.add_argument("--threads", type=int, default=1)
        command.add_argument("--texts", nargs="+", default=HELD_OUT, metavar="NAME")
    commands.choices["run"].add_argument("--chunks", type=int, default=4, help="a text")
    commands.choices["run"].add_argument("--prompt", type=int, default=64, help="tokens")
    commands.choices["run"].add_argument("--forced", type=int, default=960, help="tokens")
    commands.choices["tasks"].add_argument("--items", type=int, default=4, help="a task and text")
    commands.choices["tasks"].add_argument("--thought", type=int, default=600, help="tokens")
    commands.choices["tasks"].add_argument("--seed", type=int, default=0)
    command = commands.add_parser("report")
    command.add_argument("rows", type=Path, nargs="+")
    command.add_argument("--json", type=Path)
    command.add_argument("--against", default="vase-attnv", metavar="ARM")
    command.add_argument("--note", nargs="+", default=[], help="the commands that gave the rows")
    return parser.parse_args()


def main() -> None:
    options = parse()
    report(options) if options.command == "report" else run(options)


if __name__ == "__main__":
    main()
