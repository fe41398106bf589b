"""From samples to tables: summaries, result files, the page, the comparison with a baseline."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import (
    determinism,
    environment,
    kernels,
    load,
    overhead,
    paper,
    plots,
    quick,
    results,
    serving,
    tables,
    traces,
    tuning,
)
from benchmarks.model_configs import SHAPES
from benchmarks.options import Model
from benchmarks.workers import WorkerSpec

ENVIRONMENT = {
    "date": "2026-01-02T03:04:05+00:00",
    "command": "python -m benchmarks.serving",
    "commit": {"id": "0123456789abcdef", "dirty": False},
    "hardware": {
        "processor": "P",
        "cores": 2,
        "memory_gib": 24.0,
        "load_before": [0.1, 0.1, 0.1],
        "gpu": None,
    },
    "versions": {"sglang": "0.5.23", "torch": "2.13.0"},
    "variables": {},
}
MACHINE = "2 cores P; SGLang 0.5.23, torch 2.13.0; commit 0123456789ab; load before the run 0.1"


def _report(benchmark: str, **parts: Any) -> results.Report:
    head = {"format": results.FORMAT, "benchmark": benchmark, "dry_run": False, "cut": False}
    return head | {"environment": ENVIRONMENT} | parts


def _serving_report() -> results.Report:
    def sample(arm: str, turn: int, rate: float, ttft: list[float | None]) -> dict[str, Any]:
        return {
            "round": turn,
            "arm": arm,
            "cell": "2x100",
            "seconds": 10.0,
            "tokens_per_second": rate,
            "tail_tokens_per_second": rate / 2,
            "ttft": ttft,
            "tpot": [0.1, 0.3 if turn else None],
            "whole": [True, False],
            "run_to_end": arm == "budget",
            "peak_running": 2,
            "retractions": 3 if arm == "stock" else 0,
            "tokens_by_second": [int(rate)] * 10,
        }

    report = _report(
        "serving",
        settings={
            "model": "m",
            "kv_bytes_per_slot": 2**20,
            "seconds": 10.0,
            "rounds": 2,
            "prompt_tokens": 10,
            "budget": 20,
            "window": 5,
            "policy": "vase-attnv",
        },
        samples=[
            *(sample("stock", 0, 10.0, [1.0, None]), sample("budget", 0, 40.0, [1.0, 2.0])),
            *(sample("stock", 1, 20.0, [3.0, None]), sample("budget", 1, 80.0, [1.0, 2.0])),
        ],
        workers={
            "stock": {"slots": 220},
            "budget": {"slots": 220, "buffers_mib": {"query_ring": 7.0}},
        },
    )
    serving.summarize(report)
    return report


def test_serving_is_told_by_medians_and_ratios_to_stock() -> None:
    page = serving.markdown(_serving_report())
    assert page.splitlines()[4:6] == [
        "| 2x100 stock | 10 | 15 | 1 | 7.5 | 1 | 2 | 2 | 6 | 2 | > 10 | 100 |",
        "| 2x100 budget* | 10 | 60 | 4 | 30 | 4 | 2 | 8 | 0 | 1 | 2 | 100 |",
    ]
    assert (
        "KV pool of 220 slots in every arm (220 MiB; the plugin's own buffers beside it: " in page
    )
    assert MACHINE in page


def test_a_percentile_is_the_nearest_rank() -> None:
    assert results.percentile([], 0.5) is None
    assert [results.percentile([4, 1, 3, 2], share) for share in (0, 0.25, 0.5, 0.51, 0.95)] == [
        *(1, 1, 2, 3, 4)
    ]


@pytest.mark.parametrize(
    ("whole", "told"),
    [([True, True, False, False], 0.2), ([False] * 4, 0.1)],
    ids=["of-whole-answers", "of-all-where-none-is-whole"],
)
def test_answers_that_were_cut_tell_little_of_tpot(whole: list[bool], told: float) -> None:
    sample = {"tpot": [0.2, 0.2, 0.1, 0.1], "whole": whole}
    assert serving._tpot(sample, 0.5) == told


def test_arms_change_places_every_round() -> None:
    arms = [serving.Arm(name, WorkerSpec("stock")) for name in ("a", "b")]
    said = [[arm.name for arm in serving.in_turn(arms, turn)] for turn in range(3)]
    assert said == [["a", "b"], ["b", "a"], ["a", "b"]]


def test_a_result_is_three_files_that_can_be_read_again(tmp_path: Path) -> None:
    report = _serving_report()
    path = results.write(report, tmp_path, "serving", markdown=serving.markdown, plot=plots.serving)
    assert {file.name for file in tmp_path.iterdir()} == {
        *("serving.json", "serving.md", "serving.svg"),
    }
    assert results.read(path)["samples"] == report["samples"]
    svg = (tmp_path / "serving.svg").read_text()
    results.write(report, tmp_path, "serving", markdown=serving.markdown, plot=plots.serving)
    assert (tmp_path / "serving.svg").read_text() == svg  # no time, no random ids
    path.write_text('{"format": "else"}')
    with pytest.raises(ValueError, match=r"serving.json is no benchmark result"):
        results.read(path)


def test_a_run_that_is_stopped_keeps_what_it_has() -> None:
    report: results.Report = {"samples": []}
    with results.until_cut(report):
        report["samples"].append(1)
        os.kill(os.getpid(), signal.SIGTERM)
        report["samples"].append(2)
    assert report == {"samples": [1], "cut": True}
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_overhead_compares_equal_lengths_and_names_the_floor() -> None:
    timers: dict[str, list[float]] = {
        "step.prepare": [10, 0.1, 0.1],
        "step.run": [10, 0.8, 0.5],
        "step.result": [10, 0.1, 0.1],
        "round": [1, 0.03, 0.01],
        "round.score": [1, 0.02, 0.02],
        "ring": [300, 0.02, 0.02],
        "scheduler.alloc_for_decode": [10, 0.5, 0.01],
    }
    without = timers | {"step.run": [20, 1.56, 1.0], "step.prepare": [20, 0.2, 0.2]}
    samples = [
        {"round": 0, "window": 64, "arm": arm, "timers": found}
        for arm, found in (("full", without), ("budget", timers))
    ]
    report = _report(
        "overhead",
        settings={
            "model": "tiny",
            "windows": [32, 64],
            "batch": 4,
            "budget": 128,
            "policy": "vase-attnv",
            "rounds": 1,
            "gpu": False,
        },
        copy_bytes_per_second=1e9,
        samples=samples,
    )
    model = Model(Path("tiny"), True, SHAPES["tiny"])
    overhead.summarize(report, model)
    (line,) = report["summary"]  # cut before window 32
    assert line["step_seconds"] == pytest.approx({"full": 0.093, "budget": 0.1})
    assert line["overhead"] == pytest.approx(0.1 / 0.093 - 1)
    assert line["shares"]["eviction"] == pytest.approx(0.03)
    assert line["shares"]["eviction: score"] == pytest.approx(0.02)
    assert line["shares"]["query ring"] == pytest.approx(0.02)
    assert line["shares"]["scheduler"] == pytest.approx(0.01)  # without what it calls upstream
    shape = SHAPES["tiny"]
    moved = shape.weight_bytes + 4 * (128 + 32) * shape.kv_bytes_per_token
    assert line["floor_seconds"] == pytest.approx(moved / 1e9)
    page = overhead.markdown(report)
    assert "| 64 | 93 | 100 | 7.53 |" in page
    assert "| query ring % |" in page and "| window | score |" in page
    # There kernels run behind the calls: shares of the launches alone would pass for theirs.
    report["settings"]["gpu"] = True
    page = overhead.markdown(report)
    head = next(text for text in page.splitlines() if text.startswith("| window"))
    assert head.endswith("| floor ms | eviction, host time of launching % | scheduler % |")
    assert page.count("| window") == 1 and "| 3 | 1 |\n" in page


@pytest.mark.parametrize(
    ("window", "steps"), [(16, 160), (32, 160), (64, 128), (128, 128), (256, 256)]
)
def test_a_trace_covers_whole_windows(
    window: int, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However far the first round is when it begins, every request has as many as windows."""
    seen: list[int] = []

    async def burst(url: str, requests: list[load.Request]) -> None:
        seen.extend(request.max_new_tokens for request in requests)

    async def record(url: str, folder: Path, *, steps: int) -> Path:
        seen.append(steps)
        return folder

    async def at_once(seconds: float, sleep: Any = asyncio.sleep) -> None:
        await sleep(0)

    monkeypatch.setattr(load, "burst", burst)
    monkeypatch.setattr(traces, "record", record)
    monkeypatch.setattr(traces, "kernel_seconds", lambda path: {})
    monkeypatch.setattr(asyncio, "sleep", at_once)
    chosen = overhead._parser().parse_args(["--windows", str(window), "--batch", "2"])
    chosen.budget = 2048
    worker: Any = SimpleNamespace(url="http://worker")
    model = Model(Path("tiny"), True, SHAPES["tiny"])
    assert asyncio.run(overhead.trace(worker, chosen, model, tmp_path)) == {}
    assert seen == [3 * steps, 3 * steps, steps] and steps % window == 0


