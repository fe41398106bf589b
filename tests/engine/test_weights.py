"""The digest of a model's weights, wherever SGLang would find them."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import pytest
import sglang
import torch
import transformers
import triton
from sglang.srt.server_args import ServerArgs
from vase_kernels import REVISION

import vase_sgl
from tests.engine.scheduler_harness import SteppedScheduler
from vase_sgl.engine import fingerprint, platform_cpu, server_info
from vase_sgl.engine.config import WORKER_TOKEN, engine_config
from vase_sgl.engine.source_digest import source_digest
from vase_sgl.engine.weights import WeightsNotFound, tokenizer_digest, weights_digest
from vase_sgl.gateway.errors import WorkerUnavailable
from vase_sgl.gateway.worker_answers import worker_info

_OLD, _NEW = "a" * 40, "b" * 40


@pytest.fixture(autouse=True)
def _read_anew() -> None:
    weights_digest.cache_clear()


def _write(folder: Path, weights: bytes, config: bytes | None = b"{}") -> Path:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "README.md").write_text("no part of it")
    if config is not None:
        (folder / "config.json").write_bytes(config)
    return folder


def _snapshot(cache: Path, revision: str, weights: bytes, config: bytes | None = b"{}") -> None:
    """As the hub's library leaves a download behind; `main` is the last one."""
    repository = cache / "models--org--name"
    _write(repository / "snapshots" / revision, weights, config)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(revision)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_names_and_bytes_of_weights_and_configuration_count(tmp_path: Path) -> None:
    digest = weights_digest(str(_write(tmp_path / "a", b"1")))
    assert len(digest) == 32
    assert weights_digest(str(_write(tmp_path / "b", b"1"))) == digest
    assert weights_digest(str(_write(tmp_path / "c", b"2"))) != digest
    assert weights_digest(str(_write(tmp_path / "d", b"1", b'{"x": 1}'))) != digest


def test_a_name_on_the_hub_has_the_digest_of_its_files(cache: Path, tmp_path: Path) -> None:
    _snapshot(cache, _OLD, b"1")
    _snapshot(cache, _NEW, b"2")
    old = weights_digest(str(_write(tmp_path / "old", b"1")))
    new = weights_digest(str(_write(tmp_path / "new", b"2")))
    assert weights_digest("org/name") == new
    assert weights_digest("org/name", revision=_OLD) == old
    assert weights_digest("org/name", revision=_NEW) == new != old


def test_weights_in_a_download_folder_go_before_the_cache(cache: Path, tmp_path: Path) -> None:
    downloads = tmp_path / "downloads"
    _snapshot(downloads, _OLD, b"1", config=None)
    _snapshot(cache, _OLD, b"2", config=b"of the cache")
    both = weights_digest(str(_write(tmp_path / "both", b"1", b"of the cache")))
    assert weights_digest("org/name", download_dir=str(downloads)) == both
    assert weights_digest("org/name", download_dir=str(tmp_path / "empty")) != both


