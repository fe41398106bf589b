"""`vase-sgl tenants`: who may call. Edits the tenants file; a running gateway sees it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vase_sgl.cli.failures import reported

if TYPE_CHECKING:
    from vase_sgl.gateway.tenants import Tenant

File = Annotated[
    Path,
    typer.Option("--file", envvar="VASE_TENANTS_FILE", help="The gateway's tenants_file."),
]
DEFAULT_FILE = Path(".vase-sgl/tenants.yaml")


def register(app: typer.Typer) -> None:
    tenants = typer.Typer(help="Manage who may call the gateway.", no_args_is_help=True)
    tenants.command("add")(add)
    tenants.command("list")(list_tenants)
    tenants.command("remove")(remove)
    tenants.command("rotate")(rotate)
    tenants.command("forget-secret")(forget_secret)
    app.add_typer(tenants, name="tenants")


def add(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Lower-case letters, digits and dashes.")],
    role: Annotated[
        list[str] | None,
        typer.Option(
            help="generate, replay, audit, inspect, admin; repeatable.",
            show_default="generate, replay",
        ),
    ] = None,
    seed_policy: Annotated[
        str | None,
        typer.Option(
            help="client, derived, fixed or locked: where seeds come from.", show_default="client"
        ),
    ] = None,
    max_budget: Annotated[int | None, typer.Option(min=2)] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    max_prompt_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    requests_per_second: Annotated[
        float | None, typer.Option(min=0.001, show_default="any")
    ] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(min=1, help="Prompt and output.", show_default="any")
    ] = None,
    max_concurrent_requests: Annotated[
        int | None, typer.Option(min=1, help="Waiting or running.", show_default="any")
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(help="Eviction policy to allow; repeatable.", show_default="all"),
    ] = None,
    retention: Annotated[
        str | None,
        typer.Option(
            help="full, or hash: records hold digests and cannot be replayed.", show_default="full"
        ),
    ] = None,
    certificate_subject: Annotated[
        list[str] | None,
        typer.Option(help="Client certificate that stands for a key: CN=alice,O=...; repeatable."),
    ] = None,
    another_key: Annotated[
        bool,
        typer.Option(
            "--another-key", help="Give a tenant that exists one more key, and change nothing else."
        ),
    ] = False,
    take_over_records: Annotated[
        bool,
        typer.Option(
            "--take-over-records",
            help="Use the name of a removed tenant again: the new one reads and replays the "
            "records of the old one as its own.",
        ),
    ] = False,
    file: File = DEFAULT_FILE,
) -> None:
    """Make a tenant and print its API key, once."""
    from pydantic import ValidationError

    from vase_sgl.gateway import tenants
    from vase_sgl.gateway.problems import describe

    if another_key:
        _refuse_settings(context)
    with reported(tenants.TenantFileError), tenants.locked(file):
        content = tenants.load(file) if file.exists() else tenants.TenantFile()
        existing = next((t for t in content.tenants if t.name == name), None)
        if (existing is not None) != another_key:
            raise tenants.TenantFileError(
                f"tenant {name} exists; give it one more key with --another-key"
                if existing
                else f"there is no tenant {name} to give another key; leave --another-key out"
            )
        if existing is None and (name in content.removed) != take_over_records:
            raise tenants.TenantFileError(
                f"no tenant {name} was removed; leave --take-over-records out"
                if take_over_records
                else f"a tenant {name} was removed, and a new one would get its records; choose "
                "another name, or give --take-over-records if that is meant"
            )
        limits = {
            "max_budget": max_budget,
            "max_new_tokens": max_new_tokens,
            "max_prompt_tokens": max_prompt_tokens,
            "requests_per_second": requests_per_second,
            "tokens_per_minute": tokens_per_minute,
            "max_concurrent_requests": max_concurrent_requests,
            "policies": policy,
        }
        given = {
            "roles": role,
            "seed_policy": seed_policy,
            "limits": {key: value for key, value in limits.items() if value},
            "retention": retention,
            "certificate_subjects": certificate_subject,
        }
        try:
            tenant = existing or tenants.Tenant.model_validate(
                {
                    "name": name,
                    **{key: value for key, value in given.items() if value not in (None, [], {})},
                    "master_secrets": [tenants.new_master_secret()],
                }
            )
        except ValidationError as error:
            raise tenants.TenantFileError(describe(error)) from error
        tenant, key = tenants.with_new_key(tenant)
        others = tuple(t for t in content.tenants if t.name != name)
        changed: dict[str, object] = {"tenants": (*others, tenant)}
        if take_over_records:
            changed["removed"] = tuple(n for n in content.removed if n != name)
        tenants.save(file, content.model_copy(update=changed))
    typer.echo(f"API key of {name}; it is not shown again:", err=True)
    typer.echo(key)


def _refuse_settings(context: typer.Context) -> None:
    """With --another-key the tenant stays as it is: options that describe one mean nothing."""
    given = []
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        if parameter.name not in ("name", "file", "another_key") and source is not None:
            # By name: some versions of typer have click's enumeration, some their own.
            given += [] if source.name == "DEFAULT" else parameter.opts
    if given:
        raise typer.BadParameter(
            f"adds a key and changes nothing else; leave out {', '.join(given)}, and edit the "
            "tenants file for the rest",
            param_hint="--another-key",
        )


def list_tenants(file: File = DEFAULT_FILE) -> None:
    """List tenants and the ids of their keys."""
    from vase_sgl.cli.table import print_table
    from vase_sgl.gateway import tenants

    with reported(tenants.TenantFileError):
        content = tenants.load(file)
    print_table(
        ("tenant", "roles", "seeds", "max budget", "key ids"),
        [
            (
                tenant.name,
                ", ".join(sorted(tenant.roles)),
                tenant.seed_policy,
                str(tenant.limits.max_budget),
                ", ".join(key.id for key in tenant.keys),
            )
            for tenant in content.tenants
        ],
    )


def remove(
    name: Annotated[str, typer.Argument(help="The tenant.")],
    key: Annotated[
        str | None, typer.Option(help="Revoke only the key with this id; the tenant stays.")
    ] = None,
    file: File = DEFAULT_FILE,
) -> None:
    """Remove a tenant, or revoke one of its keys. Its records stay, and its seeds with them.

    So does its name, under `removed` in the file: a new tenant with it would get the records.

    A removed tenant's master secret is gone: records can still be replayed, for they hold their
    seeds, but no new request gets the same ones.
    """
    from vase_sgl.gateway import tenants

    with reported(tenants.TenantFileError), tenants.locked(file):
        content = tenants.load(file)
        tenant = next((t for t in content.tenants if t.name == name), None)
        if tenant is None:
            raise tenants.TenantFileError(f"there is no tenant {name} in {file}")
        kept = tuple(t for t in content.tenants if t.name != name)
        changed: dict[str, object] = {"tenants": kept}
        if key is None:
            changed["removed"] = (*content.removed, name)
        else:
            keys = tuple(k for k in tenant.keys if k.id != key)
            if len(keys) == len(tenant.keys):
                raise tenants.TenantFileError(
                    f"tenant {name} has no key {key}; `vase-sgl tenants list` shows them"
                )
            changed["tenants"] = (*kept, tenant.model_copy(update={"keys": keys}))
        tenants.save(file, content.model_copy(update=changed))
    typer.echo(f"revoked key {key} of {name}" if key else f"removed {name}")


def rotate(
    name: Annotated[str, typer.Argument(help="The tenant.")], file: File = DEFAULT_FILE
) -> None:
    """Give a tenant a new master secret; new seeds come from it.

    The old one stays, so that the seeds of old records can still be derived again. Records name
    the version theirs came from, and replays take them from the record.
    """
    from vase_sgl.gateway import tenants

    with reported(tenants.TenantFileError), tenants.locked(file):
        tenant = _load_one(file, name)
        secret = tenants.new_master_secret(tenant.master.version + 1)
        secrets = (*tenant.master_secrets, secret)
        _save_one(file, tenant.model_copy(update={"master_secrets": secrets}))
    typer.echo(f"new seeds of {name} come from master secret version {secret.version}")


def forget_secret(
    name: Annotated[str, typer.Argument(help="The tenant.")],
    version: Annotated[int, typer.Option(min=1, help="An old version of its master secret.")],
    file: File = DEFAULT_FILE,
) -> None:
    """Remove an old master secret for good.

    Records from it can still be replayed, but nobody can derive their seeds again: a replay then
    says VERSION_REMOVED where it said VERIFIED.
    """
    from vase_sgl.gateway import tenants

    with reported(tenants.TenantFileError), tenants.locked(file):
        tenant = _load_one(file, name)
        if tenant.master_version(version) is None:
            there = ", ".join(str(s.version) for s in tenant.master_secrets)
            raise tenants.TenantFileError(
                f"tenant {name} has no master secret version {version}; there are: {there}"
            )
        if version == tenant.master.version:
            raise tenants.TenantFileError(
                f"version {version} is the one in use; `vase-sgl tenants rotate {name}` first"
            )
        secrets = tuple(s for s in tenant.master_secrets if s.version != version)
        _save_one(file, tenant.model_copy(update={"master_secrets": secrets}))
    typer.echo(f"forgot master secret version {version} of {name}")


def _load_one(file: Path, name: str) -> Tenant:
    from vase_sgl.gateway import tenants

    for tenant in tenants.load(file).tenants:
        if tenant.name == name:
            return tenant
    raise tenants.TenantFileError(f"there is no tenant {name} in {file}")


def _save_one(file: Path, changed: Tenant) -> None:
    from vase_sgl.gateway import tenants

    content = tenants.load(file)
    replaced = tuple(changed if t.name == changed.name else t for t in content.tenants)
    tenants.save(file, content.model_copy(update={"tenants": replaced}))
