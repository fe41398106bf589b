"""`vase-sgl eval forced` on a tiny model, in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.eval.running_eval import rows, run_eval

LENGTHS = ("--prompt-tokens", 8, "--forced-tokens", 64, "--chunks", 3)
THOUGHT = ("--thought-tokens", 40, "--items", 2)
ARMS = ("--policies", "full,random", "--budgets", "16,24", "--window", 8, "--seeds", 2)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "sea.txt"
    path.write_text("The sea is wide, and nobody has counted its waves. " * 8, encoding="utf-8")
    return path


async def test_losses_and_answers_of_every_arm(
    text: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = (
        *("forced", text, "--model", tiny_folder, "--tasks", "nll,passkey-forced"),
        *(*LENGTHS, *THOUGHT, *ARMS, "-o", out),
    )
    await run_eval(*command)
    whole = (out / "rows.jsonl").read_bytes()
    found = rows(out)
    assert len(found) == (3 + 2) * 3 * 2
    nll = [r for r in found if r["task"] == "nll"]
    assert {r["nll_tokens"] for r in nll} == {64} and {r["item_id"] for r in nll} == {
        "sea/0",
        "sea/1",
        "sea/2",
    }
    assert all((r["rounds"] > 0) == (r["budget"] is not None) for r in nll)
    seeds = {r["seeds"]["eviction"] for r in nll if r["arm"] == "random"}
    assert len(seeds) == 6  # per item and seed index, the same at every budget
    report = (out / "report.md").read_text()
    assert "### Quality: NLL per token" in report and "| random | 24 | 6 | " in report
    assert "| full | - | 4 | " in report and "### Quality: correct" in report
    # Gone on with in the middle of an item: every loss is bit for bit the same again.
    (out / "rows.jsonl").write_bytes(whole[: len(whole) // 2])
    _, shown = await run_eval(*command)
    assert "of 30 samples are there already" in shown
    losses = {_key(r): (r["nll_sum"], r["digest"]) for r in found}
    assert {_key(r): (r["nll_sum"], r["digest"]) for r in rows(out)} == losses
    run = json.loads((out / "run.json").read_text())
    assert run["workers"]["in-process"]["weights_digest"]
    # Queries of the window's 8 tokens: 4 heads a token beside K and V of 2 heads.
    assert run["query_ring_slots"] == {"in-process": 8 * 4 / (2 * 2)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "math"), "there is no forced task 'math'; there are nll, passkey-forced"),
        (("--policies", "full-fp8"), "full-fp8 is about a worker's flags"),
        (("--dtype", "int8"), "dtype must be float32 or bfloat16, got 'int8'"),
        (("--forced-tokens", "900"), "sea has 408 tokens, but 4 chunks of 64 + 900 need 3856"),
    ],
)
async def test_wrong_options_are_named(
    text: Path, tiny_folder: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    folder = ("--model", tiny_folder, "-o", tmp_path / "out")
    arms = ("--policies", "full")
    _, error = await run_eval("forced", text, *folder, *arms, *arguments, status=1)
    assert message in error
    assert not (tmp_path / "out").exists()


def _key(row: dict[str, object]) -> tuple[object, ...]:
    return tuple(row[k] for k in ("arm", "budget", "task", "item_id", "seed_index"))
