"""Every benchmark of a worker without a worker: arguments, configurations, commands, results."""

from __future__ import annotations

import argparse
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from benchmarks import determinism, environment, gpu, overhead, paper, saturation, serving
from benchmarks.model_configs import SHAPES, write_config
from vase_sgl.engine.server import value_of
from vase_sgl.eviction.params import reserved_slots

MAINS = {
    "benchmarks.serving": serving.main,
    "benchmarks.saturation": saturation.main,
    "benchmarks.paper": paper.main,
    "benchmarks.overhead": overhead.main,
    "benchmarks.determinism": determinism.main,
}
STAGES = [stage for stage in gpu.stages("qwen3-14b") if stage.takes_dry_run]
CUT = [
    stage
    for stage in STAGES
    if stage.arguments[0] in ("benchmarks.serving", "benchmarks.saturation", "benchmarks.paper")
]


def _dry_run(stage: gpu.Stage, folder: Path) -> dict[str, Any]:
    chosen = argparse.Namespace(dry_run=True, output=folder, worker_arg=["--watchdog-timeout=7"])
    module, *arguments = gpu.command_of(stage, chosen)[2:]
    assert MAINS[module](arguments) == 0
    report: dict[str, Any] = json.loads((folder / f"{stage.name}.json").read_text())
    return report


@pytest.fixture(scope="module")
def sglang_flags() -> argparse.ArgumentParser:
    from vase_sgl.engine.torchvision_cpu import declare_torchvision_operators

    declare_torchvision_operators()
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser(exit_on_error=False)
    ServerArgs.add_cli_args(parser)
    return parser


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_gpu_stage_is_ready(
    stage: gpu.Stage, tmp_path: Path, sglang_flags: argparse.ArgumentParser
) -> None:
    report = _dry_run(stage, tmp_path)
    assert report["dry_run"] is True and report["environment"]["commit"]["id"]
    assert report["commands"]
    for command in report["commands"].values():
        assert value_of(command, "--load-format") == "dummy"
        assert value_of(command, "--model-path") in SHAPES
        assert not any(part.startswith("/") for part in command)  # no paths of this machine
        assert "--disable-cuda-graph" not in command
        assert "--disable-prefill-cuda-graph" in command
        assert "--watchdog-timeout=7" in command
        _, unknown = sglang_flags.parse_known_args(command[2:])
        flags = [part for part in unknown if part.startswith("--")]
        assert all(flag.startswith("--vase-") for flag in flags), flags


@pytest.mark.parametrize("stage", CUT, ids=lambda stage: stage.name)
def test_a_gpu_run_of_whole_answers_is_cut(stage: gpu.Stage, tmp_path: Path) -> None:
    """To their end they take longer than a stage may, and an arm without an end has no sample."""
    report = _dry_run(stage, tmp_path)
    chosen, commands = report["settings"], report["commands"].values()
    runs = len(commands) * chosen.get("rounds", 1)
    if stage.arguments[0] == "benchmarks.paper":
        assert not chosen["whole"]
    else:
        assert chosen["cut"] is True
        runs *= len(chosen["cells"])
    # A minute for every worker that starts.
    workers = len({tuple(command) for command in commands})
    assert runs * chosen["seconds"] + 60 * workers <= 60 * stage.minutes


def test_the_cost_of_determinism_starts_few_workers_on_a_gpu(tmp_path: Path) -> None:
    """One for each arm in each turn, beside that of the replays."""
    (stage,) = (stage for stage in STAGES if stage.name == "determinism")
    report = _dry_run(stage, tmp_path)
    arms = len(report["commands"]) - 1
    assert 60 * (1 + arms * report["settings"]["rounds"]) <= 60 * stage.minutes / 2


def test_every_gpu_stage_has_its_time() -> None:
    """With what is left of the limit for a machine that is a little slower."""
    for stage in gpu.stages("qwen3-14b"):
        assert 0 < stage.minutes <= gpu._MINUTES - 0.5, stage.name


def test_the_pool_of_overhead_is_not_left_to_sglang_on_a_gpu(tmp_path: Path) -> None:
    """For its one prefill of 32,768 tokens SGLang would reserve most of the memory."""
    (stage,) = (stage for stage in STAGES if stage.name == "overhead")
    (command,) = _dry_run(stage, tmp_path)["commands"].values()
    assert value_of(command, "--mem-fraction-static") == "0.6"
    given = ["--worker-arg=--mem-fraction-static=0.5", "--output", str(tmp_path), "--dry-run"]
    assert overhead.main(["--gpu", *given]) == 0
    (command,) = json.loads((tmp_path / "overhead.json").read_text())["commands"].values()
    assert command[-1] == "--mem-fraction-static=0.5"  # the last one counts


def test_one_stage_has_the_prefix_cache_on(tmp_path: Path) -> None:
    """And room for what first rounds copy, or requests would wait for one another."""
    name = "overhead_prefix_cache"
    (stage,) = (stage for stage in STAGES if stage.name == name)
    (command,) = _dry_run(stage, tmp_path)["commands"].values()
    assert "--disable-radix-cache" not in command
    slots = reserved_slots(
        2048, 257, budget=2048, window=64, prompt="evict", prefix_cache=True, page_size=1
    )
    assert int(value_of(command, "--max-total-tokens")) >= 16 * slots


