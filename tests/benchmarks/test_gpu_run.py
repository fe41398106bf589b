"""The one command for a GPU: resumes, stops on a failed check, cuts what takes too long."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from benchmarks.environment import NO_COMMIT, ROOT
from benchmarks.gpu import Stage
from benchmarks.workers import describe_checkout


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of modules that stages may run; each notes that it ran."""
    folder = tmp_path / "modules"
    folder.mkdir()
    note = f"open({str(tmp_path / 'ran')!r}, 'a').write(__name__ + __spec__.name + '\\n')\n"
    (folder / "stage_ok.py").write_text(note)
    (folder / "stage_bad.py").write_text(f"{note}raise SystemExit('it is broken')\n")
    (folder / "stage_slow.py").write_text(f"{note}import time\ntime.sleep(600)\n")
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    )
    monkeypatch.setattr(gpu, "describe", dict)  # what it notes is tested elsewhere
    return tmp_path


def _run(folder: Path, *stages: Stage, **options: Any) -> tuple[int, dict[str, Any]]:
    chosen = argparse.Namespace(
        output=folder, again=False, dry_run=False, minutes=1.0, worker_arg=[]
    )
    vars(chosen).update(options)
    status = gpu.run(list(stages), chosen)
    state: dict[str, Any] = json.loads((folder / "state.json").read_text())["stages"]
    return status, state


def _times(folder: Path, name: str) -> int:
    return (folder / "ran").read_text().split().count(f"__main__{name}")


def test_what_succeeded_is_not_run_again(modules: Path) -> None:
    ok, bad = Stage("ok", ("stage_ok",)), Stage("bad", ("stage_bad",))
    status, state = _run(modules, ok, bad)
    assert status == 1
    assert state["ok"]["status"] == "ok"
    assert state["bad"]["status"] == "exit status 1: it is broken"
    _run(modules, ok, bad)
    assert (_times(modules, "stage_ok"), _times(modules, "stage_bad")) == (1, 2)
    _run(modules, ok, again=True)
    assert _times(modules, "stage_ok") == 2


def test_another_command_is_run(modules: Path) -> None:
    """What succeeded with another model or other flags is another measurement."""
    ok = Stage("ok", ("stage_ok", "--model-config", "small"), takes_dry_run=True)
    _run(modules, ok)
    for stage, flags in (
        (dataclasses.replace(ok, arguments=("stage_ok", "--model-config", "large")), []),
        (ok, ["--attention-backend=flashinfer"]),
    ):
        before = _times(modules, "stage_ok")
        _run(modules, stage, worker_arg=flags)
        _run(modules, stage, worker_arg=flags)
        assert _times(modules, "stage_ok") == before + 1


def test_a_check_holds_for_the_code_that_it_checked(
    modules: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit: dict[str, Any] = {"id": "a", "dirty": False}
    monkeypatch.setattr(gpu, "describe", lambda: {"commit": dict(commit)})
    check = Stage("check", ("stage_ok",), must_pass=True)
    measurement = Stage("measurement", ("stage_ok", "1"))
    for changes, times in (
        ({}, 1),
        ({}, 1),
        ({"id": "b"}, 2),
        ({"dirty": True}, 3),
        ({}, 4),
        ({"id": NO_COMMIT, "dirty": False}, 5),
        ({}, 6),
    ):
        commit.update(changes)
        _run(modules, check)
        assert _times(modules, "stage_ok") == times, changes
    # A measurement says at which commit it was made, and stays.
    _run(modules, measurement)
    commit["id"] = "c"
    _run(modules, measurement)
    assert _times(modules, "stage_ok") == 7


def test_nothing_is_measured_after_a_failed_check(modules: Path) -> None:
    status, state = _run(
        modules, Stage("check", ("stage_bad",), must_pass=True), Stage("ok", ("stage_ok",))
    )
    assert status == 1 and "ok" not in state


def test_a_stage_is_cut_at_its_time(modules: Path) -> None:
    status, state = _run(modules, Stage("slow", ("stage_slow",)), minutes=0.01)
    assert status == 1
    assert state["slow"]["status"] == "cut after 0.01 minutes"


def test_an_unknown_stage_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--dry-run", "--only", "kernals"])
    said = "no stage kernals; there are kernel_tests, kernels_check, kernels,"
    assert said in capsys.readouterr().err


def test_only_checks_stop_the_run() -> None:
    """A benchmark that fails costs its own result alone."""
    needed = [stage.name for stage in gpu.stages("qwen3-14b") if stage.must_pass]
    assert needed == ["kernel_tests", "kernels_check", "replays"]


def test_a_checkout_that_is_not_installed_has_the_plugin(tmp_path: Path) -> None:
    """A machine may have SGLang and nothing else of ours than the files."""
    describe_checkout(tmp_path)
    (found,) = metadata.distributions(path=[str(tmp_path)])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (found.name, found.version) == (project["name"], project["version"])
    entries = {(entry.group, entry.name): entry.value for entry in found.entry_points}
    assert entries == {
        (group, name): place
        for group, names in project["entry-points"].items()
        for name, place in names.items()
    }
    assert ("sglang.srt.plugins", "vase_sgl") in entries