def test_a_single_file(tmp_path: Path) -> None:
    for name, content in (("a", b"1"), ("b", b"2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.gguf").write_bytes(content)
    one, other = (weights_digest(str(tmp_path / name / "model.gguf")) for name in "ab")
    assert one != other


@pytest.mark.parametrize("path", ["org/name", "s3://bucket/model", "an/impossible/name"])
def test_weights_that_are_not_here(cache: Path, path: str) -> None:
    with pytest.raises(WeightsNotFound, match="no weights"):
        weights_digest(path)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(WeightsNotFound, match=str(tmp_path)):
        weights_digest(str(tmp_path))


def test_unknown_weights_equal_no_other_process(
    cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = SimpleNamespace(
        model_path="org/name",
        revision=None,
        download_dir=None,
        load_format="auto",
        weight_cache_mode="off",
    )
    names = []
    for worker in ("a", "b"):
        fingerprint._begin_to_read.cache_clear()  # as another process
        monkeypatch.setenv(WORKER_TOKEN, worker)
        with caplog.at_level(logging.WARNING):
            names += [fingerprint.begin_to_read_weights(args).result() for _ in range(2)]
    assert names[0] == names[1] != names[2] == names[3]
    assert names[0].startswith("unknown-")
    assert caplog.text.count("INCOMPARABLE") == 2
    args.load_format = "dummy"
    assert fingerprint.begin_to_read_weights(args).result() == "dummy"


@pytest.mark.parametrize(
    ("load_format", "weight_cache_mode"), [("remote_instance", "off"), ("auto", "client")]
)
def test_weights_of_another_process_are_not_those_of_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load_format: str, weight_cache_mode: str
) -> None:
    args = SimpleNamespace(
        model_path=str(_write(tmp_path / "a", b"1")),
        revision=None,
        download_dir=None,
        load_format=load_format,
        weight_cache_mode=weight_cache_mode,
    )
    found = []
    for worker in ("a", "b"):
        fingerprint._of_another_process.cache_clear()  # as another process
        monkeypatch.setenv(WORKER_TOKEN, worker)
        found.append(fingerprint.begin_to_read_weights(args).result())
    assert found[0].startswith("unknown-") and found[0] != found[1]


def test_weights_that_are_still_read_hold_nothing_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = threading.Event()
    monkeypatch.setattr(fingerprint, "weights_digest", lambda *_, **__: slow.wait() and "digest")
    monkeypatch.setattr(fingerprint, "_PATIENCE_SECONDS", 0.01)
    args = SimpleNamespace(
        model_path=str(tmp_path),
        revision=None,
        download_dir=None,
        load_format="auto",
        weight_cache_mode="off",
    )
    with pytest.raises(fingerprint.WeightsNotRead):
        fingerprint._digest_of_weights(args)
    monkeypatch.setattr(server_info, "describe", lambda _: fingerprint._digest_of_weights(args))
    monkeypatch.setattr(server_info, "answers_for_worker", lambda: True)
    answer = SimpleNamespace(internal_state={})
    server_info.report_state(answer, SimpleNamespace(scheduler=None), None)
    with pytest.raises(WorkerUnavailable, match="not ready: the weights are still being read"):
        worker_info({"internal_states": [answer.internal_state]})
    slow.set()
    assert fingerprint.begin_to_read_weights(args).result() == "digest"


def test_only_the_rank_that_answers_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank of a tensor-parallel worker is asked, and would read all of them."""
    monkeypatch.setattr(server_info, "describe", lambda _: {"digest": "d"})
    told = []
    for rank in (0, 1):
        parallel = SimpleNamespace(attn_tp_rank=rank)
        monkeypatch.setattr(server_info, "get_parallel", lambda p=parallel: p)
        answer = SimpleNamespace(internal_state={})
        server_info.report_state(answer, SimpleNamespace(scheduler=None), None)
        told.append(answer.internal_state)
    assert told == [{"vase": {"digest": "d"}}, {}]


def test_only_flags_that_somebody_gave_are_entries() -> None:
    assert fingerprint._arithmetic(ServerArgs(model_path="m")) == {}
    given = ServerArgs(model_path="m", quantization="fp8", enable_fp32_lm_head=True)
    assert fingerprint._arithmetic(given) == {"quantization": "fp8", "enable_fp32_lm_head": "True"}


def test_flags_that_change_what_is_drawn_are_entries() -> None:
    """SGLang adds the preferred parameters to those of every request."""
    given = ServerArgs(model_path="m", preferred_sampling_params={"stop": ["x"]})
    assert fingerprint._arithmetic(given) == {"preferred_sampling_params": "{'stop': ['x']}"}
    given = ServerArgs(model_path="m", enable_watermark=True)
    assert fingerprint._arithmetic(given) == {"enable_watermark": "True"}


def test_flags_that_change_the_order_of_sums_are_entries() -> None:
    given = ServerArgs(model_path="m", boundary_reduction="rs", attn_cp_size=2, moe_dp_size=2)
    expected = {"boundary_reduction": "rs", "attn_cp_size": "2", "moe_dp_size": "2"}
    assert fingerprint._arithmetic(given) == expected


def test_variables_that_change_the_numbers_are_entries(
    stepped: SteppedScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = fingerprint.fingerprint(stepped.scheduler)
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    monkeypatch.setenv("SGLANG_FORCE_FUSED_OP_BACKEND", "triton")
    added = {"mkl_cbwr": "COMPATIBLE", "sglang_force_fused_op_backend": "triton"}
    assert fingerprint.fingerprint(stepped.scheduler) == {**plain, **added}
    # Names that SGLang no longer knows would be read for nothing.
    source = Path(sglang.__file__).parent / "srt"
    text = "".join(path.read_text(encoding="utf-8") for path in source.rglob("*.py"))
    assert not [n for n in fingerprint._VARIABLES if n.startswith("SGLANG_") and n not in text]


def test_a_cpu_says_where_it_depends_on_company(
    stepped: SteppedScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told() -> str:
        return fingerprint.fingerprint(stepped.scheduler)["deterministic"]

    runner = stepped.scheduler.tp_worker.model_runner
    assert told() == "true"
    with monkeypatch.context() as patch:
        patch.setattr(type(runner.model), "__module__", "sglang.srt.models.mixtral")
        assert told() == "false"
    with monkeypatch.context() as patch:  # only plain products go in tiles
        patch.setattr(runner.model_config, "quantization", "w8a8_int8")
        assert told() == "false"
    # A file that SGLang gave up would be listed for nothing.
    assert all(importlib.util.find_spec(name) for name in fingerprint._INVARIANT_ON_CPU)
    stock = dataclasses.replace(engine_config(), cpu_decode="stock")
    monkeypatch.setattr(fingerprint, "engine_config", lambda: stock)
    assert told() == "false"


def test_updated_weights_are_a_worker_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its data-parallel schedulers must tell the same, each in a process of its own."""

    def told(worker: str, updates: int) -> str | None:
        monkeypatch.setenv(WORKER_TOKEN, worker)
        monkeypatch.setattr(fingerprint, "_updates", 0)
        for _ in range(updates):
            fingerprint.note_updated_weights()
        return fingerprint._updated

    monkeypatch.setattr(fingerprint, "_updated", None)
    assert told("a", 2) == told("a", 2)
    assert len({told("a", 1), told("a", 2), told("b", 1)}) == 3


def test_a_watermarks_keys_are_not_told() -> None:
    config = '{"key": "5ec2e7"}'
    given = ServerArgs(model_path="m", watermark_config=config)
    found = fingerprint._arithmetic(given)["watermark_config"]
    assert "5ec2e7" not in found
    other = ServerArgs(model_path="m", watermark_config='{"key": "07e2"}')
    assert found != fingerprint._arithmetic(other)["watermark_config"]


def test_what_ends_an_answer_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    """A repository may mend its end tokens and leave the weights as they are."""
    names = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json")
    digests = []
    for changed in (None, *names):
        folder = tmp_path / str(changed)
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"w")
        for name in names:
            (folder / name).write_text("new" if name == changed else "old")
        digests.append(tokenizer_digest(str(folder)))
        assert weights_digest(str(folder)) == weights_digest(str(tmp_path / "None"))
    assert len(set(digests)) == len(digests)
    (tmp_path / "None" / "README.md").write_text("more")
    tokenizer_digest.cache_clear()
    assert tokenizer_digest(str(tmp_path / "None")) == digests[0]


