"""The image's health client against a real gateway, in clear text and behind TLS."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import sys
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.gateway.running import run_gateway
from tests.k8s.chart import ROOT
from vase_sgl.client import Tls

SCRIPT = ROOT / "k8s" / "images" / "vase_grpc_health.py"
NAME = "r-vase-sgl-gateway.ns.svc"


async def ask(*options: str) -> tuple[int | None, str]:
    """Exit status and all output of the script."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(SCRIPT),
        *options,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    return process.returncode, output.decode()


async def test_serving_and_not(tmp_path: Path) -> None:
    async with run_gateway(tmp_path) as running:
        target = f"--target={running.target}"
        assert await ask(target) == (0, "SERVING\n")
        assert await ask(target, "--service=vase.v1.VaseGateway") == (0, "SERVING\n")
        status, output = await ask(target, "--service=bogus")
        assert status == 2 and "NOT_FOUND" in output
        running.worker.faults.healthy = False
        async with asyncio.timeout(20):
            while (await ask(target))[0] == 0:
                await asyncio.sleep(0.1)
        assert await ask(target) == (1, "NOT_SERVING\n")


async def test_nobody_there() -> None:
    status, output = await ask("--target=127.0.0.1:1", "--timeout=1")
    assert status == 2 and "127.0.0.1:1" in output


@pytest.mark.parametrize(
    "options", [["--certificate=x"], ["--server-name=x"], ["--bogus"]], ids=str
)
async def test_wrong_options_are_refused(options: list[str]) -> None:
    status, output = await ask(*options)
    assert status == 2 and "usage" in output


async def test_behind_tls(tmp_path: Path) -> None:
    ca, certificate, key = issue(tmp_path)
    trusting = Tls(root_certificates=ca.read_bytes())
    config = {"certificate": certificate, "key": key}
    async with run_gateway(tmp_path, client_tls=trusting, tls=config) as running:
        target = f"--target={running.target}"
        assert await ask(target, f"--ca-file={ca}", f"--server-name={NAME}") == (0, "SERVING\n")
        # An existing Secret may lack its authority: the certificate itself is trusted then.
        trusting_itself = await ask(target, f"--ca-file={certificate}", f"--server-name={NAME}")
        assert trusting_itself == (0, "SERVING\n")
        for wrong in ([], [f"--ca-file={key}"], [f"--ca-file={ca}", "--server-name=other"]):
            status, _ = await ask(target, "--timeout=2", *wrong)
            assert status == 2, wrong


async def test_files_that_were_renewed_since(tmp_path: Path) -> None:
    """The server still shows the old certificate; a probe beside it must not care."""
    ca, certificate, key = issue(tmp_path)
    trusting = Tls(root_certificates=ca.read_bytes())
    config = {"certificate": certificate, "key": key}
    async with run_gateway(tmp_path, client_tls=trusting, tls=config) as running:
        target, name = f"--target={running.target}", f"--server-name={NAME}"
        issue(tmp_path)
        assert (await ask(target, f"--ca-file={certificate}", name, "--timeout=2"))[0] == 2
        assert await ask(target, "--trust-any", name) == (0, "SERVING\n")
        assert (await ask(target, "--trust-any", "--server-name=other", "--timeout=2"))[0] == 2
        status, output = await ask("--target=127.0.0.1:1", "--trust-any")
        assert status == 2 and "127.0.0.1:1" in output


async def test_a_proxy_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with run_gateway(tmp_path) as running:
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
        assert await ask(f"--target={running.target}") == (0, "SERVING\n")


async def test_with_client_certificates(tmp_path: Path) -> None:
    ca, certificate, key = issue(tmp_path)
    pem = (ca.read_bytes(), certificate.read_bytes(), key.read_bytes())
    config = {"certificate": certificate, "key": key, "client_ca": ca}
    known = Tls(*pem)
    async with run_gateway(tmp_path, client_tls=known, tls=config) as running:
        trusted = (f"--target={running.target}", f"--ca-file={ca}", f"--server-name={NAME}")
        shown = (f"--certificate={certificate}", f"--key={key}")
        assert await ask(*trusted, *shown) == (0, "SERVING\n")
        assert (await ask(*trusted, "--timeout=2"))[0] == 2
        beside = (f"--target={running.target}", "--trust-any", f"--server-name={NAME}")
        assert await ask(*beside, *shown) == (0, "SERVING\n")


def issue(folder: Path) -> tuple[Path, Path, Path]:
    """An authority, and a certificate of the Service and 127.0.0.1 by it, for server and client."""
    now = datetime.datetime.now(datetime.UTC)
    authority_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    authority = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority")])

    def builder(subject: x509.Name, public: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(authority)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
        )

    root = (
        builder(authority, authority_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(authority_key, hashes.SHA256())
    )
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "gateway")])
    names = [x509.DNSName(NAME), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    leaf = (
        builder(subject, key.public_key())
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    files = folder / "ca.crt", folder / "tls.crt", folder / "tls.key"
    files[0].write_bytes(root.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(leaf.public_bytes(serialization.Encoding.PEM))
    files[2].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return files
