"""Two ranks (gloo) against a decoder that knows nothing of ranks.

Each rank evicts for its own KV head and asks nobody. Equal tokens over many rounds mean that both
ranks kept what one rank alone would have kept; the digest shows it for the head of rank 0, which
is the rank that answers. Caveat: partial sums of two ranks round differently from one rank's, so
equality of tokens is exact only where no two logits or keys are that close (float32, greedy here).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vase_kernels.reference import chain, format_digest
from vase_kernels.reference.digest import round_sum

from tests.e2e.worker_process import WorkerProcess
from tests.engine.independent_decoder import (
    LAYERS,
    IndependentDecoder,
    answer_length,
    clear_answer,
    weights_in,
)
from tests.engine.tiny_model import write_weights
from vase_sgl.inspection import load_request

pytestmark = pytest.mark.xdist_group("worker")

PROMPT = [2 + (17 * i) % 250 for i in range(45)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def inspect_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inspect")


@pytest.fixture(scope="module")
def two_ranks(
    checkpoint: Path, inspect_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[WorkerProcess]:
    flags = ("--skip-tokenizer-init", "--tp-size", "2", "--dtype", "float32")
    flags += ("--vase-inspect-dir", str(inspect_dir))
    with WorkerProcess(
        checkpoint,
        tmp_path_factory.mktemp("worker"),
        *flags,
        SGLANG_CPU_OMP_THREADS_BIND="0|0",
        OMP_NUM_THREADS="1",
    ) as process:
        yield process


def _digests(forgotten: list[list[list[list[int]]]], heads: list[int]) -> list[str]:
    digest, found = torch.tensor(0), []
    for number, layers in enumerate(forgotten, start=1):
        positions = torch.tensor([[[layer[head] for head in heads] for layer in layers]])
        total = round_sum(
            positions, torch.tensor([number]), torch.arange(LAYERS), torch.tensor(heads)
        )
        digest = chain(digest, total[0])
        found.append(format_digest(int(digest)))
    return found


@torch.inference_mode()
@pytest.mark.parametrize("policy", ["vase-attnv", "vase-dkv", "random"])
@pytest.mark.parametrize("mode", ["evict", "keep"])
def test_two_ranks_keep_what_one_keeps(
    two_ranks: WorkerProcess, checkpoint: Path, inspect_dir: Path, policy: str, mode: str
) -> None:
    rid = f"{policy}-{mode}"
    vase: dict[str, Any] = {
        "budget": 24,
        "window": 8,
        "policy": policy,
        "prompt": mode,
        "seed": 2**40 + 7,
    }
    weights = weights_in(checkpoint / "model.safetensors")
    new = answer_length(mode, len(PROMPT))
    prompt, expected, decoder = clear_answer(
        lambda: IndependentDecoder(weights, vase), len(PROMPT), new
    )
    answer = two_ranks.http.post(
        "/generate",
        json={
            "rid": rid,
            "input_ids": prompt,
            "sampling_params": {
                "max_new_tokens": new,
                "temperature": 0,
                "ignore_eos": True,
                "custom_params": {"vase": vase | {"inspect": True}},
            },
        },
    )
    answer.raise_for_status()
    found = answer.json()
    assert found["output_ids"] == expected
    rounds = found["meta_info"]["vase"]["round_digests"]
    assert len(rounds) >= 4
    assert rounds == _digests(decoder.forgotten, heads=[0])
    assert rounds != _digests(decoder.forgotten, heads=[0, 1])
    _check_files(inspect_dir, rid, decoder.forgotten)


def _check_files(folder: Path, rid: str, forgotten: list[list[list[list[int]]]]) -> None:
    """Each rank wrote what its head kept; together it is what was forgotten, head by head."""
    files = [folder / f"{rid}.npz", folder / f"{rid}.tp1.npz"]
    deadline = time.monotonic() + 20
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline, "a rank wrote no file"
        time.sleep(0.05)
    found = load_request(folder, rid)
    assert found.missing_heads == [] and found.recorded_rounds == found.rounds
    assert found.rounds == len(forgotten)
    for number, layers in enumerate(forgotten, start=1):
        for layer, heads in enumerate(layers):
            for head, positions in enumerate(heads):
                evicted = (found.evicted_in_round[layer, head] == number).nonzero()[0]
                assert evicted.tolist() == sorted(positions)


def test_the_fingerprint_names_the_ranks(two_ranks: WorkerProcess) -> None:
    """A record of one rank is not compared with two."""
    assert two_ranks.state()["fingerprint"]["tp_size"] == "2"
