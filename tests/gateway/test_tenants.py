"""The tenants file: private, atomic, and specific about what is wrong in it."""

from __future__ import annotations

import asyncio
import errno
import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tests.gateway.running import add_tenant
from vase_sgl.cli import build_app
from vase_sgl.eviction.policies import POLICIES
from vase_sgl.gateway import keys, tenants
from vase_sgl.gateway.tenants import TenantFileError


def test_the_file_is_private_and_holds_no_key(tmp_path: Path) -> None:
    file = tmp_path / "sub" / "tenants.yaml"
    key = add_tenant(file, "alice")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert key.rpartition("_")[2] not in file.read_text()
    assert "$argon2id$" in file.read_text()
    assert list(file.parent.iterdir()) == [file]  # no temporary file is left


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tenants.yaml"
    add_tenant(file, "alice")
    before = file.read_bytes()

    def broken(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", broken)
    with pytest.raises(TenantFileError, match=r"cannot write tenants file .*No space left"):
        add_tenant(file, "bob")
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


def test_a_file_that_is_replaced_keeps_its_owner_and_mode(tmp_path: Path) -> None:
    file = tmp_path / "tenants.yaml"
    add_tenant(file, "alice")
    file.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(file, 4321, 1234)
    before = file.stat()
    add_tenant(file, "bob")
    after = file.stat()
    assert after.st_ino != before.st_ino and len(tenants.load(file).tenants) == 2
    assert (after.st_uid, after.st_gid) == (before.st_uid, before.st_gid)
    assert stat.S_IMODE(after.st_mode) == 0o640


def test_a_link_leads_to_the_file_that_is_edited(tmp_path: Path) -> None:
    file, link = tmp_path / "real" / "tenants.yaml", tmp_path / "tenants.yaml"
    link.symlink_to(file)
    add_tenant(link, "alice")  # there was no file yet
    with tenants.locked(link):
        tenants.save(link, tenants.TenantFile())
    assert link.is_symlink() and tenants.load(file).tenants == ()
    assert sorted(path.name for path in file.parent.iterdir()) == [
        "tenants.yaml",
        "tenants.yaml.lock",
    ]
    assert list(tmp_path.glob("*.lock")) == []


@pytest.mark.parametrize("number", [errno.EPERM, errno.EINVAL])  # EINVAL: an owner not mapped here
def test_who_may_not_keep_the_owner_writes_a_private_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The old mode would let another group read it."""
    file = tmp_path / "tenants.yaml"
    add_tenant(file, "alice")
    file.chmod(0o640)

    def forbidden(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("os.fchown", forbidden)
    add_tenant(file, "bob")
    assert len(tenants.load(file).tenants) == 2
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_saving_and_loading_are_inverse(tmp_path: Path) -> None:
    file = tmp_path / "tenants.yaml"
    add_tenant(file, "alice", roles=["audit"], seed_policy="locked", limits={"max_budget": 64})
    content = tenants.load(file)
    tenants.save(file, content)
    assert tenants.load(file) == content


def test_only_what_was_set_is_written(tmp_path: Path) -> None:
    """A default that is written is so for ever; a field more makes older versions refuse a file."""
    file = tmp_path / "tenants.yaml"
    tenants.save(file, tenants.TenantFile())
    assert yaml.safe_load(file.read_text()) == {"version": 1, "tenants": []}

    def command(*words: str) -> None:
        result = CliRunner().invoke(build_app(), ["tenants", *words, "--file", str(file)])
        assert result.exit_code == 0, result.output

    def alice() -> dict[str, Any]:
        (found,) = yaml.safe_load(file.read_text())["tenants"]
        assert isinstance(found, dict)
        return found

    plain = {"name", "master_secrets", "keys"}
    command("add", "alice")
    assert alice().keys() == plain
    command("add", "alice", "--another-key")
    command("rotate", "alice")
    command("forget-secret", "alice", "--version", "1")
    command("remove", "alice", "--key", alice()["keys"][0]["id"])
    assert alice().keys() == plain and yaml.safe_load(file.read_text()).keys() == {
        "version",
        "tenants",
    }
    # What somebody wrote stays, if it is the default too.
    content = yaml.safe_load(file.read_text())
    content["tenants"][0]["limits"] = {"max_budget": 16384, "policies": list(POLICIES)}
    file.write_text(yaml.safe_dump(content))
    command("rotate", "alice")
    assert alice()["limits"] == {"max_budget": 16384, "policies": list(POLICIES)}
    command("remove", "alice")
    assert yaml.safe_load(file.read_text()) == {
        "version": 1,
        "tenants": [],
        "removed": ["alice"],
    }


def test_secrets_are_not_in_representations(tmp_path: Path) -> None:
    file = tmp_path / "tenants.yaml"
    add_tenant(file, "alice")
    (tenant,) = tenants.load(file).tenants
    assert tenant.master.secret not in repr(tenant) and "argon2" not in repr(tenant)


def test_keys_verify_by_their_hash_only() -> None:
    made = keys.new_key()
    assert keys.key_id_of(made.key) == made.key_id
    assert keys.verify(made.key, made.hash)
    assert not keys.verify(keys.new_key().key, made.hash)
    assert not keys.verify(made.key, None)
    assert not keys.verify(made.key, "not a hash")
    assert keys.key_id_of(made.key + "0") is None


def change(tmp_path: Path, **fields: object) -> str:
    """The error of a file whose only tenant has these fields."""
    file = tmp_path / "tenants.yaml"
    file.unlink(missing_ok=True)
    add_tenant(file, "alice")
    content = yaml.safe_load(file.read_text())
    content["tenants"][0].update(fields)
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(TenantFileError) as error:
        tenants.load(file)
    return str(error.value)


def test_what_is_wrong_in_the_file_is_named(tmp_path: Path) -> None:
    assert "tenants.0.role: unknown key" in change(tmp_path, role="audit")
    assert "tenants.0.roles" in change(tmp_path, roles=["king"])
    assert "unknown policy lru; choose from vase-attnv" in change(
        tmp_path, limits={"policies": ["lru"]}
    )
    assert "a master secret has 32 bytes" in change(
        tmp_path, master_secrets=[{"version": 1, "secret": "c2hvcnQ="}]
    )
    good: dict[str, Any] = {"version": 1, "secret": "A" * 43 + "="}
    twice = change(tmp_path, master_secrets=[good, good])
    assert "every master secret needs a version of its own" in twice
    assert good["secret"] not in twice
    assert "tenants.0.name: must be lower-case" in change(tmp_path, name="Not Good")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"version: 1 # caf\xe9\n", "is not text in UTF-8, from byte 16 on; save it as UTF-8"),
        (b"tenants: [", "is not YAML: "),
        (b"created: 2026-13-01", "holds a value that cannot be: month must be in 1..12"),
    ],
)
def test_a_file_that_is_no_yaml_is_named(tmp_path: Path, content: bytes, text: str) -> None:
    file = tmp_path / "tenants.yaml"
    file.write_bytes(content)
    with pytest.raises(TenantFileError) as error:
        tenants.load(file)
    assert f"{file} {text}" in str(error.value)


@pytest.mark.parametrize("content", ["", "# tenants\n", "version: 1\n"])
def test_a_file_that_was_cut_off_is_not_one_without_tenants(tmp_path: Path, content: str) -> None:
    file = tmp_path / "tenants.yaml"
    file.write_text(content)
    with pytest.raises(TenantFileError, match=r"no list of tenants, as if .* is `tenants: \[\]`"):
        tenants.load(file)
    tenants.save(file, tenants.TenantFile())
    assert tenants.load(file).tenants == ()


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(TenantFileError, match="vase-sgl tenants add NAME --file"):
        tenants.load(tmp_path / "none.yaml")


def test_what_tells_who_calls_cannot_be_there_twice(tmp_path: Path) -> None:
    file = tmp_path / "tenants.yaml"
    add_tenant(file, "alice", certificate_subjects=["CN=a"])
    with pytest.raises(ValueError, match="tenant name alice is there more than once"):
        add_tenant(file, "alice")
    (alice,) = tenants.load(file).tenants
    bob = alice.model_copy(update={"name": "bob"})
    with pytest.raises(ValueError, match=f"key id {alice.keys[0].id} is there more than once"):
        tenants.TenantFile(tenants=(alice, bob))
    bob = bob.model_copy(update={"keys": ()})
    with pytest.raises(ValueError, match="certificate subject CN=a is there more than once"):
        tenants.TenantFile(tenants=(alice, bob))


def test_names_of_removed_tenants_stay_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "tenants.yaml"
    add_tenant(file, "alice")
    content = tenants.load(file)
    tenants.save(file, content.model_copy(update={"removed": ("bob",)}))
    assert tenants.load(file).removed == ("bob",)
    for name, text in (
        ("alice", r"tenant name alice is under `removed` too: .*take it out there if that is"),
        ("Not Good", r"removed\.0: must be lower-case"),
    ):
        tenants.save(file, content.model_copy(update={"removed": (name,)}))
        with pytest.raises(TenantFileError, match=text):
            tenants.load(file)


async def test_editors_wait_for_each_other(tmp_path: Path) -> None:
    """Keys are shown once: none may be lost to another command that read the file before."""
    file = tmp_path / "new" / "tenants.yaml"
    names = [f"t{n}" for n in range(4)]
    processes = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "vase_sgl.cli", "tenants", "add", name, "--file", str(file)),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        for name in names
    ]
    assert [await process.wait() for process in processes] == [0] * 4
    assert sorted(tenant.name for tenant in tenants.load(file).tenants) == names
