"""The page holds what was kept, needs nothing else, and runs nothing that a model wrote."""

from __future__ import annotations

import base64
import gzip
import hashlib
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from typer.testing import CliRunner

from tests.inspection.samples import (
    HOSTILE,
    PageParts,
    byte_fallback_tokenizer,
    byte_tokenizer,
    sample,
)
from vase_sgl.cli import build_app
from vase_sgl.inspection import InspectionError
from vase_sgl.inspection.page import build_page
from vase_sgl.inspection.tokens import load_tokenizer, token_texts

IDS = byte_tokenizer().encode(HOSTILE + " A few more words, so that there are rounds.").ids


def test_the_data_is_what_was_kept() -> None:
    inspection = sample(IDS)
    assert inspection.rounds >= 5
    data = PageParts(build_page(inspection, None)).data
    shape = (data["layers"], len(data["heads"]), len(data["tokenIds"]))
    raw = gzip.decompress(base64.b64decode(data["evictedInRound"]))
    table = np.frombuffer(raw, "<u2").reshape(shape)
    assert np.array_equal(table, inspection.evicted_in_round)
    assert data["roundLengths"] == inspection.round_lengths.tolist()
    assert data["tokenIds"] == IDS and data["texts"] is None and data["promptTokens"] == 20
    for number in range(1, inspection.rounds + 1):
        assert (inspection.kept(number).sum(axis=2) == 24).all()


def test_equal_inspections_give_equal_pages() -> None:
    assert build_page(sample(IDS), None) == build_page(sample(IDS), None)


def test_a_hostile_text_stays_text() -> None:
    texts = token_texts(byte_tokenizer(), IDS)
    assert HOSTILE in "".join(text or "" for text in texts)
    parts = PageParts(build_page(sample(IDS), texts))
    assert parts.data["texts"] == texts
    clean = PageParts(build_page(sample(IDS), ["x"] * len(IDS)))
    assert parts.tags == clean.tags and "img" not in parts.tags
    assert parts.contents["script"] == clean.contents["script"]


def test_nothing_is_fetched() -> None:
    page = build_page(sample(IDS), None)
    parts = PageParts(page)
    assert parts.attributes.isdisjoint({"src", "href", "action", "data", "srcset", "onload"})
    for word in ("http:", "https:", "url(", "@import", "fetch(", "XMLHttpRequest", "import("):
        assert word not in page, word
    # Only this script and this style: the policy names their very bytes.
    for kind in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(parts.contents[kind].encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in parts.policy
    assert parts.policy.startswith("default-src 'none';")


def test_each_token_has_its_text() -> None:
    tokenizer = byte_tokenizer()
    texts = token_texts(tokenizer, tokenizer.encode("a é🦑b").ids)
    assert texts == ["a", " ", "", "é", "", "", "", "🦑", "b"]


def test_an_id_that_the_tokenizer_does_not_have_has_no_text() -> None:
    """A model's vocabulary is padded; a tokenizer's ids may have gaps."""
    tokenizer = byte_tokenizer()
    a, half = tokenizer.encode("a").ids[0], tokenizer.encode("é").ids
    assert token_texts(tokenizer, [a, 256, half[0], -1, half[1]]) == ["a", None, "", None, "é"]
    with_gap = Tokenizer(models.WordLevel({"a": 0, "b": 9}))
    assert token_texts(with_gap, [9, 5]) == ["b", None]


def test_bytes_that_are_no_character_leave_the_text_before_them() -> None:
    """Byte fallback decodes a run of bytes as a whole, as text or not."""
    tokenizer = byte_fallback_tokenizer()
    the, cat = 256, 257
    half = [0xF1, 0xA0]
    texts = token_texts(tokenizer, [the, 0x0A, *half, cat, the, 0x0A, 0xC3, 0xA9, 0xC3, the, *half])
    broken = ["", "", "\ufffd\ufffd cat"]
    assert texts == ["the", "\n", *broken, " the", "\n", "", "é", "", "\ufffd the", "", ""]


def test_a_tokenizer_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(InspectionError, match=r"no tokenizer at .*name the model's folder"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InspectionError, match=r"is not a tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_the_command(tmp_path: Path) -> None:
    sample(IDS).save(tmp_path / "sample.npz")
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    page = tmp_path / "page.html"

    def run(*more: str, status: int = 0) -> str:
        flags = ["inspect", "sample", "--dir", str(tmp_path), "-o", str(page), *more]
        result = CliRunner().invoke(build_app(), flags)
        assert result.exit_code == status, result.output
        return result.stderr

    assert run("--tokenizer", str(tmp_path)) == ""
    assert "".join(PageParts(page).data["texts"]).startswith(HOSTILE)
    assert run() == "" and PageParts(page).data["texts"] is None
    sample([*IDS, 300]).save(tmp_path / "sample.npz")
    assert f"{tmp_path} has no text for 1 of the tokens, and their ids are shown; " in run(
        "--tokenizer", str(tmp_path)
    )
    assert PageParts(page).data["texts"][-2:] == [".", None]
    assert "there is no tokenizer at" in run("--tokenizer", str(tmp_path / "x"), status=1)
    sample(IDS, recorded_rounds=2, total_heads=4).save(tmp_path / "sample.npz")
    errors = run()
    assert f"the files of KV heads 2, 3 are not in {tmp_path}" in errors
    assert f"only the first 2 of {sample(IDS).rounds} rounds were recorded" in errors
    (tmp_path / "sample.npz").unlink()
    assert "has no file of request sample; it is written right after" in run(status=1)
