"""What a run says meanwhile."""

from __future__ import annotations

import re

import pytest

from tests.eval.test_report import row
from vase_sgl.eval.progress import Progress


def test_names_are_not_taken_for_markup(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ids of items are the user's own."""
    for terminal in ("", "1"):
        monkeypatch.setenv("FORCE_COLOR", terminal)
        monkeypatch.setenv("COLUMNS", "400")
        with Progress(total=1, left=1, warn_of_unopened=True) as progress:
            progress.say("starting [/models/a]")
            progress.add(row("a?[/b]=1", 64, "[/item]", text="so</think> 5"))
        shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
        assert "[/item] closes a think block" in shown
        assert "1 of 1 samples have an outcome" in shown
