"""Mutual TLS from files, with certificates made here."""

import socket
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from leasehold.core import errors
from leasehold.rpc import channel, tls
from leasehold.rpc.server import Server
from tls_kit import Authority, make_authority, private_pem


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return make_authority(tmp_path, "authority")


async def check(address: str, files: tls.TlsFiles | None) -> int:
    async with channel.open_channel(address, tls_files=files, has_own_connection=True) as client:
        answer = await health_pb2_grpc.HealthStub(client).Check(health_pb2.HealthCheckRequest(), timeout=5)
    status: int = answer.status
    return status


async def test_an_open_address_is_served_with_mutual_tls_and_to_known_clients_only(
    authority: Authority,
) -> None:
    stranger = make_authority(authority.folder, "stranger")
    server = Server(["0.0.0.0:0"], tls_files=authority.issue("server"))
    await server.start()
    address = server.bound[0].replace("0.0.0.0", "127.0.0.1")
    try:
        assert await check(address, authority.issue("client")) == health_pb2.HealthCheckResponse.SERVING
        foreign = stranger.issue("foreign")
        refused = (
            tls.TlsFiles(foreign.certificate_file, foreign.key_file, authority.file),  # of another authority
            tls.TlsFiles(ca_file=authority.file),  # no certificate of its own
            stranger.issue("suspicious"),  # does not know the server's authority
            None,  # plain
        )
        for files in refused:
            with pytest.raises(grpc.aio.AioRpcError) as refusal:
                await check(address, files)
            assert refusal.value.code() is grpc.StatusCode.UNAVAILABLE
    finally:
        await server.stop_at_once()


async def test_reflection_is_not_offered_to_other_hosts(authority: Authority) -> None:
    server = Server(["0.0.0.0:0"], tls_files=authority.issue("server"))
    await server.start()
    address = server.bound[0].replace("0.0.0.0", "127.0.0.1")
    try:
        async with channel.open_channel(address, tls_files=authority.issue("client")) as client:
            call: Any = client.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")()
            assert await call.code() is grpc.StatusCode.UNIMPLEMENTED
    finally:
        await server.stop_at_once()


async def test_tls_without_client_certificates_is_enough_on_loopback_only(authority: Authority) -> None:
    mutual = authority.issue("server")
    one_sided = tls.TlsFiles(mutual.certificate_file, mutual.key_file)
    server = Server(["127.0.0.1:0"], tls_files=one_sided)
    await server.start()
    try:
        assert await check(server.bound[0], tls.TlsFiles(ca_file=authority.file)) == 1
    finally:
        await server.stop_at_once()
    with pytest.raises(errors.InvalidArgument, match="tls_ca_file"):
        await Server(["0.0.0.0:0"], tls_files=one_sided).start()


async def test_bad_files_are_told_by_setting_before_anything_is_bound(authority: Authority) -> None:
    good = authority.issue("good")
    other = authority.issue("other")
    folder = authority.folder
    (folder / "text.pem").write_text("no certificate")
    open_key = folder / "open.key"
    open_key.write_bytes((good.key_file or folder).read_bytes())
    open_key.chmod(0o644)
    locked_key = folder / "locked.key"
    locked_key.touch(mode=0o600)
    locked_key.write_bytes(private_pem(ec.generate_private_key(ec.SECP256R1()), b"secret"))
    certificate, key, ca = good.certificate_file, good.key_file, good.ca_file
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        listen = f"127.0.0.1:{probe.getsockname()[1]}"
    for files, setting, words in (
        (tls.TlsFiles(certificate, None, ca), "tls_key_file", "needs"),
        (tls.TlsFiles(None, key, ca), "tls_certificate_file", "needs"),
        (tls.TlsFiles(None, None, ca), "tls_certificate_file", "needs"),
        (tls.TlsFiles(folder / "none.pem", key, ca), "tls_certificate_file", "cannot be read"),
        (tls.TlsFiles(certificate, folder / "none.key", ca), "tls_key_file", "cannot be read"),
        (tls.TlsFiles(certificate, open_key, ca), "tls_key_file", "chmod 600"),
        (tls.TlsFiles(certificate, locked_key, ca), "tls_certificate_file", "unencrypted"),
        (
            tls.TlsFiles(certificate, other.key_file, ca),
            "tls_certificate_file",
            "are not a certificate and its",
        ),
        (tls.TlsFiles(folder / "text.pem", key, ca), "tls_certificate_file", "are not a certificate and its"),
        (tls.TlsFiles(certificate, key, folder / "text.pem"), "tls_ca_file", "holds no PEM certificate"),
    ):
        with pytest.raises(errors.InvalidArgument, match=words) as refusal:
            await Server([listen], tls_files=files).start()
        assert refusal.value.field == setting
    server = Server([listen], tls_files=good)
    await server.start()
    await server.stop_at_once()
