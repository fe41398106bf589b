"""The worker's command line: what it adds to SGLang's, and errors before anything is loaded."""

from __future__ import annotations

import argparse
import os
import pickle
import re
import socket
from pathlib import Path

import pytest
from sglang.srt.server_args import ServerArgs

from vase_sgl.engine import server
from vase_sgl.engine.config import WORKER_TOKEN, EngineConfig
from vase_sgl.eviction import ParameterError
from vase_sgl.gateway.worker_embedded import worker_command
from vase_sgl.worker_key import WORKER_KEY, HiddenKey


def test_cpu_defaults_fill_in_what_the_user_left_out() -> None:
    argv = server.complete_argv(["--model-path", "m", "--max-running-requests=3"], cpu=True)
    assert server.value_of(argv, "--max-running-requests") == "3"
    assert server.value_of(argv, "--attention-backend") == "torch_native"
    assert argv.count("--disable-cuda-graph") == argv.count("--sleep-on-idle") == 1


def test_cpu_defaults_are_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "2000")  # flags are broken at their dashes
    with pytest.raises(SystemExit):
        server.main(["--help"])
    shown = capsys.readouterr().out
    page = (Path(__file__).parents[2] / "docs" / "engine.md").read_text(encoding="utf-8")
    table = page.split("| default on a CPU |")[1].split("\n\n")[0]
    told = dict(re.findall(r"^\| `(\S+)` \| (\S+) \|$", table, re.MULTILINE))
    assert told == server._CPU_DEFAULTS
    assert all(f"{flag} {value}" in shown for flag, value in told.items())
    for switch in server._CPU_SWITCHES:
        assert f"`{switch}`" in table and switch in shown


def test_a_gpu_keeps_sglang_s_defaults() -> None:
    """The overlap scheduler, CUDA graphs and the prefix cache stay on."""
    argv = ["--model-path", "m"]
    assert server.complete_argv(argv, cpu=False) == argv


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the command would have SGLang serve with. Settings go to an environment of its own."""
    argv: list[str] = []
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(server.fork_server, "start", lambda _: None)
    monkeypatch.setattr(server, "end_with_parent", lambda: None)
    monkeypatch.setattr(server, "_serve", lambda given: argv.extend(given) or 0)
    return argv


@pytest.mark.parametrize("given", [None, "0"])
@pytest.mark.parametrize(
    ("name", "default"),
    [
        (server.SANITIZE_LOGITS, "1"),
        (server.NO_COMPILER, "1"),
        (server.REPRODUCIBLE_MKL, "AUTO,STRICT"),
    ],
)
def test_a_cpu_makes_logits_finite_compiles_nothing_and_rounds_alike(
    served: list[str], tiny_model: Path, name: str, default: str, given: str | None
) -> None:
    inherited = os.environ.get(WORKER_TOKEN)
    os.environ.pop(name, None)
    os.environ.update({} if given is None else {name: given})
    assert server.main(["--model-path", str(tiny_model)]) == 0
    assert os.environ[name] == (given or default)
    assert os.environ[WORKER_TOKEN] != inherited


def _read_by_sglang(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return parser.parse_args(argv)


@pytest.mark.parametrize("names", [[], ["--model"], ["--model-path", "other", "--model"]])
def test_the_model_is_given_as_to_sglang(
    served: list[str], tiny_model: Path, names: list[str]
) -> None:
    assert server.main([*names, str(tiny_model), "--port", "0"]) == 0
    assert _read_by_sglang(served).model_path == str(tiny_model)


def test_what_a_config_file_says_is_given(
    served: list[str], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It stands above a CPU's defaults and below the command line."""
    file = tmp_path / "worker.yaml"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        file.write_text(
            f"model: {tiny_model}\nport: {port}\nmax-total-tokens: 4096\nsleep-on-idle: false\n"
            "max-running-requests: 4\nenable-torch-compile: true\nvase-max-budget: 512\n"
        )
        config = ["--config", str(file)]
        assert f"cannot listen on 127.0.0.1:{port}" in _fails(capsys, *config)
        flags = ("--port", "0", "--max-running-requests", "2")
        os.environ.pop(server.NO_COMPILER)
        assert server.main([*config, *flags]) == 0
    read = _read_by_sglang(served)
    assert (read.max_total_tokens, read.max_running_requests) == (4096, 2)
    assert read.attention_backend == "torch_native" and server.NO_COMPILER not in os.environ
    assert os.environ["VASE_MAX_BUDGET"] == "512"


