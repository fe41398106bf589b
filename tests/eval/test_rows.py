"""Rows on disk: what an interruption leaves, and who may write."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from vase_sgl.eval.rows import Row, RowError, RowFile, latest, read

ROW = Row(
    run_id="r",
    arm="vase-attnv",
    policy="vase-attnv",
    task="t",
    item_id="1",
    seed_index=0,
    status="completed",
    started=1.0,
    total_seconds=2.0,
    budget=64,
    text="zwei\nZeilen \u2028 ä",
    malformed=("truncated",),
    seeds={"sampling": 2**63 - 1},
)


def test_a_row_survives_its_line() -> None:
    line = ROW.to_json()
    assert "\n" not in line
    assert Row.from_mapping(json.loads(line)) == ROW


def test_a_row_may_hold_half_a_character(tmp_path: Path) -> None:
    """JSON of a worker can; UTF-8 cannot."""
    half = dataclasses.replace(ROW, text="a\ud83d, ä \U0001f600")
    with RowFile(tmp_path / "rows.jsonl") as file:
        file.append(half)
    assert read(tmp_path / "rows.jsonl") == [half]
    assert "ä \U0001f600" in (tmp_path / "rows.jsonl").read_text(encoding="utf-8")


def test_a_torn_last_line_is_cut_off_and_the_rest_kept(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    other = dataclasses.replace(ROW, item_id="2")
    with RowFile(path) as file:
        file.append(ROW)
        file.append(other)
    whole = path.read_bytes()
    for kept in range(whole.index(b"\n") + 2, len(whole), 53):
        path.write_bytes(whole[:kept])
        with RowFile(path) as file:
            assert file.rows == [ROW]
            file.append(other)
        assert path.read_bytes() == whole


def test_the_last_row_of_a_sample_counts() -> None:
    failed = dataclasses.replace(ROW, status="failed")
    assert latest([failed, ROW])[ROW.key] is ROW
    assert latest([ROW, dataclasses.replace(ROW, seed_index=1)]).keys() == {
        ROW.key,
        (*ROW.key[:-1], 1),
    }


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", "line 2 is not an object"),
        (
            json.dumps({**json.loads(ROW.to_json()), "colour": 1}),
            "line 2 has an unknown key colour",
        ),
        ('{"arm": "x"}', "line 2 lacks item_id, policy, run_id"),
        (ROW.to_json().replace("completed", "done"), "line 2 has the unknown status 'done'"),
    ],
)
def test_a_damaged_line_is_named_and_nothing_is_changed(
    tmp_path: Path, line: str, text: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{ROW.to_json()}\n{line}\n", encoding="utf-8")
    before = path.read_bytes()
    for action in (read, RowFile):
        with pytest.raises(RowError) as caught:
            action(path)
        assert text in str(caught.value) and "remove that line" in str(caught.value)
    assert path.read_bytes() == before


def test_two_runs_cannot_write_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with RowFile(path), pytest.raises(RowError, match="is being written by another run"):
        RowFile(path)
    with RowFile(path):
        pass