def test_how_quantised_weights_are_multiplied_is_part_of_them(tmp_path: Path) -> None:
    digests = set()
    for text in ("a", "b"):
        folder = tmp_path / text
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"w")
        (folder / "hf_quant_config.json").write_text(text)
        digests.add(weights_digest(str(folder)))
    assert len(digests) == 2


def test_an_accelerator_names_the_packages_of_its_kernels() -> None:
    scheduler = SimpleNamespace(
        chunked_prefill_size=8192, tree_cache=SimpleNamespace(page_size=1, disable=True)
    )
    args = SimpleNamespace(enable_deterministic_inference=True)
    found = fingerprint._of_accelerators(scheduler, args)
    assert found["triton"] == triton.__version__
    expected = {
        "enable_deterministic_inference": "True",
        "chunked_prefill_size": "8192",
        "page_size": "1",
        "prefix_cache": "off",
    }
    assert expected.items() <= found.items()


@pytest.mark.parametrize(
    ("given", "quantization", "expected"),
    [
        ({}, None, True),
        ({"enable_deterministic_inference": False}, None, False),
        ({"bf16_gemm_backend": "gemv"}, None, False),
        ({}, "awq_marlin", False),
        ({"ep_dispatch_algorithm": "dynamic"}, None, False),
        ({"enable_eplb": True}, None, False),
        ({"enable_waterfill": True}, None, False),
        ({"kt_weight_path": "experts"}, None, False),
    ],
)
def test_an_accelerator_is_deterministic_if_it_was_asked_to_be_and_can(
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, object],
    quantization: str | None,
    expected: bool,
) -> None:
    """SGLang's flag takes quantised weights, a product for single rows and experts with replicas,
    and changes none of them.
    """
    monkeypatch.setattr(platform_cpu, "is_active", lambda: False)
    flags: dict[str, Any] = {"enable_deterministic_inference": True, **given}
    args = ServerArgs(model_path="m", **flags)
    runner = SimpleNamespace(
        model=torch.nn.Linear(1, 1), model_config=SimpleNamespace(quantization=quantization)
    )
    assert fingerprint._is_deterministic(args, runner) == expected