def test_the_papers_numbers_stand_beside_ours() -> None:
    settings = {
        "model": "m",
        "batch": 16,
        "prompt_tokens": 256,
        "window": 64,
        "policy": "vase-attnv",
        "seconds": 80.0,
        "whole": False,
    }
    samples = [
        {"output": 16384, "budget": "full", "tokens_per_second": 100.0, "peak_memory_gb": 70.0},
        {"output": 16384, "budget": 4096, "tokens_per_second": 300.0, "whole": True},
        {"output": 32768, "budget": "full", "problem": "memory for 1 of 2 slots"},
        {"output": 32768, "budget": 999, "tokens_per_second": 5.0},
    ]
    report = _report("paper", settings=settings, samples=samples)
    paper.summarize(report)
    assert paper.markdown(report).splitlines()[-4:] == [
        "| 16384 full < | 100 | 1 | 70 | 132.9 | 1 | 68.7 |",
        "| 16384 4096 | 300 | 3 | - | 333.4 | 2.51 | 39.6 |",
        "| 32768 full < | memory for 1 of 2 slots | - | - | out of memory | - | - |",
        "| 32768 999 < | 5 | - | - | - | - | - |",
    ]
    report["settings"] = settings | {"batch": 8}
    paper.summarize(report)
    assert "333.4" not in paper.markdown(report)


