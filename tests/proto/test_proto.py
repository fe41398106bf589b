"""The protocol: lint, no breaking change, and generated code that is up to date."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUF = Path(sysconfig.get_path("scripts")) / "buf"


def run(*command: str | Path, **environment: str) -> None:
    done = subprocess.run(
        command,
        cwd=ROOT / "proto",
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_lint() -> None:
    run(BUF, "lint")


def test_nothing_breaks_against_the_committed_image() -> None:
    run(BUF, "breaking", "--against", "image.binpb")


def test_a_breaking_change_is_noticed(tmp_path: Path) -> None:
    """The check above can fail: it is not vacuous."""
    folder = tmp_path / "vase" / "v1"
    folder.mkdir(parents=True)
    (tmp_path / "buf.yaml").write_text((ROOT / "proto" / "buf.yaml").read_text())
    source = (ROOT / "proto" / "vase" / "v1" / "gateway.proto").read_text()
    (folder / "gateway.proto").write_text(source.replace("int32 rounds = 3;", "int64 rounds = 3;"))
    done = subprocess.run(
        [BUF, "breaking", "--against", ROOT / "proto" / "image.binpb"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0 and 'changed type from "int32" to "int64"' in done.stdout


def test_generated_code_is_up_to_date(tmp_path: Path) -> None:
    """If this fails: `make proto`, and commit what it writes."""
    (tmp_path / "vase_sgl" / "rpc" / "v1").mkdir(parents=True)
    run("sh", "generate.sh", PYTHON=sys.executable, OUT=str(tmp_path))
    fresh = sorted((tmp_path / "vase_sgl" / "rpc" / "v1").iterdir())
    assert len(fresh) == 6
    for file in fresh:
        committed = ROOT / "vase_sgl" / "rpc" / "v1" / file.name
        assert file.read_text() == committed.read_text(), file.name