def test_a_gateway_places_its_worker_whatever_a_file_says(
    served: list[str], tiny_model: Path, tmp_path: Path
) -> None:
    file = tmp_path / "worker.yaml"
    file.write_text("model-path: other\nhost: 0.0.0.0\nport: 1\nstream-interval: 4\n")
    command = worker_command(str(tiny_model), ["--config", str(file)])
    flags = command[command.index("worker") + 1 :]
    assert server.main([*flags, "--host", "127.0.0.1", "--port", "0"]) == 0
    read = _read_by_sglang(served)
    assert (read.model_path, read.host, read.port) == (str(tiny_model), "127.0.0.1", 0)
    assert read.stream_interval == 4 and read.incremental_streaming_output
    assert read.uvicorn_access_log_exclude_prefixes == ["/health", "/server_info"]


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("c.txt", "", "must be YAML format"),
        ("c.yaml", "port: [", "--config: while parsing"),
        ("c.yaml", "8: 1", "--config: the names of flags must be text"),
        ("c.yaml", "disable-cuda-graph: true", "Unsupported config option 'disable_cuda_graph'"),
        ("c.yaml", f"api-key: {'l' * 16}", "both --api-key and VASE_WORKER__API_KEY are set"),
    ],
)
def test_wrong_config_files(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    name: str,
    content: str,
    text: str,
) -> None:
    monkeypatch.setenv(WORKER_KEY, "k" * 16)
    file = tmp_path / name
    file.write_text(content)
    assert text in _fails(capsys, "--config", str(file))
    assert "write --config FILE" in _fails(capsys, f"--config={file}")


def _fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert server.main(list(argv)) == 2
    return capsys.readouterr().err


def test_missing_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "--model-path is missing" in _fails(capsys)
    assert f"no model at {tmp_path}" in _fails(capsys, "--model-path", str(tmp_path))


def test_port_taken(capsys: pytest.CaptureFixture[str], tiny_model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        text = _fails(capsys, "--model-path", str(tiny_model), "--port", port)
    assert f"cannot listen on 127.0.0.1:{port}" in text
    assert "choose another --port" in text


def test_a_port_of_ipv6() -> None:
    try:
        taken = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("this machine has no IPv6")
    server.check_port("::1", 0)
    with taken, pytest.raises(server.WorkerError, match="cannot listen on ::1:"):
        server.check_port("::1", taken.getsockname()[1])


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--vase-default", '{"budget": 8, "window": 8}'), "must be greater than window"),
        (("--vase-default", "{"), "VASE_DEFAULT is wrong"),
        (("--vase-max-window", "0"), "max_window must be an integer"),
    ],
)
def test_wrong_settings(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tiny_model: Path,
    flags: tuple[str, str],
    text: str,
) -> None:
    for name in ("VASE_DEFAULT", "VASE_MAX_WINDOW", "VASE_MAX_BUDGET"):
        monkeypatch.setenv(name, "")  # restored afterwards, whatever the command exports
        monkeypatch.delenv(name)
    assert text in _fails(capsys, "--model-path", str(tiny_model), *flags)


@pytest.mark.parametrize(
    ("key", "flags", "text"),
    [
        ("a key with spaces", (), "VASE_WORKER__API_KEY must be at least 16 ASCII characters"),
        ("a-key-with-é-in-it", (), "VASE_WORKER__API_KEY must be at least 16 ASCII characters"),
        ("", (), "VASE_WORKER__API_KEY must be at least 16 ASCII characters"),
        ("k" * 16, ("--api-key", "l"), "both --api-key and VASE_WORKER__API_KEY are set"),
    ],
)
def test_wrong_keys(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    key: str,
    flags: tuple[str, ...],
    text: str,
) -> None:
    monkeypatch.setenv(WORKER_KEY, key)
    assert text in _fails(capsys, *flags)


def test_a_key_does_not_show() -> None:
    key = HiddenKey("secret")
    assert f"Bearer {key}" == "Bearer secret" and "secret" not in repr({"api_key": key})
    assert "secret" not in repr(pickle.loads(pickle.dumps(key)))


def test_settings_come_from_the_environment() -> None:
    config = EngineConfig.from_env(
        {"VASE_MAX_BUDGET": "512", "VASE_MAX_WINDOW": "32", "VASE_DEFAULT": '{"budget": 256}'}
    )
    assert config.limits.max_budget == 512
    assert config.default == {"budget": 256}
    with pytest.raises(ParameterError, match="VASE_MAX_BUDGET must be an integer, got 'x'"):
        EngineConfig.from_env({"VASE_MAX_BUDGET": "x"})
    assert EngineConfig.from_env({"VASE_MAX_REQUESTS": "1"}).max_requests == 1
    with pytest.raises(ParameterError, match="VASE_MAX_REQUESTS must be at least 1, got 0"):
        EngineConfig.from_env({"VASE_MAX_REQUESTS": "0"})
    with pytest.raises(ParameterError, match="VASE_KERNELS must be auto, triton, reference, got"):
        EngineConfig.from_env({"VASE_KERNELS": "cuda"})
    assert EngineConfig.from_env({"VASE_CPU_DECODE": "stock"}).cpu_decode == "stock"
    assert EngineConfig.from_env({"VASE_CHECK_INTEGRITY": "1"}).check_integrity
    with pytest.raises(ParameterError, match="VASE_INTEGRITY_LOG: /none/log cannot be written: No"):
        EngineConfig.from_env({"VASE_INTEGRITY_LOG": "/none/log"})
    assert EngineConfig.from_env({"VASE_DEFAULT": ""}) == EngineConfig()
