"""What an option is given arrives where it acts."""

from __future__ import annotations

import asyncio
import datetime
import re
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.client.test_commands import run
from tests.client.test_help import COMMANDS
from tests.gateway.audit_records import numbered
from tests.gateway.running import empty_store, run_gateway
from vase_sgl.cli import build_app, times
from vase_sgl.gateway import config, logs, tenants
from vase_sgl.gateway.audit import AuditStore
from vase_sgl.gateway.audit.export import FileCheck
from vase_sgl.gateway.seeds import seeds_for


def names(*command: str) -> set[str]:
    """The options of a command, by the first name of each."""
    options = {parameter.opts[0] for parameter in COMMANDS[command].params}
    return {name for name in options if name.startswith("-")}


def test_serve_configures_what_its_options_say(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "serve.yaml").touch()
    loaded: list[tuple[Path, dict[str, Any]]] = []

    def load(file: Path, overrides: dict[str, Any]) -> None:
        loaded.append((file, overrides))
        raise config.ConfigError("enough")

    logged: list[tuple[str, str]] = []
    monkeypatch.setattr(config, "load_config", load)
    monkeypatch.setattr(logs, "set_up", lambda *how: logged.append(how))
    options = {
        "--config": str(tmp_path / "serve.yaml"),
        "--model-path": "a model",
        "--worker-url": "http://one",
        "--worker-dns": "http://two",
        "--host": "::1",
        "--grpc-port": "1",
        "--http-port": "2",
        "--tls": "both.pem",
        "--tenants-file": "tenants",
        "--audit-url": "sqlite://",
        "--redis-url": "redis://",
        "--insecure-no-auth": None,
        "--metrics-port": "3",
        "--otlp-endpoint": "http://collector",
        "--log-level": "debug",
        "--log-format": "json",
    }
    assert options.keys() == names("serve")
    words = [word for option in options.items() for word in option if word is not None]
    result = CliRunner().invoke(build_app(), ["serve", *words, "--", "--page-size", "16"])
    assert result.exit_code == 1 and result.stderr == "error: enough\n"
    assert logged == [("debug", "json")]
    assert loaded == [
        (
            tmp_path / "serve.yaml",
            {
                "listen": {"host": "::1", "port": 1},
                "worker": {
                    "model_path": "a model",
                    "urls": ["http://one"],
                    "dns": ["http://two"],
                    "args": ["--page-size", "16"],
                },
                "http": {"port": 2},
                "tls": {"certificate": Path("both.pem")},
                "telemetry": {"metrics_port": 3, "otlp_endpoint": "http://collector"},
                "audit": {"url": "sqlite://"},
                "limits": {"redis_url": "redis://"},
                "tenants_file": Path("tenants"),
                "insecure_no_auth": True,
            },
        )
    ]


def test_a_tenant_is_what_its_options_say(tmp_path: Path) -> None:
    file = tmp_path / "tenants.yaml"
    options = [
        *("--role", "inspect", "--role", "audit"),
        *("--seed-policy", "locked"),
        *("--max-budget", "64"),
        *("--max-new-tokens", "65"),
        *("--max-prompt-tokens", "66"),
        *("--requests-per-second", "0.5"),
        *("--tokens-per-minute", "67"),
        *("--max-concurrent-requests", "3"),
        *("--policy", "knorm", "--policy", "random"),
        *("--retention", "hash"),
        *("--certificate-subject", "CN=bob,O=Example"),
        *("--file", str(file)),
    ]
    assert names("tenants", "add") - {*options} == {"--another-key", "--take-over-records"}
    result = CliRunner().invoke(build_app(), ["tenants", "add", "bob", *options])
    assert result.exit_code == 0, result.output
    (tenant,) = tenants.load(file).tenants
    assert tenant == tenants.Tenant(
        name="bob",
        roles=frozenset({tenants.Role.INSPECT, tenants.Role.AUDIT}),
        seed_policy=tenants.SeedPolicy.LOCKED,
        limits=tenants.Limits(
            max_budget=64,
            max_new_tokens=65,
            max_prompt_tokens=66,
            policies=("knorm", "random"),
            requests_per_second=0.5,
            tokens_per_minute=67,
            max_concurrent_requests=3,
        ),
        retention=tenants.Retention.HASH,
        master_secrets=tenant.master_secrets,
        keys=tenant.keys,
        certificate_subjects=("CN=bob,O=Example",),
    )
    assert len(tenant.master_secrets) == len(tenant.keys) == 1


