"""The command line as a user runs it: exit statuses, output, errors."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import os
import re
import signal
import sys
import time
import tomllib
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.gateway.audit_records import numbered, tamper
from tests.gateway.running import Running, run_gateway
from tests.gateway.scripted_worker import Faults
from tests.gateway.test_transport import certificate
from vase_sgl.cli import build_app, times
from vase_sgl.client import Tls
from vase_sgl.eviction import POLICIES
from vase_sgl.gateway import tenants
from vase_sgl.gateway.audit import AuditStore
from vase_sgl.gateway.audit.export import FileCheck


async def run(running: Running, *arguments: str, status: int = 0) -> tuple[str, str]:
    """Output and errors of `vase-sgl` with these arguments, in this process but another thread."""
    result = await asyncio.to_thread(
        CliRunner().invoke, build_app(), arguments, env=environment(running)
    )
    assert result.exit_code == status, result.stderr
    return result.stdout, result.stderr


def environment(running: Running) -> dict[str, str]:
    return {"VASE_TARGET": running.target, "VASE_API_KEY": running.key, "COLUMNS": "200"}


async def test_generate_streams_then_replay_compares(running: Running) -> None:
    budget = ("--budget", "32", "--window", "8", "-n", "60")
    output, errors = await run(running, "generate", "tell me", *budget)
    (record,) = [r async for r in running.client.list_records()]
    assert output == (await running.client.get_record(record.record_id)).text + "\n"
    assert "60 tokens in" in errors and "40 slots reserved, full KV: 63" in errors
    assert f"vase-sgl replay {record.record_id}" in errors
    assert running.worker.bodies[0]["sampling_params"]["custom_params"]["vase"]["budget"] == 32

    output, _ = await run(running, "replay", record.record_id)
    assert output == "MATCH: 60 tokens and 3 eviction rounds are equal\n"
    running.worker.faults.other_token_at = 7
    output, _ = await run(running, "replay", record.record_id, status=3)
    # The token may come in one chunk with rounds after it, which the script keeps equal.
    assert re.match(
        r"DIVERGED after 7 tokens and [0-3] eviction rounds\n  token 7: expected", output
    )
    running.worker.faults.retractions = 1
    output, _ = await run(running, "replay", record.record_id, status=4)
    assert output.startswith("INCOMPARABLE: one of the two was retracted; 7 tokens and ")
    assert "num_retractions: recorded nothing, now 1" in output
    running.worker.faults = Faults(length_ceiling=20)
    output, _ = await run(running, "replay", record.record_id, status=4)
    assert output == (
        "INCOMPARABLE: a ceiling of the worker ended the replay early; 20 tokens and 0 eviction "
        "rounds are equal\n  finish_reason: recorded length after 60 tokens, now length after 20 "
        "tokens\n"
    )
    running.worker.faults = Faults(end_after_tokens=60)
    output, _ = await run(running, "replay", record.record_id, status=3)
    assert output == (
        "DIVERGED after 60 tokens and 3 eviction rounds\n"
        "  finish_reason: recorded length after 60 tokens, now stop after 60 tokens\n"
    )
    running.worker.fingerprint["device"] = "another"
    output, _ = await run(running, "replay", record.record_id, status=4)
    assert "device: recorded none, now another" in output
    output, _ = await run(running, "replay", "--json", record.record_id, status=4)
    assert json.loads(output)["outcome"] == "INCOMPARABLE"


async def test_a_replay_says_that_the_recorded_worker_was_not_deterministic(
    running: Running,
) -> None:
    running.worker.fingerprint["deterministic"] = "false"
    await running.worker.noticed()
    answer = await running.client.generate_once("tell me", max_new_tokens=2)
    output, _ = await run(running, "replay", answer.request_id, status=4)
    assert output == (
        "INCOMPARABLE: the worker that made this record was not deterministic\n"
        "  deterministic: recorded false, now false\n"
    )


async def test_generate_as_json(running: Running) -> None:
    output, _ = await run(running, "generate", "tell me", "-n", "5", "--json", "--plain")
    answer = json.loads(output)
    assert len(answer["token_ids"]) == 5 and answer["result"]["finish_reason"] == "length"
    listed, _ = await run(running, "records", "list", "--json")
    assert [r["record_id"] for r in json.loads(listed)] == [answer["request_id"]]
    shown, _ = await run(running, "records", "show", answer["request_id"])
    assert json.loads(shown)["text"] == answer["text"]
    table, _ = await run(running, "records", "list")
    assert answer["request_id"] in table and "completed" in table


@pytest.fixture
def far_east(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "EAST-9")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("far_east")
async def test_options_take_the_times_that_are_shown(running: Running) -> None:
    answer = await running.client.generate_once("tell me", max_new_tokens=2)
    created = (await running.client.get_record(answer.request_id)).created
    table, _ = await run(running, "records", "list")
    (shown,) = re.findall(r"\d{4}-\d\d-\d\d\S+", table)
    assert times.moment(shown, "--before") == created.replace(microsecond=0)
    prune = ("audit", "prune", "--url", running.audit_url, "--before", shown)
    kept, _ = await run(running, *prune)
    assert kept == f"alice: 0 records removed; sequence 1, of {shown}, stays\n"


async def test_a_client_certificate_is_shown_by_every_command(tmp_path: Path) -> None:
    cert, key = map(str, certificate(tmp_path))
    known = Tls(*(Path(file).read_bytes() for file in (cert, cert, key)))
    config = {"certificate": cert, "key": key, "client_ca": cert}
    shown = ("--ca-file", cert, "--client-cert", cert, "--client-key", key)
    async with run_gateway(tmp_path, client_tls=known, tls=config) as running:
        output, _ = await run(running, "generate", "tell me", "-n", "5", "--json", *shown)
        record = json.loads(output)["request_id"]
        await run(running, "records", "list", *shown)
        await run(running, "records", "show", record, *shown)
        await run(running, "replay", record, *shown)
        await run(running, "replay", "--since", "2000-01-01", *shown)

        names = ("VASE_CA_FILE", "VASE_CLIENT_CERT", "VASE_CLIENT_KEY")
        env = {**environment(running), **dict(zip(names, (cert, cert, key), strict=True))}
        listed = await asyncio.to_thread(
            CliRunner().invoke, build_app(), ["records", "list", "--json"], env=env
        )
        assert listed.exit_code == 0 and record in listed.stdout
        _, errors = await run(running, "records", "list", "--ca-file", cert, status=1)
        assert "cannot connect to the gateway" in errors
    _, errors = await run(running, "records", "list", "--client-cert", cert, status=2)
    assert "a certificate needs its key" in errors


async def test_ids_in_the_lists_are_whole(running: Running) -> None:
    answer = await running.client.generate_once("tell me", max_new_tokens=40, budget=32, window=8)
    narrow = {**environment(running), "COLUMNS": "20"}
    listed = await asyncio.to_thread(
        CliRunner().invoke, build_app(), ["records", "list"], env=narrow
    )
    assert answer.result.cache is not None
    (line,) = [line for line in listed.stdout.splitlines() if answer.request_id in line]
    assert "vase-attnv" in line and answer.result.cache.digest in line
    keys = [running.add_tenant(name := "a-tenant-with-a-name-of-its-own")[4:16]]
    command = ("tenants", "add", name, "--another-key", "--file", str(running.tenants_file))
    keys += [(await run(running, *command))[0][4:16] for _ in range(3)]
    listed = CliRunner().invoke(
        build_app(), ["tenants", "list", "--file", str(running.tenants_file)], env=narrow
    )
    (line,) = [line for line in listed.stdout.splitlines() if name in line]
    assert ", ".join(keys) in line


async def test_generate_names_policies_and_prompt_modes(running: Running) -> None:
    text, _ = await run(running, "generate", "--help")
    for name in POLICIES:
        assert f" {name}: " in text
    keep = ("--budget", "32", "--window", "8", "--policy", "knorm", "--prompt-mode", "keep")
    await run(running, "generate", "tell me", "-n", "5", *keep)
    vase = running.worker.bodies[0]["sampling_params"]["custom_params"]["vase"]
    assert (vase["policy"], vase["prompt"]) == ("knorm", "keep")
    _, errors = await run(running, "generate", "x", "--prompt-mode", "drop", status=2)
    assert "'drop' is not one of 'evict', 'keep'" in errors


async def test_errors_are_one_line_and_status_1(running: Running) -> None:
    _, errors = await run(
        running, "generate", "tell me", "--budget", "8", "--window", "8", status=1
    )
    assert errors.startswith("error: eviction: budget 8 must be greater than window 8")
    _, errors = await run(running, "generate", "tell me", "--api-key", "vsk_no", status=1)
    assert errors.startswith("error: this is not an API key")
    _, errors = await run(running, "replay", "nothing", status=1)
    assert errors.startswith("error: there is no record 'nothing'")
    _, errors = await run(running, "generate", "x", "--target", "127.0.0.1:9", status=1)
    assert errors.startswith("error: cannot connect to the gateway; check host and port")
    _, errors = await run(running, "generate", "x", "--seed", str(2**64), status=1)
    assert errors == f"error: seed: Value out of range: {2**64}\n"
    _, errors = await run(running, "generate", "x", "--ca-file", "/tmp", status=2)
    assert "'/tmp' is a directory" in errors
    _, errors = await run(running, "generate", "x", "--budgett", "9", status=2)
    assert "No such option: --budgett" in errors


async def test_an_error_midway_names_the_generation(running: Running) -> None:
    """And advises no other try where that would be another generation."""
    running.worker.faults.cut_after_tokens = 3
    for options in ((), ("--json",)):
        _, errors = await run(running, "generate", "tell me", *options, status=1)
        (record, *_) = [r async for r in running.client.list_records()]
        assert errors == (
            f"error: worker {running.worker.url} was lost while it answered; another try is "
            f"another generation, charged like this (request id {record.record_id})\n"
        )
    running.worker.faults.cut_after_tokens = 0
    _, errors = await run(running, "generate", "tell me", status=1)
    assert "; try again later (request id " in errors


async def test_ctrl_c_aborts(running: Running) -> None:
    running.worker.token_seconds = 0.02
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "vase_sgl.cli", "generate", "tell me", "-n", "4000"),
        env={**os.environ, **environment(running)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    assert await asyncio.wait_for(process.stdout.read(1), 20) == b"w"
    process.send_signal(signal.SIGINT)
    _, errors = await asyncio.wait_for(process.communicate(), 10)
    assert process.returncode == 130 and errors.decode().strip() == "cancelled"
    await running.worker.wait_for_abort()


async def test_an_answer_goes_on_where_the_terminal_lacks_its_characters(running: Running) -> None:
    running.worker.opening = "né… \U0001f600 "

    async def generate(encoding: str, *options: str) -> str:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "vase_sgl.cli", "generate", "tell me", "-n", "5", *options),
            env={**os.environ, **environment(running), "PYTHONIOENCODING": encoding},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        output, errors = await asyncio.wait_for(process.communicate(), 20)
        assert process.returncode == 0, errors
        return output.decode(encoding)

    assert (await generate("ascii")).startswith(r"n\xe9\u2026 \U0001f600 w")
    for encoding in ("latin-1", "utf-8"):
        answer = json.loads(await generate(encoding, "--json"))
        assert answer["text"].startswith(running.worker.opening)


async def test_tenants_add_list_remove(running: Running) -> None:
    file = ("--file", str(running.tenants_file))
    add = ("tenants", "add", "bob", *file)
    key, errors = await run(running, *add, "--role", "audit", "--max-budget", "64")
    assert key.startswith("vsk_") and "not shown again" in errors
    listed, _ = await run(running, "records", "list", "--json", "--api-key", key.strip())
    assert json.loads(listed) == []
    _, errors = await run(running, *add, status=1)
    assert "tenant bob exists; give it one more key with --another-key" in errors
    second, _ = await run(running, *add, "--another-key")
    table, _ = await run(running, "tenants", "list", *file)
    assert key[4:16] in table and second[4:16] in table and "audit" in table

    remove = ("tenants", "remove", "bob", *file)
    _, errors = await run(running, *remove, "--key", "0" * 12, status=1)
    assert "tenant bob has no key 000000000000" in errors
    await run(running, *remove, "--key", key[4:16])
    _, errors = await run(running, "records", "list", "--api-key", key.strip(), status=1)
    assert "unknown or revoked API key" in errors
    await run(running, "records", "list", "--api-key", second.strip())
    await run(running, *remove)
    _, errors = await run(running, *remove, status=1)
    assert "there is no tenant bob" in errors


async def test_the_name_of_a_removed_tenant_is_not_free(running: Running) -> None:
    """Records belong to a name."""
    answer = await running.client.generate_once("tell me", max_new_tokens=2)
    file = ("--file", str(running.tenants_file))
    add, take_over = ("tenants", "add", "alice", *file), "--take-over-records"
    _, errors = await run(running, "tenants", "add", "bob", *file, take_over, status=1)
    assert "no tenant bob was removed; leave --take-over-records out" in errors
    await run(running, "tenants", "remove", "alice", *file)
    _, errors = await run(running, *add, status=1)
    assert "a tenant alice was removed, and a new one would get its records" in errors
    bob, _ = await run(running, "tenants", "add", "bob", *file)  # and the list stays
    await run(running, "records", "list", "--api-key", bob.strip())  # the gateway takes the file
    await run(running, *add, status=1)
    key, _ = await run(running, *add, take_over)
    listed, _ = await run(running, "records", "list", "--json", "--api-key", key.strip())
    assert len(json.loads(listed)) == 1 and answer.request_id in listed
    assert tenants.load(running.tenants_file).removed == ()


async def test_another_key_changes_nothing_else(running: Running) -> None:
    add = ("tenants", "add", "alice", "--file", str(running.tenants_file), "--another-key")
    before = running.tenants_file.read_bytes()
    for option in (
        ("--retention", "hash"),
        ("--retention", "full"),  # its default, but it was asked for
        ("--max-concurrent-requests", "1"),
        ("--role", "audit"),
        ("--seed-policy", "fixed"),
        ("--certificate-subject", "CN=alice"),
        ("--take-over-records",),
    ):
        _, errors = await run(running, *add, *option, status=2)
        assert f"leave out {option[0]}, and edit" in " ".join(errors.replace("│", " ").split())
    _, errors = await run(running, *add, "--role", "audit", "--max-budget", "64", status=2)
    assert "leave out --role, --max-budget, and" in errors
    assert running.tenants_file.read_bytes() == before
    key, _ = await run(running, *add)
    assert key.startswith("vsk_")


async def test_a_tenants_master_secret_rotates(running: Running) -> None:
    alice = ("alice", "--file", str(running.tenants_file))
    answer = await running.client.generate_once("tell me", max_new_tokens=3)
    _, errors = await run(running, "tenants", "forget-secret", *alice, "--version", "1", status=1)
    assert "version 1 is the one in use; `vase-sgl tenants rotate alice` first" in errors
    output, _ = await run(running, "tenants", "rotate", *alice)
    assert output == "new seeds of alice come from master secret version 2\n"
    newer = await running.client.generate_once("tell me", max_new_tokens=3)
    assert newer.result.seeds.master_version == 2
    output, _ = await run(running, "replay", answer.request_id)
    assert output == "MATCH: 3 tokens and 0 eviction rounds are equal\n"

    await run(running, "tenants", "forget-secret", *alice, "--version", "1")
    output, _ = await run(running, "replay", answer.request_id)
    assert output.startswith("MATCH") and "version of the tenant's master secret was" in output
    _, errors = await run(running, "tenants", "forget-secret", *alice, "--version", "1", status=1)
    assert "has no master secret version 1; there are: 2" in errors
    _, errors = await run(running, "tenants", "rotate", "bob", *alice[1:], status=1)
    assert "there is no tenant bob" in errors


async def test_a_wrong_tenant_is_not_added(running: Running, tmp_path: Path) -> None:
    file = ("--file", str(tmp_path / "new.yaml"))
    _, errors = await run(running, "tenants", "add", "Bob", *file, status=1)
    assert errors.startswith("error: name: ")
    _, errors = await run(running, "tenants", "add", "bob", "--role", "king", *file, status=1)
    assert errors.startswith("error: roles.0: ")
    assert not (tmp_path / "new.yaml").exists()


async def test_audit_verify_export_prune(running: Running, tmp_path: Path) -> None:
    for _ in range(3):
        await running.client.generate_once("tell me", max_new_tokens=2)
    url = ("--url", running.audit_url)
    output, _ = await run(running, "audit", "verify", *url)
    assert output.startswith("alice: 3 records, chain is whole; head 3:")
    head = output.split()[-1]
    file = str(tmp_path / "export.jsonl")
    _, errors = await run(running, "audit", "export", *url, "-o", file)
    assert errors == "3 records\n"
    assert Path(file).stat().st_mode & 0o777 == 0o600
    for path, reason in (
        (file, "File exists"),  # never overwritten
        (str(tmp_path / "none" / "export.jsonl"), "No such file or directory"),
    ):
        _, errors = await run(running, "audit", "export", *url, "-o", path, status=1)
        assert errors == f"error: cannot write {path}: {reason}\n"
    assert (await run(running, "audit", "verify", "--file", file))[0] == output
    named = ("--tenant", "alice", "--head")
    assert (await run(running, "audit", "verify", "--file", file, *named, head))[0] == output
    other, _ = await run(
        running, "audit", "verify", "--file", file, *named, f"3:{'f' * 64}", status=1
    )
    assert other.startswith("alice: fork at record ")
    piped, _ = await run(running, "audit", "export", *url, "--tenant", "alice")
    assert piped == Path(file).read_text()

    early, _ = await run(running, "audit", "prune", *url, "--before", "2020-01-01", "--by", "me")
    assert re.fullmatch(
        r"alice: 0 records removed; sequence 1, of 20\d\d-\d\d-\d\dT[\d:]{8}Z, stays\n", early
    )
    dry, _ = await run(running, "audit", "prune", *url, "--older-than", "0m", "--dry-run")
    assert dry == "alice: 3 records would be removed, up to sequence 3\n"
    pruned, _ = await run(running, "audit", "prune", *url, "--before", "2100-01-01", "--by", "me")
    assert pruned == "alice: 3 records removed, up to sequence 3\n"
    await running.client.generate_once("tell me", max_new_tokens=2)
    output, _ = await run(running, "audit", "verify", *url, "--tenant", "alice", "--head", head)
    assert output.startswith("alice: 1 records, chain is whole; 3 before them were pruned; head 4:")
    assert (await run(running, "audit", "migrate", *url))[0].endswith("schema revision 0002\n")

    await tamper(running.audit_url, "UPDATE records SET payload = NULL")
    output, _ = await run(running, "audit", "verify", *url, status=1)
    assert output.startswith("alice: altered at record ") and "its payload is gone" in output


async def test_an_export_is_utf8_whatever_the_terminal_has(tmp_path: Path) -> None:
    url = f"sqlite+aiosqlite:///{tmp_path / 'audit.sqlite3'}"
    store = await AuditStore.open(url)
    await store.append(numbered(1, failure="né…"))
    await store.close()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "vase_sgl.cli", "audit", "export", "--url", url),
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == 0 and "né…" in output.decode()
    (file := tmp_path / "export.jsonl").write_bytes(output)
    with file.open(encoding="utf-8") as lines:
        assert [problem for _, _, problem in FileCheck().chains(lines)] == [None]


async def test_audit_commands_say_what_is_wrong(running: Running) -> None:
    await running.client.generate_once("tell me", max_new_tokens=2)
    nowhere = ("--url", "sqlite+aiosqlite:///nowhere.sqlite3")
    for arguments, status, text in (
        (("verify", *nowhere), 1, "no audit store nowhere.sqlite3; name the gateway's audit.url"),
        (("verify", "--tenant", "eve"), 1, "no chain of a tenant 'eve'; there are: alice"),
        (("verify", "--head", "3:aa"), 2, "needs --tenant"),
        (("verify", "--tenant", "alice", "--head", "3:aa"), 2, "as verify shows it"),
        (("prune",), 2, "give --before or --older-than"),
        (("prune", "--before", "soon"), 2, "'soon' is not a date"),
        (("prune", "--older-than", "9 years"), 2, "90d, 12h or 30m"),
    ):
        url = () if "--url" in arguments else ("--url", running.audit_url)
        _, errors = await run(running, "audit", *arguments, *url, status=status)
        assert text in " ".join(errors.replace("│", " ").split())
    assert not Path("nowhere.sqlite3").exists()


async def test_audit_verify_refuses_files_that_are_no_export(
    running: Running, tmp_path: Path
) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "binary").write_bytes(b"\xff\xfe{}")
    for name, text in (
        ("empty", "error: the file holds no chain"),
        ("binary", f"error: {tmp_path / 'binary'} is not a file of `vase-sgl audit export`: "),
        (".", "error: [Errno 21] Is a directory: "),
    ):
        file = str(tmp_path / name)
        output, errors = await run(running, "audit", "verify", "--file", file, status=1)
        assert output == "" and errors.startswith(text)


async def test_the_version(running: Running) -> None:
    output, _ = await run(running, "--version")
    assert output == f"vase-sgl {importlib.metadata.version('vase-sgl')}\n"


async def test_doctor(running: Running) -> None:
    output, _ = await run(running, "doctor", "--require", "client", "--require", "gateway")
    assert "ok      client: grpcio" in output and "ok      gateway:" in output
    parts = json.loads((await run(running, "doctor", "--json"))[0])
    assert [part["name"] for part in parts] == ["client", "gateway", "worker", "accelerator"]
    await run(running, "doctor", "--require", "nothing", status=2)


def test_doctor_asks_for_all_that_an_extra_brings() -> None:
    from vase_sgl.cli import doctor

    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    for name, parts in (("client", ["client"]), ("gateway", ["client", "gateway"])):
        lines = [line for part in parts for line in extras[part] if line[:8] != "vase-sgl"]
        wanted = {re.match(r"[\w-]+", line)[0] for line in lines}  # type: ignore[index]
        found = {one.partition(" ")[0] for one in getattr(doctor, f"_{name}")().found}
        assert found == wanted


def test_doctor_names_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    from vase_sgl.cli import doctor

    monkeypatch.setattr(doctor, "_version", {"grpcio": "1.85.1"}.get)
    part = doctor._client()
    assert not part.runs and part.cure == "in a checkout: pip install '.[client]'"
    assert part.found[:2] == ("grpcio 1.85.1", "protobuf (not installed)")
    monkeypatch.setattr(doctor, "PACKAGE", "no-such-distribution")
    assert doctor._client().found == ("no-such-distribution (not installed)",)


INSTALLED = {"torch": "2.13.0", "sglang": "0.5.23"}
KERNELS = {"sglang-kernel": "0.4.10", "flashinfer-python": "0.7.2"}


@pytest.mark.parametrize(
    ("installed", "cuda", "reason"),
    [
        (INSTALLED | KERNELS, "13.0", None),
        (INSTALLED | KERNELS, None, "torch 2.13.0 is not built for CUDA"),
        (INSTALLED, "13.0", "sglang-kernel and flashinfer-python not installed"),
        ({}, None, None),  # a client, or a gateway
    ],
    ids=["used", "torch for CPUs", "no kernels", "no worker"],
)
def test_doctor_says_that_a_gpu_is_not_used(
    installed: dict[str, str],
    cuda: str | None,
    reason: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vase_sgl.cli import doctor

    gpu = "NVIDIA H100 80GB HBM3, 81559 MiB"
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho '{gpu}'\n")
    tool.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "version.py").write_text(f"cuda = {cuda!r}\n")
    torch = ModuleSpec("torch", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(doctor, "find_spec", {"torch": torch}.get)
    monkeypatch.setattr(doctor, "_version", installed.get)

    result = CliRunner().invoke(build_app(), ["doctor", "--require", "accelerator"])
    if reason is None:
        assert result.exit_code == 0 and f"ok      accelerator: {gpu}\n" in result.stdout
        return
    assert result.exit_code == 1 and "pip install '.[gpu]'" in result.stderr
    assert f"missing accelerator: {gpu}, {reason}\n          -> workers run on" in result.stdout


def test_doctor_says_what_is_wrong_with_a_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'Failed to initialize NVML'; exit 18\n")
    tool.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path))
    result = CliRunner().invoke(build_app(), ["doctor", "--require", "accelerator"])
    assert result.exit_code == 1
    assert "accelerator: none found by nvidia-smi: Failed to initialize NVML\n" in result.stdout
    assert "look after its driver" in result.stderr


def test_a_missing_package_names_its_extra() -> None:
    from vase_sgl.cli.failures import missing_package

    text = missing_package(ModuleNotFoundError("", name="aiohttp.web"))
    assert text is not None and "pip install '.[gateway]'" in text
    assert missing_package(ModuleNotFoundError("", name="vase_sgl.oops")) is None
