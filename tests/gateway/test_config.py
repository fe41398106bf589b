"""Configuration: precedence, and errors that name the key."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel

from vase_sgl.gateway import tenants
from vase_sgl.gateway.config import ConfigError, Tls, load_config


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "gateway.yaml"
    file.write_text(text)
    return file


def test_options_beat_the_environment_beats_the_file_beats_the_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(
        tmp_path,
        "listen: {host: 0.0.0.0, port: 1}\nworker: {model_path: /m, args: [--tp, '2']}\n"
        "drain_seconds: 5\n",
    )
    monkeypatch.setenv("VASE_LISTEN__PORT", "2")
    monkeypatch.setenv("VASE_DRAIN_SECONDS", "6")
    monkeypatch.setenv("VASE_DEFAULT_EVICTION", '{"budget": 128, "window": 32}')
    config = load_config(file, {"listen": {"port": 3}})
    assert (config.listen.host, config.listen.port) == ("0.0.0.0", 3)
    assert config.worker.args == ("--tp", "2") and config.drain_seconds == 6
    assert config.default_eviction == {"budget": 128, "window": 32}
    assert config.grpc.max_receive_bytes == 4 * 2**20
    assert load_config(file).listen.port == 2


def test_a_variable_of_another_part_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VASE_CHECK_INTEGRITY", "1")
    monkeypatch.setenv("VASE_API_KEY", "vsk_x")
    monkeypatch.setenv("VASE_SGL_GATEWAY_PORT", "tcp://10.0.0.7:50051")
    monkeypatch.setenv("VASE_HTTP_PORT", "tcp://10.0.0.7:80")  # Kubernetes, of a Service vase-http
    load_config(overrides={"worker": {"model_path": "/m"}})


@pytest.mark.parametrize(
    ("variable", "value", "problem"),
    [
        ("VASE_AUDIT_URL", "postgresql://u:secret@db/a", "is VASE_AUDIT__URL"),
        ("VASE_TLS_CERTIFICATE", "/x.pem", "is VASE_TLS__CERTIFICATE"),
        ("VASE_WORKER_BREAKER__FAILURES", "3", "is VASE_WORKER__BREAKER__FAILURES"),
        ("VASE_DRAIN__SECONDS", "3", "is VASE_DRAIN_SECONDS"),
        ("VASE_DEFAULT_EVICTION_BUDGET", "64", "is VASE_DEFAULT_EVICTION__BUDGET"),
        ("VASE_WORKER__URLS", "http://u:secret@a", 'JSON; a list looks like ["one", "two"]'),
        (
            "VASE_WORKER__BREAKER",
            "3 of secret",
            'is not JSON; a mapping looks like {"key": "value"}',
        ),
        ("VASE_QUEUE__MAX_WAITNG", "3", "queue.max_waitng: unknown key; known are max_waiting"),
    ],
)
def test_a_variable_that_would_set_nothing_is_refused(
    variable: str, value: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError) as error:
        load_config(overrides={"worker": {"urls": ["http://x"]}})
    assert problem in str(error.value) and "secret" not in str(error.value)
    assert variable in str(error.value) or "unknown key" in problem


def test_a_default_evictions_keys_are_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path, "worker: {model_path: m}\ndefault_eviction: {budget: 64, window: 8}\n")
    monkeypatch.setenv("VASE_DEFAULT_EVICTION__BUDGET", "2048")
    monkeypatch.setenv("VASE_DEFAULT_EVICTION__POLICY", "snapkv")
    assert load_config(file).default_eviction == {"budget": 2048, "window": 8, "policy": "snapkv"}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("lisen: {}", "lisen: unknown key; known are listen, tls, grpc, http"),
        ("listen: {prt: 1}", "listen.prt: unknown key; known are host, port"),
        ("listen: {port: 99999}", "listen.port: Input should be less than or equal to 65535"),
        ("tls: {certificate: a, key: b, ca: c}", "tls.ca: unknown key; known are certificate"),
        ("worker: {model_path: m, urls: ['http://x']}", "exclude each other; set one"),
        ("drain_seconds: 3", "no worker: set worker.model_path (or --model-path)"),
        ("worker: {urls: ['x:1']}", "'x:1' is not a URL; one looks like http://"),
        ("worker: {urls: ['http://:30000']}", "'http://:30000' is not a URL; one looks like"),
        ("worker: {dns: ['http://:30000']}", "'http://:30000' is not a URL; one looks like"),
        ("worker: {urls: ['http://x', 'http://x']}", "a worker is named twice"),
        ("worker: {urls: ['http://x'], api_key: short}", "at least 16"),
        ("worker: {urls: ['http://x'], api_key: 'with spaces, and long'}", "without spaces"),
        ("worker: {model_path: m, args: [--api-key=x]}", "be seen by all users of the machine"),
        ("worker: {model_path: m, args: [--port, '1']}", "--port: an embedded worker is on a free"),
        ("worker: {model_path: m, args: [--host=h]}", "--host=h: an embedded worker is on a free"),
        ("worker: {urls: ['http://x'], ca_file: ca.pem}", "no worker's URL begins with https://"),
        ("worker: {model_path: m, ca_file: ca.pem}", "no worker's URL begins with https://"),
        ("worker: {dns: ['https://x:1']}", "a certificate names no addresses"),
        ("worker: {dns: ['http://x']}", "has no port; one looks like http://workers:30000"),
        ("worker: {model_path: m, dns: ['http://x:1']}", "exclude each other; set one"),
        ("telemetry: {otlp_endpoint: 'x:1'}", "'x:1' is not a URL; one looks like http://c"),
        ("limits: {on_redis_failure: ignore}", "limits.on_redis_failure: Input should be"),
        ("default_eviction: {budget: 5, window: 9}", "budget 5 must be greater than window 9"),
        ("default_eviction: {budget: 50, window: 9, seed: 1}", "seeds are derived per request"),
        ("default_eviction: {budget: 50, inspect: true}", "inspect cannot be set here"),
        ("[1]", "expected keys and values, found a list"),
        ("a: [", "is not YAML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, problem: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        load_config(file)
    assert problem in str(error.value) and str(file) in str(error.value)


def test_half_of_the_calls_may_wait_unless_it_is_said_how_many() -> None:
    def most(**sections: object) -> int:
        return load_config(overrides={"worker": {"model_path": "m"}, **sections}).max_waiting

    assert most() == 512
    assert most(grpc={"max_concurrent_calls": 7}) == 3
    assert most(grpc={"max_concurrent_calls": 1}) == 1
    assert most(queue={"max_waiting": 700}) == 700


def test_the_key_of_the_workers_does_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VASE_WORKER__API_KEY", "sixteen-letters-and-more")
    config = load_config(overrides={"worker": {"urls": ["http://x"]}})
    assert config.worker.api_key is not None
    assert config.worker.api_key.get_secret_value() == "sixteen-letters-and-more"
    assert "sixteen" not in repr(config)
    monkeypatch.setenv("VASE_WORKER__API_KEY", "fifteen letters")
    with pytest.raises(ConfigError) as error:
        load_config(overrides={"worker": {"urls": ["http://x"]}})
    assert "fifteen" not in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read configuration"):
        load_config(tmp_path / "none.yaml")


def test_the_documented_example_shows_every_key_with_its_default() -> None:
    example = Path(__file__).parents[2] / "docs" / "serve.example.yaml"
    config = load_config(example)
    defaults = load_config(overrides={"worker": {"model_path": "Qwen/Qwen3-8B"}})
    assert config.model_dump() == defaults.model_dump()
    text = example.read_text()
    sections = [
        "worker",
        "listen",
        "grpc",
        "http",
        "queue",
        "limits",
        "telemetry",
        "audit",
        "replay",
    ]
    for section in sections:
        for key in type(getattr(config, section)).model_fields:
            assert f"{key}:" in text, f"{section}.{key}"
    for key in type(config).model_fields:
        assert f"{key}:" in text, key


def test_the_reference_names_every_key() -> None:
    text = (Path(__file__).parents[2] / "docs" / "gateway.md").read_text()
    config = load_config(overrides={"worker": {"model_path": "m"}})
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        section = type(value) if isinstance(value, BaseModel) else Tls if name == "tls" else None
        for key in section.model_fields if section is not None else ():
            assert f"`{name}.{key}" in text, f"{name}.{key}"
        assert section is not None or f"`{name}`" in text, field
    for key in tenants.Limits.model_fields:
        assert f"`{key}`" in text, key
