"""The documented numbers of the committed evaluation are those of its rows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import nll
from vase_sgl.eval import tables
from vase_sgl.eval.cells import load
from vase_sgl.eval.loops import detect_loop, words
from vase_sgl.eval.measures import ACCURACY
from vase_sgl.eval.rows import question_of

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "results" / "eval_math"


def test_problems_that_take_steps() -> None:
    runs = [run.parent for run in sorted(FOLDER.glob("*/run.json"))]
    (cells,) = load(runs).cells.values()
    estimates = {c.label: ACCURACY.estimate(c) for c in cells}
    scores = {label: tables.percent(found) for label, found in estimates.items() if found}
    report = (FOLDER / "report.md").read_text(encoding="utf-8")
    for c in cells:
        assert f"| {c.arm} | {c.budget or '-'} | 64 | {scores[c.label]} |" in report
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| `(\S+)` \| ([\d.]+) % (?=\[)", text, re.MULTILINE))
    assert len(told) == 6
    for arm, percent in told.items():
        assert scores[f"{arm} @ 128"].startswith(f"{percent} [")
    full = next(c for c in cells if c.arm == "full")
    slots = tables.plain(full.mean(lambda row: row.slots), 0)
    assert f"come to\n{slots} tokens on average with the full cache" in text
    assert f"full ({slots} slots, " in report
    slots_of = dict(re.findall(r"^\| `(\S+)` \| [\d.]+ % \[.*?\] \| (\d+) \|", text, re.MULTILINE))
    assert slots_of == {c.arm: tables.plain(c.mean(c.slots), 0) for c in cells if c.budget == 128}
    # A ring is a window of the default 64 for 12 query heads, beside K and V of 2 heads.
    assert {c.ring_slots for c in cells} == {0, 64 * 12 / (2 * 2)}
    assert f"gets {scores['full'].replace(' [', ' % [')} right" in text
    assert all(r.loop == (detect_loop(words(r.text)) is not None) for c in cells for r in c.rows)
    loops = [(sum(r.loop for r in c.rows), c.arm) for c in cells if c.evicts]
    most, arm = max(loops)
    assert f"({min(loops)[0]} to {most} of 64, the {most} with `{arm}`)" in text


def test_parts_on_problems_that_take_steps() -> None:
    folder = ROOT / "benchmarks" / "results" / "eval_math_parts"
    (cells,) = load([run.parent for run in sorted(folder.glob("*/run.json"))]).cells.values()
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    told = re.findall(r"^\| `(\S+)` \| (\d+), ([\d.]+) % (\[.*?\]) \| ([^|]*?) ?\|$", text, re.M)
    rows = {c.arm: {r.item_id: bool(r.correct) for r in c.rows} for c in cells}
    assert len(told) == len(rows) == 5
    for arm, count, percent, interval, against in told:
        shown = ACCURACY.estimate(next(c for c in cells if c.arm == arm))
        assert shown is not None and tables.percent(shown) == f"{percent} {interval}"
        assert sum(rows[arm].values()) == int(count) and len(rows[arm]) == 64
        pairs = [(right, rows["vase-attnv"][item]) for item, right in rows[arm].items()]
        better, worse = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
        assert against == ("" if arm == "vase-attnv" else f"{better} : {worse}")
    before: dict[str, dict[str, bool]] = {}
    for line in (FOLDER / "at-128" / "rows.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        before.setdefault(row["arm"], {})[row["item_id"]] = bool(row["correct"])
    for arm in ("vase-attnv", "snapkv"):
        pairs = [(before[arm][item], right) for item, right in rows[arm].items()]
        lost, won = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
        assert f"`{arm}` lost {lost} of its right answers and won {won}" in text


def by_budget(folder: str) -> dict[str, dict[int, dict[str, tuple[float, bool | None]]]]:
    """Arm -> budget (0: full) -> item -> nats per token, right or not."""
    found: dict[str, dict[int, dict[str, tuple[float, bool | None]]]] = {}
    path = ROOT / "benchmarks" / "results" / folder / "rows.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        items = found.setdefault(row["arm"], {}).setdefault(row["budget"] or 0, {})
        items[row["item_id"]] = (row["nll_sum"] / row["nll_tokens"], row["correct"])
    return found


def above(arm: dict[str, tuple[float, bool | None]], base: dict[str, Any]) -> float:
    return float(np.mean([loss - base[item][0] for item, (loss, _) in arm.items()]))


def right(arm: dict[str, tuple[float, bool | None]]) -> int:
    return sum(bool(correct) for _, correct in arm.values())


def test_the_matrix_on_a_small_model() -> None:
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    told = re.findall(r"^\| `(\S+)` \| (\+[^|,]*) \| ([^|]*) \| ([^|]*) \| [^|]*\|$", text, re.M)
    losses = by_budget("eval_forced/nll")
    full = losses["full"][0]
    assert len(told) == 12 and f"full cache ({np.mean([n for n, _ in full.values()]):.3f})" in text
    for arm, *shown in told:
        assert shown == [f"{above(losses[arm][b], full):+.3f}" for b in (128, 256, 512)]

    told = re.findall(r"^\| `(\S+)` \| (\+\S+, \d) \| ([^|]*) \| ([^|]*) \|$", text, re.M)
    keys = by_budget("eval_forced/passkey")
    full = keys["full"][0]
    assert len(told) == 11 and f"full cache ({np.mean([n for n, _ in full.values()]):.3f})" in text
    assert f"{right(full)} with the full cache" in text
    for arm, *shown in told:
        cells = (keys[arm][b] for b in (128, 256, 512))
        assert shown == [f"{above(c, full):+.2f}, {right(c)}" for c in cells]

    parts = by_budget("eval_protection")
    base = parts["vase-attnv"]
    for part in ("protected_share=0", "pool_width=1", "num_sinks=0"):
        (row,) = re.findall(rf"^\| without \w+ \(`{part}`\) \| (.*) \|$", text, re.M)
        for shown, budget in zip(row.split(" | "), (128, 256, 512), strict=True):
            arm = parts[f"vase-attnv?{part}"][budget]
            better = sum(loss < base[budget][item][0] for item, (loss, _) in arm.items())
            assert re.fullmatch(
                rf"{re.escape(f'{above(arm, base[budget]):+.2f}')} \[\S+, \S+\], "
                rf"{better} : {32 - better}, {right(arm)} right",
                shown,
            ), (part, budget)
    shown = [f"{right(base[budget])} right" for budget in (128, 256, 512)]
    assert f"| `vase-attnv` | {' | '.join(shown)} |" in text
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert (
        f"full cache {right(parts['full'][0])} of 32 right, `vase-attnv` {right(base[512])}, "
        f"without value protection {right(parts['vase-attnv?protected_share=0'][512])};" in readme
    )


def test_losses_and_forced_thoughts() -> None:
    """Of the benchmark: intervals are over questions, and the page tells their range."""
    cells = json.loads((ROOT / "benchmarks" / "results" / "nll_smollm2.json").read_text())["tables"]
    text = (ROOT / "docs" / "policies.md").read_text(encoding="utf-8")
    told = re.findall(r"^\| `(.+)` \| (.*\)) \| ([\d.]+) \| (.*\)) \|$", text, re.MULTILINE)
    assert len(told) == 12
    ranges: dict[str, dict[str, str]] = {}
    for found in cells:
        questions = [question_of(item)[0] for item in found["item_ids"]]
        assert (found["items"], found["questions"]) == (8, len(set(questions)))
        by_item = {line["arm"]: np.array(line["by_item"]) for line in found["arms"]}
        for line in found["arms"]:
            above = by_item[line["arm"]] - by_item["full"]
            # By item they are rounded to five digits.
            assert line["above_full"] == pytest.approx(nll.paired(above, questions), abs=2e-5)
            means = [above[np.array(questions) == one].mean() for one in questions]
            ranges.setdefault(found["task"], {})[line["arm"]] = (
                f"{above.mean():.2f} ({min(means):.2f} to {max(means):.2f})"
            )
    for arm, passkey, _, state in told:
        assert (passkey, state) == (ranges["passkey-forced"][arm], ranges["state-forced"][arm])


def test_differences_in_loss() -> None:
    cells = json.loads((ROOT / "benchmarks" / "results" / "nll_smollm2.json").read_text())["tables"]
    behind, candidates = [], []
    for found in cells:
        if found["task"] != "nll":
            continue
        by_item = {line["arm"]: np.array(line["by_item"]) for line in found["arms"]}
        behind.append((by_item["snapkv"] - by_item["vase-attnv"]).mean())
        for arm in by_item:
            if arm.startswith("candidate pool_width=1") and found["budget"] < 512:
                against = by_item[arm] - by_item["vase-attnv pool_width=1"]
                candidates.append(nll.paired(against, found["item_ids"]))
    assert len(candidates) == 9
    assert all(line["low"] < 0 < line["high"] for line in candidates)
    most = max(abs(line["mean"]) for line in candidates)
    policies, evaluation = (
        " ".join((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8").split())
        for name in ("policies", "evaluation")
    )
    assert (
        "no candidate with `pool_width=1` differs from `vase-attnv pool_width=1` beyond noise (at "
        f"most {most:.3f} nats either way)" in policies
    )
    assert f"`snapkv` is behind `vase-attnv` by {max(behind):.3f} nats at most" in evaluation
