"""The connection itself: TLS, client certificates, a ceiling on calls."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
from pathlib import Path

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
)
from vase_sgl.gateway.config import ConfigError


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
            (status,) = (s for s in running.gateway._router.statuses() if s.name == worker.url)
            assert not status.ready and worker.health_checks == checked > 0
        assert "shows no certificate that is trusted here" in caplog.text


async def test_an_authority_that_is_not_there_is_named(tmp_path: Path) -> None:
    worker = {"urls": ["https://127.0.0.1:1"], "ca_file": tmp_path / "none.pem"}
    with pytest.raises(ConfigError, match=r"worker.ca_file: .*none\.pem cannot be used"):
        async with run_gateway(tmp_path, worker=worker):
            pass


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