def test_what_the_stages_run_is_installed_with_the_documented_extras() -> None:
    project = tomllib.loads((environment.ROOT / "pyproject.toml").read_text())["project"]
    extra = [text.partition(">")[0] for text in project["optional-dependencies"]["bench"]]
    modules = {stage.arguments[0].partition(".")[0] for stage in gpu.stages("qwen3-14b")}
    assert modules == {"benchmarks", "pytest"}
    assert {"matplotlib", "psutil", "pytest", "pytest-xdist"} <= set(extra)
    assert "pip install -e '.[gpu,bench]'" in (gpu.__doc__ or "")


def _commands(tmp_path: Path, *arguments: str) -> dict[str, list[str]]:
    given = ["--dry-run", "--model-config", "tiny", "--output", str(tmp_path), *arguments]
    assert serving.main(given) == 0
    commands: dict[str, list[str]] = json.loads((tmp_path / "serving.json").read_text())["commands"]
    return commands


def test_all_arms_of_serving_have_the_same_memory(tmp_path: Path) -> None:
    commands = _commands(tmp_path, "--cells", "8x100", "16x50", "--budget", "32", "--window", "8")
    assert list(commands) == ["stock", "full", "budget"]
    for flag in ("--max-total-tokens", "--max-running-requests", "--model-path"):
        assert len({value_of(command, flag) for command in commands.values()}) == 1
    # The largest cell's budgets, and no more than a little.
    assert value_of(commands["stock"], "--max-total-tokens") == str(16 * (32 + 8) + 64)
    assert commands["stock"][:2] == ["-m", "benchmarks.stock_worker"]
    assert commands["budget"] == commands["full"]
    assert not any("--vase" in part for part in commands["stock"])


def test_stock_can_have_the_bytes_of_the_plugins_buffers(tmp_path: Path) -> None:
    commands = _commands(tmp_path, "--cells", "8x100", "--arms", "stock", "stock-same-bytes")
    assert commands["stock-same-bytes"][:-2] == commands["stock"]
    slots = int(value_of(commands["stock"], "--max-total-tokens"))
    more = int(commands["stock-same-bytes"][-1])  # the last one counts
    shape = SHAPES["tiny"]
    rings = 8 * 64 * shape.layers * shape.heads * shape.head_dim * 2
    positions = slots * shape.layers * shape.kv_heads * 4
    spare = (more - slots) * shape.kv_bytes_per_token
    assert 0 <= rings + positions - spare < shape.kv_bytes_per_token


def test_both_decode_paths_can_be_arms(tmp_path: Path) -> None:
    arms = ("full", "full-stock-decode", "budget-stock-decode")
    assert list(_commands(tmp_path, "--arms", *arms)) == list(arms)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cells", "64by1000"], "not CONCURRENCYxTOKENS"),
        (["--cells", "0x5"], "not CONCURRENCYxTOKENS"),
        (["--arms", "fast"], "invalid choice"),
        (["--arms", "stock-same-bytes", "--kv-slots", "0"], "all arms share the bytes"),
        (["--model", "m", "--model-config", "tiny"], "not allowed with"),
        (["--model", "nowhere"], "no model at nowhere"),
    ],
)
def test_wrong_options_are_errors(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        serving.main(["--dry-run", *arguments])
    assert said in capsys.readouterr().err + str(error.value)


def test_without_a_gpu_a_gpu_run_refuses_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.options.on_gpu", lambda: False)
    monkeypatch.setattr("benchmarks.gpu.on_gpu", lambda: False)
    with pytest.raises(SystemExit, match="--gpu needs a GPU"):
        paper.main(["--gpu", "--model-config", "tiny"])
    with pytest.raises(SystemExit, match="needs a GPU"):
        gpu.main([])


def test_the_window_must_be_below_the_budget() -> None:
    with pytest.raises(SystemExit, match="--windows 64: budget 64 must be greater than window 64"):
        overhead.main(["--dry-run", "--budget", "64", "--windows", "16", "64"])
    with pytest.raises(SystemExit, match="--windows 60: protected_share"):
        overhead.main(["--dry-run", "--budget", "64", "--windows", "16", "60"])
    with pytest.raises(SystemExit, match="must be above the window"):
        paper.main(["--dry-run", "--budgets", "64"])


@pytest.mark.parametrize(
    ("name", "billions"),
    [("qwen3-0.6b", 0.596), ("qwen3-4b", 4.02), ("qwen3-8b", 8.19), ("qwen3-14b", 14.77)],
)
def test_shapes_have_the_published_number_of_parameters(name: str, billions: float) -> None:
    shape = SHAPES[name]
    embedding = 0 if shape.tied else shape.hidden * shape.vocabulary
    assert (shape.weight_bytes / 2 + embedding) / 1e9 == pytest.approx(billions, rel=0.005)


def test_a_configuration_is_written_as_sglang_reads_it(tmp_path: Path) -> None:
    folder = write_config("qwen3-14b", tmp_path)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["max_position_embeddings"] >= 256 + 32768  # the longest answer fits
    # 160 KiB a token, as in the paper's memory.
    assert SHAPES["qwen3-14b"].kv_bytes_per_token == 160 * 1024
    with pytest.raises(ValueError, match="unknown model 'qwen9'"):
        write_config("qwen9", tmp_path)
