"""The one command for a GPU: resumes, stops on a failed check, cuts what takes too long."""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import json
import math
import os
import tarfile
import time
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from benchmarks import attention_backend, environment, gpu
from benchmarks.environment import COMMIT, NO_COMMIT, ROOT
from benchmarks.gpu import Stage
from benchmarks.workers import describe_checkout
from tests.gateway.running import until


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


def _run(
    folder: Path, *stages: Stage, deadline: float = math.inf, **options: Any
) -> tuple[int, dict[str, Any]]:
    chosen = argparse.Namespace(
        output=folder, again=False, dry_run=False, minutes=1.0, worker_arg=[], archive=None
    )
    vars(chosen).update(options)
    status = gpu.run(list(stages), chosen, deadline)
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


async def test_the_processes_of_a_cut_stage_end_with_it(modules: Path) -> None:
    """As those of tests on several cores, which do not hear of SIGTERM."""
    child = "import fcntl, time; held = open('held', 'w'); fcntl.flock(held, fcntl.LOCK_EX); "
    child += "open('begun', 'w'); time.sleep(60)"
    (modules / "modules" / "stage_parent.py").write_text(
        f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}], "
        f"cwd={str(modules)!r})\n"
    )
    minutes = 0.01
    while not (modules / "begun").exists():  # a busy machine needs longer to begin
        minutes *= 2
        _run(modules, Stage("parent", ("stage_parent",)), minutes=minutes)

    def ended() -> bool:
        with (modules / "held").open() as held:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    await until(ended)


def test_a_call_ends_in_its_time(modules: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What runs is cut, and what would be cut is not begun."""
    ok, slow = Stage("ok", ("stage_ok",), minutes=2), Stage("slow", ("stage_slow",))
    long = Stage("long", ("stage_ok", "1"), minutes=2)
    _run(modules, ok)
    now = time.monotonic()
    # What is done before takes no time.
    status, state = _run(modules, ok, long, slow, deadline=now)
    assert status == 1 and list(state) == ["ok"]
    assert "[2/3] long: takes about 2 minutes, 0.0 are left; call again" in capsys.readouterr().err
    _, state = _run(modules, slow, deadline=now + 2)
    assert time.monotonic() - now < 20
    assert state["slow"]["status"].startswith("cut after 0.0")
    # A stage that its own limit would cut earlier needs no more than that.
    _, state = _run(modules, long, deadline=time.monotonic() + 80)
    assert state["long"]["status"] == "ok"


def test_the_end_of_a_call_leaves_time_to_write(monkeypatch: pytest.MonkeyPatch) -> None:
    deadlines: list[float] = []
    monkeypatch.setattr(gpu, "on_gpu", lambda: True)
    monkeypatch.setattr(gpu, "run", lambda picked, chosen, deadline: deadlines.append(deadline))
    gpu.main(["--only", "kernels"])
    gpu.main(["--only", "kernels", "--within", "9"])
    assert deadlines[0] == math.inf
    assert deadlines[1] - time.monotonic() == pytest.approx(9 * 60 - 90, abs=5)


def test_results_are_packed_after_every_stage(modules: Path) -> None:
    """So that those of stages before one in which the machine goes are there."""
    archive, output = modules / "gpu.tar.gz", modules / "results" / "gpu"
    listing = f"import tarfile\nopen({str(modules / 'seen')!r}, 'w').write("
    listing += f"' '.join(tarfile.open({str(archive)!r}).getnames()))\n"
    (modules / "modules" / "stage_list.py").write_text(listing)
    stages = (Stage("ok", ("stage_ok",)), Stage("list", ("stage_list",)))
    _run(output, *stages, Stage("bad", ("stage_bad",), must_pass=True), archive=archive)
    assert sorted((modules / "seen").read_text().split()) == ["gpu", "gpu/ok.log", "gpu/state.json"]
    with tarfile.open(archive) as packed:
        assert "gpu/bad.log" in packed.getnames()
        packed.extractall(modules / "back", filter="data")
    back = (modules / "back" / "gpu" / "state.json").read_text()
    assert back == (output / "state.json").read_text()


def test_a_copy_without_git_is_told_its_commit(
    modules: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = environment._commit()
    monkeypatch.setattr(environment, "ROOT", modules)  # no repository
    monkeypatch.delenv(COMMIT, raising=False)
    assert environment._commit() == {"id": NO_COMMIT, "dirty": False}
    for told, dirty in ((found["id"], False), (f"{found['id']}-dirty", True)):
        monkeypatch.setenv(COMMIT, told)
        assert environment._commit() == {"id": found["id"], "dirty": dirty}
    monkeypatch.setenv(COMMIT, "main")
    with pytest.raises(SystemExit, match="VASE_COMMIT: 'main' is not what python -m"):
        environment._commit()


def test_git_is_believed_first(monkeypatch: pytest.MonkeyPatch) -> None:
    found = environment._commit()
    monkeypatch.setenv(COMMIT, "0" * 40)
    assert environment._commit() == found


@pytest.mark.parametrize(
    ("capability", "flags", "missing"),
    [
        (9, [], "fa3"),
        (9, ["--attention-backend=triton"], None),
        (9, ["--attention-backend", "flashinfer"], "flashinfer"),
        (9, ["--decode-attention-backend=triton"], "fa3"),
        (12, [], None),
    ],
)
def test_a_missing_attention_backend_ends_the_run_before_its_first_stage(
    capability: int,
    flags: list[str],
    missing: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun: list[str] = []
    monkeypatch.setattr(gpu, "on_gpu", lambda: True)
    monkeypatch.setattr(gpu, "run", lambda picked, *_: begun.extend(one.name for one in picked))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (capability, 0))
    monkeypatch.setattr(
        attention_backend, "_MODULES", {"fa3": "nowhere_fa3", "flashinfer": "nowhere_flashinfer"}
    )
    given = [f"--worker-arg={flag}" for flag in flags]
    # Kernels alone need none.
    gpu.main(["--only", "kernels", *given])
    assert begun == ["kernels"]
    begun.clear()
    if missing is None:
        gpu.main(["--only", "replays", *given])
        assert begun == ["replays"]
        return
    said = (
        rf"attention backend {missing} cannot be imported here \(ModuleNotFoundError: No module "
        rf"named 'nowhere_{missing}'\): .* use --worker-arg=--attention-backend=triton"
    )
    with pytest.raises(SystemExit, match=said):
        gpu.main(["--only", "kernels", "replays", *given])
    assert not begun


def test_kernels_are_tested_on_several_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    def arguments(cores: int) -> tuple[str, ...]:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
        return gpu.stages("qwen3-14b")[0].arguments

    assert arguments(2) == ("pytest", "-q", "-n", "2", "tests/triton")
    assert arguments(64) == ("pytest", "-q", "-n", "8", "tests/triton")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert arguments(64) == ("pytest", "-q", "tests/triton")


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
