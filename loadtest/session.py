"""What one Locust process knows of the test: options, tenants, connections, thresholds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loadtest import prompts, slo, tenants
from loadtest.options import Settings
from loadtest.problems import BadSetup
from loadtest.tenants import Tenant
from vase_sgl.client import NEVER, Capacity, Client, Tls, VaseError

_CAPACITY_SECONDS = 10.0


class Session:
    """Reads everything the options name. Raises `BadSetup`.

    Keys and certificates are read in every process and never sent between them.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        """`options` are Locust's parsed options; kept, since the web form changes them."""
        self._options = options
        self._tls = _tls(options)
        self._clients: dict[tuple[str, str], Client] = {}
        self.tenants = tenants.load(_path(options["tenants"]))
        self._keys = {tenant.name: tenant.api_key() for tenant in self.tenants}
        path = _path(options["slo"])
        self.slo = None if path is None else slo.load(path, list(self._keys))
        self.read_settings()

    def read_settings(self) -> None:
        """Read the options again, as a form may have changed them."""
        self.settings = settings = Settings.of(self._options)
        if settings.scenario == "noisy-neighbour" and len({t.noisy for t in self.tenants}) < 2:
            raise BadSetup(
                "noisy-neighbour needs --tenants with `noisy: true` for some and not for others"
            )
        self.prompts: prompts.Source = (
            prompts.Synthetic(settings.synthetic_tokens)
            if settings.prompts == prompts.SYNTHETIC
            else prompts.read_jsonl(Path(settings.prompts))
        )

    def check_times(self) -> None:
        """Raise `BadSetup` if the scenario needs a run time that was not given."""
        if self.settings.load.shape != "steady" and not self._options["run_time"]:
            raise BadSetup(f"{self.settings.scenario} needs a --run-time, such as 5m")

    def client(self, target: str | None, tenant: Tenant) -> Client:
        """The tenant's connection to `target`, one for all its users in this process.

        Raises `BadSetup`.
        """
        if not target:
            raise BadSetup("--host is missing: the gateway's host:port")
        if "://" in target:
            raise BadSetup(f"--host is host:port, such as 127.0.0.1:50051, not {target}")
        place = (target, tenant.name)
        if place not in self._clients:
            self._clients[place] = Client(
                target, self._keys[tenant.name], tls=self._tls, retry=NEVER
            )
        return self._clients[place]

    def capacity(self, target: str | None, tenant: Tenant) -> Capacity:
        """What the gateway has for a tenant. Raises `BadSetup` if it does not answer."""
        client = self.client(target, tenant)
        try:
            return client.capacity(timeout=_CAPACITY_SECONDS)
        except VaseError as error:
            raise BadSetup(
                f"the gateway at {target} does not serve tenant {tenant.name}: {error}"
            ) from error


def _path(value: str | None) -> Path | None:
    return Path(value) if value else None


def _tls(options: Mapping[str, Any]) -> Tls | None:
    paths = [_path(options[name]) for name in ("gateway_ca", "client_cert", "client_key")]
    authority, certificate, key = (_bytes(path) for path in paths)
    if (certificate is None) != (key is None):
        raise BadSetup("--client-cert and --client-key go together")
    if authority is None:
        if certificate is not None:
            raise BadSetup("--client-cert needs --gateway-ca")
        return None
    return Tls(authority, certificate, key)


def _bytes(path: Path | None) -> bytes | None:
    try:
        return None if path is None else path.read_bytes()
    except OSError as error:
        raise BadSetup(f"cannot read {path}: {error.strerror}") from error
