"""What the start of a worker is told to have taken, without a worker."""

from __future__ import annotations

import contextlib
import io
import subprocess
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import startup


@pytest.fixture
def process() -> Iterator[int]:
    """One without children: of those that come and go meanwhile nothing can be measured."""
    with subprocess.Popen(["sleep", "600"]) as running:
        yield running.pid
        running.kill()


@pytest.mark.parametrize(("set_by", "phases"), [(0.0, {"weights": 4.0}), (-60.0, {})])
def test_phases_are_not_told_by_a_clock_that_was_set(
    set_by: float,
    phases: dict[str, float],
    process: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    began = 1_800_000_000.0
    log = tmp_path / "log"
    log.write_text(f"[{datetime.fromtimestamp(began + set_by + 4)}] Load weight end. \n")
    worker = SimpleNamespace(url="http://w", pid=process, wait_until_healthy=lambda: 9.0)
    monkeypatch.setattr(startup, "started", lambda *_, **__: contextlib.nullcontext(worker))
    answer = io.BytesIO(b'{"output_ids": [1]}')
    monkeypatch.setattr(startup.urllib.request, "urlopen", lambda *_, **__: answer)
    readings = iter((began, began + set_by + 10.0))
    ticks = iter((0.0, 9.0, 10.0, 10.0))
    clock = SimpleNamespace(time=lambda: next(readings), monotonic=lambda: next(ticks))
    monkeypatch.setattr(startup, "time", clock)
    found = startup.start(tmp_path, tmp_path, log)
    assert (found.health_seconds, found.first_token_seconds) == (9.0, 10.0)
    assert found.phases == phases