async def test_a_generation_is_what_its_options_say(tmp_path: Path) -> None:
    async with run_gateway(tmp_path, allow_inspect=True) as running:
        key = running.add_tenant("bob", roles=["generate", "inspect"])
        options = [
            *("--max-new-tokens", "5"),
            *("--budget", "32", "--window", "8"),
            *("--policy", "knorm", "--prompt-mode", "keep"),
            *("--seed", "11", "--sample-index", "2"),
            "--inspect",
            *("--temperature", "0.5", "--top-p", "0.75", "--top-k", "9", "--min-p", "0.25"),
            *("--stop", "one", "--stop", "two"),
            "--ignore-eos",
            *("--timeout", "20"),
            "--json",
            *("--target", running.target, "--api-key", key),
        ]
        encrypted = {"--tls", "--ca-file", "--client-cert", "--client-key"}
        assert names("generate") - {*options} == {"-n", "--chat", *encrypted}
        await run(running, "generate", "tell me", *options)
        bob = tenants.load(running.tenants_file).tenants[-1]
        seeds = seeds_for(bob, request_id="", request_seed=11, sample_index=2)
        sampling = running.worker.bodies[0]["sampling_params"]
        assert sampling == sampling | {
            "max_new_tokens": 5,
            "temperature": 0.5,
            "top_p": 0.75,
            "top_k": 9,
            "min_p": 0.25,
            "stop": ["one", "two"],
            "ignore_eos": True,
            "sampling_seed": seeds.sampling,
            "custom_params": {
                "vase": {
                    "policy": "knorm",
                    "budget": 32,
                    "window": 8,
                    "num_sinks": 0,
                    "prompt": "keep",
                    "seed": seeds.eviction,
                    "inspect": True,
                }
            },
        }
        running.worker.token_seconds = 1
        short = ("-n", "2", "--timeout", "0.2")
        _, errors = await run(running, "generate", "tell me", *short, status=1)
        # Who sees it first tells it: this process, or the gateway.
        assert re.search(r"Deadline Exceeded|the call's timeout passed", errors)


def test_a_point_in_time_is_what_it_says() -> None:
    for text, length in (
        ("90d", datetime.timedelta(days=90)),
        ("12h", datetime.timedelta(hours=12)),
        ("30m", datetime.timedelta(minutes=30)),
    ):
        assert times.age(text, "--older-than") == length
    for text, hour in (("2026-11-01T08:30", 8), ("2026-11-01T08:30+01:00", 7)):
        expected = datetime.datetime(2026, 11, 1, hour, 30, tzinfo=datetime.UTC)
        assert times.moment(text, "--before") == expected


def test_prune_removes_what_is_older_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "audit.sqlite3"
    url = f"sqlite+aiosqlite:///{file}"
    now = time.time_ns() // 1000

    async def fill() -> None:
        file.write_bytes(await empty_store())
        store = await AuditStore.open(url)
        for number, minutes in ((1, 120), (2, 30)):
            await store.append(numbered(number, created_unix_micros=now - minutes * 60_000_000))
        await store.close()

    asyncio.run(fill())
    prune = ["audit", "prune", "--url", url, "--older-than", "1h"]
    result = CliRunner().invoke(build_app(), prune)
    assert result.stdout.startswith("alice: 1 records removed, up to sequence 1; "), result.output
    left = CliRunner().invoke(build_app(), ["audit", "export", "--url", url]).stdout
    assert f"{2:032x}" in left and f"{1:032x}" not in left
    assert [problem for _, _, problem in FileCheck().chains(left.splitlines(True))] == [None]