def test_what_decides_the_tokens_is_told(stepped: SteppedScheduler) -> None:
    """A part that is left out would let replays of other workers be called divergences."""
    found = fingerprint.fingerprint(stepped.scheduler)
    expected = {
        "model": Path(stepped.scheduler.server_args.model_path).name,
        "weights_digest": "dummy",
        "tokenizer_digest": tokenizer_digest(stepped.scheduler.server_args.model_path),
        "vase_sgl": vase_sgl.__version__,
        "engine": source_digest(),
        "sglang": sglang.__version__,
        "kernels": f"reference-{REVISION}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": "float32",
        "kv_cache_dtype": "float32",
        "attention_backend": "BatchInvariantBackend",
        "tp_size": "1",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "sampling_backend": "pytorch",
    }
    assert expected.items() <= found.items()
    assert found["device"].startswith("cpu ")


_X86 = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 26
model\t\t: 2
model name\t: AMD EPYC
flags\t\t: fpu vme

processor\t: 1
model name\t: another
"""
_ARM = (
    "processor\t: 0\nBogoMIPS\t: 50\nCPU implementer\t: 0x41\nCPU part\t: 0xd4f\n\nprocessor\t: 1\n"
)


@pytest.mark.parametrize(
    ("text", "model"), [(_X86, "AMD EPYC 26 2"), (_ARM, "0x41 0xd4f")], ids=["x86", "Arm"]
)
def test_a_cpu_is_named_by_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, model: str
) -> None:
    """CPUs of one instruction set, AVX512 say, have bfloat16 products of different bits."""
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(fingerprint, "_CPU_INFO", tmp_path / "cpuinfo")
    assert fingerprint._cpu_model() == model


@pytest.mark.parametrize(
    ("path", "served", "name"),
    [
        ("/models/a", "/models/a", "a"),
        ("org/a", None, "a"),
        ("org/a", "assistant", "assistant"),
    ],
)
def test_what_clients_call_the_model(path: str, served: str | None, name: str) -> None:
    assert (
        server_info._model_name(SimpleNamespace(model_path=path, served_model_name=served)) == name
    )