def test_replays_that_differ_are_counted_and_located() -> None:
    expected = {"tokens": [1, 2, 3], "digests": ["a"], "logprobs": [0.5]}
    assert set(determinism.differences(expected, expected).values()) == {None}
    found = {"tokens": [1, 9, 3], "digests": ["a", "b"], "logprobs": [0.5]}
    where = determinism.differences(expected, found)
    assert where == {"tokens": 1, "digests": 1, "logprobs": None}
    replayed = {
        "rounds_per_pass": 9,
        "by_batch_size": {"16": {"replays": 32, "mismatches": 1}},
        "mismatches": [{"request": 3, "batch": 16, **where}],
    }
    settings = {"model": "m", "requests": 4, "tokens": 48, "budget": 24, "window": 8}
    report = _report("determinism", settings=settings, replays=replayed)
    determinism.summarize(report)
    assert report["summary"] == {
        "replays": 32,
        "mismatches": 1,
        "tokens_per_second": {"free": None, "deterministic": None},
        "ratios": [],
    }
    assert "| 16 | 32 | 1 |\n| all | 32 | 1 |" in determinism.markdown(report)


def test_the_cost_of_determinism_is_told_with_its_spread() -> None:
    rates = [("free", 0, 100.0), ("deterministic", 0, 90.0)]
    rates += [("deterministic", 1, 110.0), ("free", 1, 100.0), ("free", 2, 100.0)]
    samples = [{"arm": arm, "round": turn, "tokens_per_second": rate} for arm, turn, rate in rates]
    report = _report("determinism", settings={"model": "m", "cost_cell": "2x8"}, samples=samples)
    determinism.summarize(report)
    assert determinism.markdown(report).endswith(
        "Cost at 2x8: 100 against 100 tokens/s, 1 times as many (0.9 to 1.1); 2 round(s).\n"
    )


