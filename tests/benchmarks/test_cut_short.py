"""A run that ends early, by a signal or an error, keeps what it has measured and says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import determinism, load, overhead, paper, results, serving, tables


@pytest.fixture(autouse=True)
def workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that are none: what would ask them is replaced by each test."""

    @contextmanager
    def running(specs: list[Any], *_: Any, **__: Any) -> Iterator[dict[Any, Any]]:
        yield {spec: SimpleNamespace(url="http://nowhere", pid=0) for spec in specs}

    for module in (determinism, overhead, paper, serving):
        monkeypatch.setattr(module, "running", running)
    monkeypatch.setattr("benchmarks.options.on_gpu", lambda: True)


def _tiny(folder: Path) -> list[str]:
    return ["--model-config", "tiny", "--output", str(folder)]


def _written(folder: Path, name: str) -> dict[str, Any]:
    return results.read(folder / f"{name}.json")


def _fail(*_: Any) -> None:
    raise RuntimeError("first line\nthe worker ended a request")


async def _fail_later(*_: Any) -> None:
    _fail()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("first\nlast"), "RuntimeError: last"),
        (SystemExit("the worker did not start:\nout of memory"), "out of memory"),
        (SystemExit(), "no reason given"),
    ],
)
def test_an_error_ends_the_measuring_not_the_program(
    error: BaseException, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = results.new_report("x", {}) | {"samples": []}
    with results.until_cut(report):
        report["samples"].append(1)
        raise error
    assert (report["samples"], report["cut"], report["error"]) == ([1], False, said)
    assert results.finish(report, tmp_path, "x", markdown=lambda _: "the page") == 1
    assert _written(tmp_path, "x")["error"] == said
    # `benchmarks.gpu` tells the last line of a stage that failed.
    assert capsys.readouterr().err.splitlines()[-1] == said


def _sample(arm: str, cell: str) -> dict[str, Any]:
    return {
        "round": 0,
        "arm": arm,
        "cell": cell,
        "seconds": 10.0,
        "tokens_per_second": 10.0,
        "tail_tokens_per_second": 5.0,
        "ttft": [1.0],
        "tpot": [0.1],
        "whole": [False],
        "run_to_end": False,
        "peak_running": 2,
        "retractions": 0,
        "tokens_by_second": [10] * 10,
    }


@pytest.fixture
def third_arm_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    async def one_run(arm: serving.Arm, cell: serving.Cell, *_: Any) -> dict[str, Any]:
        if arm.name == "budget":
            _fail()
        return _sample(arm.name, str(cell))

    async def about(arm: serving.Arm, url: str) -> dict[str, Any]:
        return {"slots": 1000}

    async def warm_up(*_: Any) -> None:
        pass

    for name, replaced in (("one_run", one_run), ("_about", about), ("warm_up", warm_up)):
        monkeypatch.setattr(serving, name, replaced)


@pytest.mark.usefixtures("third_arm_fails")
def test_serving_keeps_the_arms_before_one_that_fails(tmp_path: Path) -> None:
    assert serving.main(_tiny(tmp_path)) == 1
    report = _written(tmp_path, "serving")
    assert [sample["arm"] for sample in report["samples"]] == ["stock", "full"]
    assert report["error"] == "RuntimeError: the worker ended a request"
    block = tables.block("serving", tmp_path)
    assert (
        " full | 10 | 10 | 1 |" in block and "Ended by an error, RuntimeError: the worker" in block
    )


@pytest.mark.usefixtures("third_arm_fails")
def test_a_worker_that_is_not_what_it_says_has_no_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def about(arm: serving.Arm, url: str) -> dict[str, Any]:
        if arm.name == "full":
            raise SystemExit("arm full is not what it says")
        return {"slots": 1000}

    monkeypatch.setattr(serving, "_about", about)
    assert serving.main(_tiny(tmp_path)) == 1
    assert [one["arm"] for one in _written(tmp_path, "serving")["samples"]] == ["stock"]


def test_a_run_that_is_cut_before_its_first_sample_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def cut(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(serving, "warm_up", cut)
    plot = tmp_path / "serving.svg"
    plot.write_text("of an earlier run")
    assert serving.main(_tiny(tmp_path)) == 0
    assert _written(tmp_path, "serving")["samples"] == []
    assert not plot.exists()
    block = tables.block("serving", tmp_path)
    assert block.startswith("Nothing was measured before the cut.\n")
    assert "svg" not in block


def test_the_other_benchmarks_keep_what_they_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def some_replays(report: dict[str, Any], *_: Any) -> None:
        count = {"replays": 3, "mismatches": 0}
        report["replays"] = {"rounds_per_pass": 1, "by_batch_size": {1: count}, "mismatches": []}
        _fail()

    monkeypatch.setattr(determinism, "replays", some_replays)
    assert determinism.main(_tiny(tmp_path)) == 1
    assert _written(tmp_path, "determinism")["summary"]["replays"] == 3

    monkeypatch.setattr(paper, "measure", _fail)
    assert paper.main(_tiny(tmp_path)) == 1
    assert _written(tmp_path, "paper")["error"] == "RuntimeError: the worker ended a request"


class _Overhead:
    """`overhead.main` with samples of a set pace. slots: of the worker's pool."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.slots = 10**6
        self.arms = ("full", "budget")
        self._folder = folder
        monkeypatch.setattr(overhead, "bandwidth", lambda: 1e9)
        monkeypatch.setattr(overhead, "measure", self._measure)
        monkeypatch.setattr(load, "state", self._state)

    async def _state(self, url: str) -> dict[str, Any]:
        return {"memory_usage": {"token_capacity": self.slots}}

    async def _measure(self, samples: list[dict[str, Any]], *_: Any) -> None:
        timers = {name: [10, 1.0, 1.0] for name in ("step.prepare", "step.run", "step.result")}
        for arm in self.arms:
            samples.append({"round": 0, "window": 16, "arm": arm, "timers": timers})
        if len(self.arms) == 1:
            _fail()

    def run(self) -> tuple[int, dict[str, Any], str]:
        """Exit status, report, page."""
        status = overhead.main(["--gpu", *_tiny(self._folder)])
        page = (self._folder / "overhead.md").read_text()
        return status, _written(self._folder, "overhead"), page


@pytest.fixture
def overheads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> _Overhead:
    return _Overhead(monkeypatch, tmp_path)


def test_overhead_stands_without_a_trace(
    overheads: _Overhead, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overhead, "trace", _fail_later)
    status, report, page = overheads.run()
    assert status == 0 and "error" not in report and "kernels" not in report
    assert "| 16 | 300 | 300 | 0 |" in page
    assert "No trace of the GPU kernels: RuntimeError: the worker ended a request" in page


def test_overhead_keeps_its_samples(overheads: _Overhead) -> None:
    overheads.arms = ("full",)
    status, report, _ = overheads.run()
    assert status == 1 and len(report["samples"]) == 1
    assert report["summary"] == []


def test_overhead_refuses_a_pool_in_which_requests_would_wait(overheads: _Overhead) -> None:
    needed = 16 * (2048 + 256 + 8) + 64
    overheads.slots = needed - 1
    status, report, _ = overheads.run()
    assert status == 1 and report["samples"] == []
    assert report["error"].startswith(f"memory for {needed - 1:,} of {needed:,} slots: lower")
