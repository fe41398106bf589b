"""The worker's command line: what it adds to SGLang's, and errors before anything is loaded."""

from __future__ import annotations

import os
import pickle
import re
import socket
from pathlib import Path

import pytest

from vase_sgl.engine import server
from vase_sgl.engine.config import WORKER_TOKEN, EngineConfig
from vase_sgl.eviction import ParameterError
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


@pytest.mark.parametrize("given", [None, "0"])
@pytest.mark.parametrize("name", [server.SANITIZE_LOGITS, server.NO_COMPILER])
def test_a_cpu_makes_logits_finite_and_compiles_nothing(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path, name: str, given: str | None
) -> None:
    inherited = os.environ.get(WORKER_TOKEN)
    environment = {key: value for key, value in os.environ.items() if key != name}
    environment |= {} if given is None else {name: given}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(server.fork_server, "start", lambda _: None)
    monkeypatch.setattr(server, "end_with_parent", lambda: None)
    monkeypatch.setattr(server, "_serve", lambda _: 0)
    assert server.main(["--model-path", str(tiny_model)]) == 0
    assert environment[name] == (given or "1")
    assert environment[WORKER_TOKEN] != inherited


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
