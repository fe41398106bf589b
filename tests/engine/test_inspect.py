"""`inspect`: the file says what was really kept, and asking for it changes nothing else."""

from __future__ import annotations

import dataclasses
import json
import time
import tracemalloc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.independent_decoder import (
    HEADS,
    KV_HEADS,
    LAYERS,
    IndependentDecoder,
    answer_length,
    weights_of,
)
from tests.engine.scheduler_harness import Answer, SteppedScheduler
from vase_sgl.engine import admission, inspector
from vase_sgl.engine.config import EngineConfig, engine_config
from vase_sgl.eviction import ParameterError
from vase_sgl.inspection import Inspection, InspectionError, load_request
from vase_sgl.inspection.file import FORMAT

VASE = {"budget": 24, "window": 8, "policy": "vase-attnv", "seed": 2**40 + 7}


def prompt_of(length: int) -> list[int]:
    return [2 + (17 * i + length) % 250 for i in range(length)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What --vase-inspect-dir names."""
    config = dataclasses.replace(engine_config(), inspect_dir=tmp_path)
    monkeypatch.setattr(admission, "engine_config", lambda: config)
    return tmp_path


def run(
    stepped: SteppedScheduler, rid: str, length: int, new: int, vase: dict[str, Any]
) -> tuple[list[int], dict[str, Any]]:
    """Tokens and final statistics."""
    stepped.answers.clear()
    stepped.submit(rid, prompt_of(length), max_new_tokens=new, vase=vase)
    stepped.run()
    answer = stepped.answers[rid]
    assert answer.statistics is not None
    return answer.tokens, answer.statistics


def test_an_inspected_request_that_never_fits_is_refused_like_any_other(
    stepped: SteppedScheduler, folder: Path
) -> None:
    stepped.answers.clear()
    vase = {**VASE, "inspect": True}
    stepped.submit("large", prompt_of(395), max_new_tokens=60, vase=vase)
    stepped.run()
    refusal = stepped.answers["large"].finish
    assert refusal is not None and "shorten the prompt" in refusal["message"]
    run(stepped, "next", 40, 20, vase)
    written(folder, "next")


def written(folder: Path, rid: str) -> Inspection:
    """The file, which is written by another thread."""
    deadline = time.monotonic() + 20
    while not (folder / f"{rid}.npz").exists():
        assert time.monotonic() < deadline, "no file was written"
        time.sleep(0.01)
    return load_request(folder, rid)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("prompt_mode", "length", "production"), [("evict", 45, True), ("keep", 12, False)]
)
def test_the_file_says_what_an_independent_decoder_keeps(
    stepped: SteppedScheduler, folder: Path, prompt_mode: str, length: int, production: bool
) -> None:
    """`production`: overlap loop, and a prompt that is in the prefix tree."""
    vase = VASE | {"prompt": prompt_mode}
    decoder = IndependentDecoder(weights_of(stepped), vase)
    new = answer_length(prompt_mode, length)
    expected = decoder.generate(prompt_of(length), new)
    stepped.configure(overlap=production, prefix_cache=production)
    if production:
        stepped.submit("before", prompt_of(length), max_new_tokens=2)
        stepped.run()
    tokens, statistics = run(stepped, "r1", length, new, vase | {"inspect": True})
    stepped.configure()
    assert tokens == expected
    found = written(folder, "r1")
    assert found.token_ids.tolist() == [*prompt_of(length), *tokens]
    assert (found.rounds, found.recorded_rounds) == (statistics["rounds"],) * 2
    assert found.rounds >= 4 and found.prompt_tokens == length
    assert found.heads.tolist() == list(range(KV_HEADS)) and found.total_heads == KV_HEADS
    pinned = length if prompt_mode == "keep" else 0
    for number in range(1, found.rounds + 1):
        kept = found.kept(number)
        assert kept.shape == (LAYERS, KV_HEADS, found.round_lengths[number - 1])
        assert (kept.sum(axis=2) == pinned + vase["budget"]).all()
        gone = decoder.forgotten[:number]
        for layer in range(LAYERS):
            for head in range(KV_HEADS):
                forgotten = sorted(p for round in gone for p in round[layer][head])
                assert np.flatnonzero(~kept[layer, head]).tolist() == forgotten


@torch.inference_mode()
def test_inspecting_changes_neither_tokens_nor_statistics(
    stepped: SteppedScheduler, folder: Path
) -> None:
    plain = run(stepped, "r", 45, 70, VASE)
    assert list(folder.iterdir()) == []  # never for a request that did not ask
    assert run(stepped, "r", 45, 70, VASE | {"inspect": True}) == plain
    text = json.dumps(dict(written(folder, "r").params))
    assert "seed" not in text and "inspect" not in text
    assert (folder / "r.npz").stat().st_mode & 0o777 == 0o600
    assert len(inspector._running) == 0


@torch.inference_mode()
def test_a_request_without_a_round_leaves_a_file_too(
    stepped: SteppedScheduler, folder: Path
) -> None:
    run(stepped, "short", 10, 5, VASE | {"inspect": True})
    found = written(folder, "short")
    assert found.rounds == 0 and not found.evicted_in_round.any()
    assert found.evicted_in_round.shape == (LAYERS, KV_HEADS, 15)


@torch.inference_mode()
def test_memory_is_bounded_and_the_file_says_what_is_missing(
    stepped: SteppedScheduler, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(stepped, "whole", 45, 70, VASE | {"inspect": True})
    inspection = written(folder, "whole")
    third = int(inspection.round_lengths[2])
    monkeypatch.setattr(inspector, "MAX_BYTES", LAYERS * KV_HEADS * third * 2)
    assert run(stepped, "part", 45, 70, VASE | {"inspect": True}) == whole
    found = written(folder, "part")
    assert found.rounds == inspection.rounds and found.recorded_rounds == 3
    assert np.array_equal(found.kept(3), inspection.kept(3))
    assert found.evicted_in_round.max() == 3
    with pytest.raises(ValueError, match="round 4 is not one of the 3 recorded"):
        found.kept(4)


def test_recordings_share_the_memory_and_have_no_gaps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspector, "_recordings", weakref.WeakSet())
    monkeypatch.setattr(inspector, "MAX_BYTES", 10 * 2)
    first, second = inspector.Recording(tmp_path), inspector.Recording(tmp_path)
    kept = torch.zeros(1, 1, 1, dtype=torch.int32)
    first.note(1, 6, kept)
    second.note(1, 4, kept)
    second.note(2, 5, kept)  # one position too many
    del first
    second.note(3, 6, kept)  # fits, but round 2 is not there
    second.fold(3)
    assert second.recorded_rounds == 1


def test_writing_a_table_needs_no_more_than_it_twice(tmp_path: Path) -> None:
    """The second is what the file holds; beside it is a layer, or numpy's buffer of 16 MiB."""
    layers, heads, length = 32, 4, 2**17
    recording = inspector.Recording(tmp_path)
    recording.note(1, length, torch.zeros(layers, 1, heads, dtype=torch.int32))
    recording.fold(1)
    inspection = Inspection(
        request_id="r",
        model="m",
        params={},
        prompt_tokens=1,
        total_heads=heads,
        recorded_rounds=1,
        token_ids=np.zeros(length, np.int32),
        round_lengths=np.array([length], np.int32),
        heads=np.arange(heads, dtype=np.int32),
        evicted_in_round=np.zeros((layers, heads, length), np.uint16),
    )
    tracemalloc.start()
    try:
        inspector._write(recording, inspection, 0, 0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (load_request(tmp_path, "r").evicted_in_round[:, :, :2] == [0, 1]).all()
    assert recording.nbytes == 32 * 2**20 and peak < 20 * 2**20


@torch.inference_mode()
def test_an_aborted_request_leaves_nothing(stepped: SteppedScheduler, folder: Path) -> None:
    stepped.submit("gone", prompt_of(20), max_new_tokens=500, vase=VASE | {"inspect": True})
    for _ in range(60):
        stepped.step()
    assert len(inspector._running) == 1
    stepped.abort("gone")
    stepped.run()
    run(stepped, "after", 10, 5, VASE | {"inspect": True})
    written(folder, "after")  # files are written in order
    assert [file.name for file in folder.iterdir()] == ["after.npz"]


@torch.inference_mode()
@pytest.mark.parametrize(
    ("rid", "value", "text"),
    [
        ("../up", True, "inspect: the request id names a file; send a rid of 1 to 128 letters"),
        ("a.tp1", True, "inspect: the request id names a file"),
        ("r", 1, "inspect must be true or false, got 1"),
    ],
)
def test_what_cannot_be_inspected_is_refused(
    stepped: SteppedScheduler, folder: Path, rid: str, value: object, text: str
) -> None:
    stepped.answers.clear()
    stepped.submit(rid, prompt_of(10), max_new_tokens=5, vase=VASE | {"inspect": value})
    stepped.run()
    assert_refused(stepped.answers[rid], text)
    assert list(folder.iterdir()) == []


@torch.inference_mode()
def test_without_a_folder_it_is_refused(stepped: SteppedScheduler) -> None:
    stepped.answers.clear()
    stepped.submit("r", prompt_of(10), max_new_tokens=5, vase=VASE | {"inspect": True})
    stepped.run()
    assert_refused(stepped.answers["r"], "start it with --vase-inspect-dir DIR, or leave inspect")


def assert_refused(answer: Answer, text: str) -> None:
    assert answer.finish is not None and answer.finish["status_code"] == 400
    assert text in answer.finish["message"] and answer.statistics is None


def test_settings(tmp_path: Path) -> None:
    folder = str(tmp_path)
    assert EngineConfig.from_env({"VASE_INSPECT_DIR": folder}).inspect_dir == tmp_path
    with pytest.raises(ParameterError, match=r"no folder that this process can write to; make"):
        EngineConfig.from_env({"VASE_INSPECT_DIR": folder + "/none"})
    with pytest.raises(ParameterError, match="inspect is for single requests"):
        EngineConfig.from_env({"VASE_DEFAULT": '{"budget": 99, "inspect": true}'})


@pytest.fixture
def two_ranks(tmp_path: Path) -> Callable[..., None]:
    """Writes the files of two ranks with one head each; `change` is of the second."""
    table = np.array([[[1, 2, 0, 0], [0, 1, 2, 0]]], np.uint16)

    def write(**change: Any) -> None:
        for rank in (0, 1):
            part = Inspection(
                request_id="r",
                model="m",
                params={"budget": 2},
                prompt_tokens=1,
                total_heads=2,
                recorded_rounds=2,
                token_ids=np.arange(4, dtype=np.int32),
                round_lengths=np.array([3, 4], np.int32),
                heads=np.array([rank], np.int32),
                evicted_in_round=table[:, rank : rank + 1],
            )
            part = dataclasses.replace(part, **change) if rank else part
            part.save(tmp_path / ("r.tp1.npz" if rank else "r.npz"))

    return write


def test_ranks_are_put_together(two_ranks: Callable[..., None], tmp_path: Path) -> None:
    two_ranks()
    found = load_request(tmp_path, "r")
    assert found.heads.tolist() == [0, 1] and found.missing_heads == []
    assert found.evicted_in_round.tolist() == [[[1, 2, 0, 0], [0, 1, 2, 0]]]
    assert found.kept(1).tolist() == [[[False, True, True], [True, False, True]]]
    two_ranks(recorded_rounds=1)
    found = load_request(tmp_path, "r")
    assert found.recorded_rounds == 1
    assert found.evicted_in_round.tolist() == [[[1, 0, 0, 0], [0, 1, 0, 0]]]
    (tmp_path / "r.npz").unlink()
    assert load_request(tmp_path, "r").missing_heads == [0]


def test_files_that_cannot_be_used_are_named(
    two_ranks: Callable[..., None], tmp_path: Path
) -> None:
    two_ranks(token_ids=np.zeros(4, np.int32))
    for rid, problem in [("r", "different requests"), ("x", "has no file"), ("../r", "no request")]:
        with pytest.raises(InspectionError, match=problem):
            load_request(tmp_path, rid)
    with pytest.raises(InspectionError, match="there is no folder"):
        load_request(tmp_path / "none", "r")
    file = tmp_path / "r.npz"
    whole = file.read_bytes()
    for content in (whole[:-40], b"", b"text", whole[:100] + b"\xff" * 60 + whole[160:]):
        file.write_bytes(content)
        with pytest.raises(InspectionError, match=r"damaged"):
            load_request(tmp_path, "r")
    # The first member's flags say that it is encrypted, or its method is one of no zip format.
    for offset, value in ((6, 1), (8, 77)):
        entry = whole.index(b"PK\1\2")
        changed = bytearray(whole)
        changed[offset] = changed[entry + offset + 2] = value
        file.write_bytes(changed)
        with pytest.raises(InspectionError, match=r"damaged"):
            load_request(tmp_path, "r")
    np.savez(file, facts=np.zeros(1))
    with pytest.raises(InspectionError, match=r"damaged"):
        load_request(tmp_path, "r")


def test_a_file_of_another_version_is_not_called_damaged(tmp_path: Path) -> None:
    """Whatever arrays it has."""
    facts = np.frombuffer(json.dumps({"format": FORMAT + 1}).encode(), np.uint8)
    np.savez(tmp_path / "r.npz", facts=facts, evictions=np.zeros(1))
    with pytest.raises(InspectionError, match=r"another version of vase_sgl; run the one that the"):
        load_request(tmp_path, "r")


def test_the_tiny_model_shares_heads() -> None:
    """Else the tests above could not tell query heads from KV heads."""
    assert HEADS != KV_HEADS