def test_a_log_probability_counts_where_it_was_asked_for() -> None:
    meta = {"vase": {"round_digests": ["d"]}, "output_token_logprobs": [[-0.5, 7, None]]}
    assert determinism.outcome({"output_ids": [7], "meta_info": meta}) == {
        "tokens": [7],
        "digests": ["d"],
        "logprobs": [-0.5],
    }
    assert determinism.outcome({"output_ids": [7], "meta_info": {}})["logprobs"] == []


def test_kernels_are_told_with_their_floor() -> None:
    row = {"policy": "random", "layers": 40, "budget": 2048, "requests": 4, "floor_ms": 1.0}
    row |= {"kernels_ms": 2.0, "floor_gb": 3.0, "gb_per_s": 1500.0, "share_of_floor": 0.5}
    report = _report("kernels", copy_bytes_per_s=3e12, results=[row])
    page = kernels.markdown(report)
    assert page.startswith("Copy bandwidth 3000 GB/s.")
    assert page.splitlines()[-1] == "| random | 40 | 2,048 | 4 | 2 | 3 | 1 | 1,500 | 0.5 |"


def test_block_shapes_are_told_where_they_are_faster() -> None:
    row = {"policy": "random", "budget": 2048, "requests": 16, "choice": "SPLIT 2"}
    slower = _report("tuning", results=[row | {"ratio": 0.99}, row | {"refused": "too large"}])
    assert tuning.markdown(slower).startswith("None of 2 choices is 2 % faster")
    page = tuning.markdown(_report("tuning", results=[*slower["results"], row | {"ratio": 0.9}]))
    assert page.splitlines()[-1] == "| random | 2,048 | 16 | SPLIT 2 | 0.9 |"


def test_kernels_of_a_trace_are_summed_by_purpose(tmp_path: Path) -> None:
    path = tmp_path / "x.trace.json.gz"

    def event(name: str, dur: float, cat: str = "kernel") -> dict[str, Any]:
        return {"name": name, "dur": dur, "cat": cat, "ph": "X"}

    events = [
        *(event("move_kernel", 10.0), event("weights_kernel", 20.0), event("move_kernel", 5.0)),
        *(event("gemm", 100.0), event("move_kernel", 900.0, cat="cpu_op")),
    ]
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": events}, file)
    assert traces.kernel_seconds(path) == pytest.approx(
        {
            "eviction: overwrite": 15e-6,
            "eviction: scoring": 20e-6,
            "model and engine": 100e-6,
        }
    )
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": events[-1:]}, file)
    with pytest.raises(ValueError, match="holds no GPU kernel"):
        traces.kernel_seconds(path)


def test_every_kernel_of_ours_has_a_group() -> None:
    names = {
        line.removeprefix("def ").partition("(")[0]
        for path in (environment.ROOT / "kernels" / "vase_kernels").glob("*.py")
        for line in path.read_text().splitlines()
        if line.startswith("def ") and line.partition("(")[0].endswith("_kernel")
    }
    assert names == set(traces.GROUPS)


def test_the_page_is_what_the_results_say() -> None:
    page = tables.PAGE.read_text()
    assert tables.rewritten(page, results.FOLDER) == page, "run: python -m benchmarks.tables"


