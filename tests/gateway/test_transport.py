"""The connection itself: TLS, client certificates, a ceiling on calls."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import ssl
from pathlib import Path
from typing import Any, Self

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.gateway.running import Running, run_gateway, until
from tests.gateway.scripted_worker import ScriptedWorker
from vase_sgl.client import (
    NEVER,
    AsyncClient,
    AuthenticationError,
    NotFound,
    RateLimited,
    Tls,
    Unavailable,
    channels,
)
from vase_sgl.gateway.config import ConfigError, load_config


def certificate(folder: Path, *subject: tuple[x509.ObjectIdentifier, str]) -> tuple[Path, Path]:
    """A self-signed certificate of 127.0.0.1, good for server and client, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    attributes = subject or ((NameOID.COMMON_NAME, "127.0.0.1"),)
    name = x509.Name([x509.NameAttribute(oid, value) for oid, value in attributes])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
            critical=False,
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    files = folder / "cert.pem", folder / "key.pem"
    files[0].write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return files


async def works(running: Running, tls: Tls | None) -> bool:
    async with AsyncClient(running.target, running.key, tls=tls, retry=NEVER) as client:
        try:
            await client.generate_once("tell me", max_new_tokens=2, timeout=10)
        except Unavailable:
            return False
        return True


async def test_tls_takes_only_clients_that_trust_it(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    trusting = Tls(root_certificates=cert.read_bytes())
    config = {"certificate": cert, "key": key}
    async with run_gateway(tmp_path, client_tls=trusting, tls=config) as running:
        assert await works(running, trusting)
        assert not await works(running, Tls())
        assert not await works(running, None)


async def test_a_client_certificate_can_be_asked_for(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    anonymous = Tls(root_certificates=cert.read_bytes())
    known = Tls(cert.read_bytes(), cert.read_bytes(), key.read_bytes())
    config = {"certificate": cert, "key": key, "client_ca": cert}
    async with run_gateway(tmp_path, client_tls=known, tls=config) as running:
        assert await works(running, known)
        assert not await works(running, anonymous)


async def test_a_certificates_subject_names_the_tenant(tmp_path: Path) -> None:
    cert, key = certificate(
        tmp_path, (NameOID.ORGANIZATION_NAME, "Example, Ltd"), (NameOID.COMMON_NAME, "carol")
    )
    known = Tls(cert.read_bytes(), cert.read_bytes(), key.read_bytes())
    config = {"certificate": cert, "key": key, "client_ca": cert}
    async with run_gateway(tmp_path, client_tls=known, tls=config) as running:
        async with AsyncClient(running.target, tls=known, retry=NEVER) as carol:
            with pytest.raises(AuthenticationError, match=r"subject 'CN=carol,O=Example\\\\, Ltd'"):
                await carol.capacity()
            running.add_tenant("carol", certificate_subjects=["CN=carol,O=Example\\, Ltd"])
            answer = await carol.generate_once("tell me", max_new_tokens=1)
            assert (await carol.get_record(answer.request_id)).status == "completed"
        # A key that is sent decides, whoever the certificate is.
        with pytest.raises(NotFound, match="of tenant alice"):
            await running.client.get_record(answer.request_id)
        async with AsyncClient(
            running.target, running.key[:-1] + "z", tls=known, retry=NEVER
        ) as wrong:
            with pytest.raises(AuthenticationError):
                await wrong.capacity()


async def test_one_file_is_enough_for_tls(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    trusting = Tls(root_certificates=cert.read_bytes())
    both = tmp_path / "both.pem"
    both.write_bytes(cert.read_bytes() + key.read_bytes())
    async with run_gateway(tmp_path, client_tls=trusting, tls={"certificate": both}) as running:
        assert await works(running, trusting)
        assert not await works(running, None)


async def test_a_certificate_that_is_not_there_is_named(tmp_path: Path) -> None:
    config = {"certificate": tmp_path / "none.pem", "key": tmp_path / "none.key"}
    with pytest.raises(ConfigError, match=r"tls: cannot read .*none"):
        async with run_gateway(tmp_path, tls=config):
            pass


async def test_a_certificate_without_its_key_is_no_taken_port(tmp_path: Path) -> None:
    cert, _ = certificate(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot be used: .*tls.key names the key"):
        async with run_gateway(tmp_path, tls={"certificate": cert}):
            pass


async def test_a_client_ca_that_is_none_is_named(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    wrong = {"certificate": cert, "key": key, "client_ca": key}
    with pytest.raises(ConfigError, match=r"tls.client_ca: .* cannot be used"):
        async with run_gateway(tmp_path, tls=wrong):
            pass


async def test_a_worker_has_to_show_a_certificate_of_the_authority(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cert, key = certificate(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(cert, key)
    async with ScriptedWorker(tls=context) as worker, ScriptedWorker() as plain:
        known = {"urls": [worker.url], "ca_file": cert}
        async with run_gateway(tmp_path, worker=known) as running:
            assert await works(running, None)
        (unknown := tmp_path / "unknown").mkdir()
        checked = worker.health_checks
        async with run_gateway(unknown, worker={"urls": [worker.url, plain.url]}) as running:
            await until(lambda: f"worker {worker.url} is not ready" in caplog.text)
            (status,) = (s for s in running.gateway._fleet.statuses() if s.name == worker.url)
            assert not status.ready and worker.health_checks == checked > 0
        assert "shows no certificate that is trusted here" in caplog.text


async def test_an_authority_that_is_not_there_is_named(tmp_path: Path) -> None:
    worker = {"urls": ["https://127.0.0.1:1"], "ca_file": tmp_path / "none.pem"}
    with pytest.raises(ConfigError, match=r"worker.ca_file: .*none\.pem cannot be used"):
        async with run_gateway(tmp_path, worker=worker):
            pass


class Hole:
    """A TCP proxy in front of a port, which on order swallows all that comes: as a host does that
    vanished, or a firewall that forgot the connection."""

    def __init__(self, port: int) -> None:
        self.port = 0
        self.open = True
        self._behind = port
        self._pipes: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._server.close()
        for pipe in self._pipes:
            pipe.cancel()
        for writer in self._writers:
            writer.close()
        await asyncio.gather(*self._pipes, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind, ahead = await asyncio.open_connection("127.0.0.1", self._behind)
        self._writers += [writer, ahead]  # none is closed when its other side is
        for ends in ((reader, ahead), (behind, writer)):
            self._pipes.add(asyncio.create_task(self._pipe(*ends)))

    async def _pipe(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(2**16):
            if self.open:
                writer.write(data)


def with_keepalive_of_a_second(options: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """The client's options, its pings and their timeout apart."""
    return [(name, {30_000: 1000, 10_000: 1000}.get(value, value)) for name, value in options]


async def test_both_sides_notice_that_the_other_vanished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = with_keepalive_of_a_second(channels.OPTIONS)
    monkeypatch.setattr(channels, "OPTIONS", options)
    section = {
        "keepalive_seconds": 1,
        "keepalive_timeout_seconds": 1,
        "min_ping_interval_seconds": 0.5,
    }
    async with run_gateway(tmp_path, grpc=section) as running, Hole(running.gateway.port) as hole:
        running.worker.token_seconds = 0.1
        async with AsyncClient(f"127.0.0.1:{hole.port}", running.key, retry=NEVER) as client:
            answer = asyncio.create_task(client.generate_once("tell me", max_new_tokens=4000))
            # Longer than the pings that gRPC sends without data, unless it is told otherwise.
            await asyncio.sleep(3.5)
            assert not answer.done()
            hole.open = False
            async with asyncio.timeout(10):
                with pytest.raises(Unavailable, match="the connection to the gateway was lost"):
                    await answer
                await running.worker.wait_for_abort(10)


def test_the_gateway_takes_as_many_pings_as_the_client_sends() -> None:
    allowed = load_config(overrides={"worker": {"urls": ["http://a"]}}).grpc
    sent = dict(channels.OPTIONS)["grpc.keepalive_time_ms"]
    assert isinstance(sent, int) and sent >= 2 * 1000 * allowed.min_ping_interval_seconds


async def test_calls_above_the_ceiling_are_refused(tmp_path: Path) -> None:
    async with run_gateway(tmp_path, grpc={"max_concurrent_calls": 2}) as running:
        running.worker.token_seconds = 0.02
        streams = [running.client.generate("tell me", max_new_tokens=500) for _ in range(2)]
        for stream in streams:
            await stream.started()
        with pytest.raises(RateLimited):
            await running.client.capacity()
        for stream in streams:
            stream.cancel()