def test_a_table_of_the_page_is_its_result(tmp_path: Path) -> None:
    page = "a\n<!-- results: serving -->\nold\n<!-- end -->\nb\n"
    assert "Not measured. To do so: `python -m benchmarks.serving`" in (
        tables.rewritten(page, tmp_path)
    )
    report = _serving_report()
    results.write(report, tmp_path, "serving", markdown=serving.markdown, plot=plots.serving)
    written = tables.rewritten(page, tmp_path)
    assert "| 2x100 budget* | 10 | 60 | 4 |" in written and "old" not in written
    assert "![serving](../benchmarks/results/serving.svg)" in written
    assert written.startswith("a\n") and written.endswith("<!-- end -->\nb\n")
    assert tables.rewritten(written, tmp_path) == written
    report["dry_run"] = True
    results.write(report, tmp_path, "serving", markdown=serving.markdown)
    with pytest.raises(ValueError, match="of a dry run"):
        tables.rewritten(page, tmp_path)
    with pytest.raises(ValueError, match="no result is called 'x'"):
        tables.rewritten("<!-- results: x -->\n<!-- end -->", tmp_path)


def test_goals_are_read_from_the_results(tmp_path: Path) -> None:
    report = _serving_report()
    for line in report["summary"]:
        line["cell"] = "64x1000"
    results.write(report, tmp_path, "serving", markdown=serving.markdown)
    lines = tables.goals(tmp_path).splitlines()
    assert lines[2].endswith("| at least 4 | 4 |")
    assert lines[3].endswith("| 0 | 0 |")
    assert lines[-1].endswith("| not measured |")


@pytest.mark.parametrize(
    ("now", "then", "better", "said"),
    [
        (3.0, 4.0, "higher", "as before"),
        (2.9, 4.0, "higher", "WORSE"),
        (9.0, 4.0, "higher", "as before"),
        (0.03, 0.02, "lower", "as before"),
        (0.031, 0.02, "lower", "WORSE"),
        (None, 1.0, "lower", "not measured"),
        (1.0, None, "lower", "no baseline"),
    ],
)
def test_quick_marks_what_is_much_worse(
    now: float | None, then: float | None, better: str, said: str
) -> None:
    assert quick.verdict(now, then, better) == said


def test_a_quick_part_that_fails_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    part = quick.Part("broken", ("-c", "raise SystemExit('no such thing')"), lambda report: {})
    assert quick.measured(part) == {}
    assert "broken failed: no such thing" in capsys.readouterr().err


def test_a_quick_part_gives_its_ratios() -> None:
    write = "import json, sys; json.dump({'x': 2.0}, open(sys.argv[1], 'w'))"
    part = quick.Part(
        "one", ("-c", write, "{json}"), lambda r: {"x": (r["x"], "lower"), "y": (None, "lower")}
    )
    assert quick.measured(part) == {"x": {"value": 2.0, "better": "lower"}}


def test_the_environment_is_described_without_paths_and_secrets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VASE_CACHE_DIR", "/somewhere/private/cache")
    for secret in ("VASE_API_KEY", "VASE_WORKER__API_KEY", "VASE_AUDIT__URL"):
        monkeypatch.setenv(secret, "sesame")
    found = environment.describe()
    assert found["variables"]["VASE_API_KEY"] == "(set)" and "sesame" not in str(found)
    assert found["variables"]["VASE_CACHE_DIR"] == "cache"
    assert found["hardware"]["cores"] >= 1 and found["versions"]["sglang"] == "0.5.23"
    argv = ["/x/y/serving.py", "--model", "/models/m", "--worker-arg=/z/q", "--cells", "8x9"]
    assert environment.command(argv) == (
        "python -m benchmarks.serving --model m --worker-arg=q --cells 8x9"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0.0, "0"), (12345.6, "12,346"), (4.019, "4.02"), (0.0123, "0.0123")],
)
def test_numbers_are_short(value: float | None, text: str) -> None:
    assert results.number(value) == text
