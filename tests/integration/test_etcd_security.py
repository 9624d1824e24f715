"""The etcd adapter with users, tokens that lapse, and TLS, against real servers."""

import asyncio
import contextlib
import datetime
import ipaddress
import json
import socket
import threading
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from leasehold import devstack
from leasehold.core import errors
from leasehold.devstack import etcd_binary, ports, process, records
from leasehold.etcd import adapter, port, settings
from leasehold.etcd.port import Compare, KeyPut, Put

SETTINGS = settings.Settings(call_timeout_seconds=5)
IMPATIENT = settings.Settings(call_timeout_seconds=1)
#: On a machine that is busy with other things a handshake may take longer than the patience.
NOT_LET_IN = (errors.EtcdUnavailable, errors.DeadlineExceeded)
ROOT = settings.Login("root", "root's secret")
APP = settings.Login("app", "app's secret")


def call_gateway(endpoint: str, path: str, body: dict[str, object], token: str = "") -> dict[str, str]:
    """etcd's JSON face, for administration that the adapter does not offer."""
    headers = {"Authorization": token} if token else {}
    request = urllib.request.Request(f"http://{endpoint}/v3/auth/{path}", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=5) as answer:
        found: dict[str, str] = json.loads(answer.read())
    return found


def forget_tokens(endpoint: str) -> None:
    """A changed password, be it to the same, makes etcd forget every token of the user."""
    root = call_gateway(endpoint, "authenticate", {"name": ROOT.user, "password": ROOT.password})
    change: dict[str, object] = {"name": APP.user, "password": APP.password}
    call_gateway(endpoint, "user/changepw", change, root["token"])


def enable_auth(endpoint: str) -> None:
    call_gateway(endpoint, "user/add", {"name": ROOT.user, "password": ROOT.password})
    call_gateway(endpoint, "role/add", {"name": "root"})
    call_gateway(endpoint, "user/grant", {"user": ROOT.user, "role": "root"})
    call_gateway(endpoint, "user/add", {"name": APP.user, "password": APP.password})
    call_gateway(endpoint, "role/add", {"name": "app"})
    # The keys /app/..., in base64: "/app/" up to "/app0".
    permission = {"permType": "READWRITE", "key": "L2FwcC8=", "range_end": "L2FwcDA="}
    call_gateway(endpoint, "role/grant", {"name": "app", "perm": permission})
    call_gateway(endpoint, "user/grant", {"user": APP.user, "role": "app"})
    call_gateway(endpoint, "enable", {})


@pytest.fixture
def guarded(own_etcd: devstack.EtcdServer) -> devstack.EtcdServer:
    """An etcd that asks for users."""
    enable_auth(own_etcd.endpoint)
    return own_etcd


@pytest.fixture
async def app(guarded: devstack.EtcdServer) -> AsyncIterator[port.EtcdPort]:
    client = await adapter.connect([guarded.endpoint], login=APP, settings=SETTINGS)
    yield client
    await client.close()


async def test_a_wrong_password_is_refused_when_connecting(guarded: devstack.EtcdServer) -> None:
    with pytest.raises(errors.PermissionDenied):
        await adapter.connect([guarded.endpoint], login=settings.Login("app", "wrong"), settings=SETTINGS)


async def test_a_client_without_a_login_is_refused(guarded: devstack.EtcdServer) -> None:
    with pytest.raises(errors.PermissionDenied):
        client = await adapter.connect([guarded.endpoint], settings=SETTINGS)
        try:
            await client.get("/app/k")
        finally:
            await client.close()


async def test_a_user_may_do_only_what_its_role_allows(app: port.EtcdPort) -> None:
    await app.put("/app/k", b"1")
    assert (await app.txn([Compare.value("/app/k", b"1")], [Put("/app/k", b"2")])).succeeded
    with pytest.raises(errors.PermissionDenied):
        await app.get("/other")
    with pytest.raises(errors.PermissionDenied):
        await app.txn([], [Put("/other", b"")])
    with pytest.raises(errors.PermissionDenied):
        await asyncio.wait_for(anext(app.watch_prefix("/other")), 10)
    with pytest.raises(errors.PermissionDenied):
        await asyncio.wait_for(anext(app.watch_prefix("/other", 1)), 10)


async def test_calls_replace_a_token_that_etcd_has_forgotten(
    guarded: devstack.EtcdServer, app: port.EtcdPort
) -> None:
    await app.put("/app/k", b"")
    await asyncio.to_thread(forget_tokens, guarded.endpoint)
    results = await asyncio.gather(*(app.txn([], [Put(f"/app/{n}", b"")]) for n in range(20)))
    assert all(result.succeeded for result in results)
    lease = await app.grant_lease(60)
    assert await app.keep_alive(lease.lease_id) == 60


async def test_a_watch_replaces_a_token_that_etcd_has_forgotten(
    guarded: devstack.EtcdServer, app: port.EtcdPort
) -> None:
    start = await app.put("/app/k", b"0") + 1
    async with contextlib.aclosing(app.watch_prefix("/app/", start)) as watch:
        await app.put("/app/k", b"1")
        await asyncio.wait_for(anext(watch), 10)
        await asyncio.to_thread(forget_tokens, guarded.endpoint)
        await asyncio.to_thread(guarded.kill)
        await asyncio.to_thread(guarded.start)
        refreshed = asyncio.create_task(anext(watch))  # no call but the watch has met the new server
        root = await adapter.connect([guarded.endpoint], login=ROOT, settings=SETTINGS)
        await root.put("/app/k", b"2")
        event = await asyncio.wait_for(refreshed, 10)
        await root.close()
    assert isinstance(event, KeyPut)
    assert event.record.value == b"2"


async def test_a_login_where_none_is_needed_does_no_harm_and_serves_once_it_is(
    own_etcd: devstack.EtcdServer,
) -> None:
    client = await adapter.connect([own_etcd.endpoint], login=APP, settings=SETTINGS)
    await client.put("/app/k", b"1")
    await asyncio.to_thread(enable_auth, own_etcd.endpoint)
    await client.put("/app/k", b"2")
    await client.close()


# -- TLS


class Authority:
    """A certificate authority of this test run."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._name = name
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = self._builder(self._subject, self._key.public_key())
        certificate = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        self.ca_file = self._write("ca.pem", self._pem(certificate))

    def issue(self, name: str) -> tuple[str, str]:
        """Files of a certificate for 127.0.0.1, usable on either side, and of its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        certificate = self._builder(subject, key.public_key()).add_extension(address, critical=False)
        key_pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return self._write(f"{name}.pem", self._pem(certificate)), self._write(f"{name}.key", key_pem)

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
        )

    def _pem(self, builder: x509.CertificateBuilder) -> bytes:
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def _write(self, name: str, content: bytes) -> str:
        path = self._folder / f"{self._name}-{name}"
        path.write_bytes(content)
        return str(path)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"), "authority")


@pytest.fixture(scope="module")
def tls_endpoint(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An etcd that speaks TLS and asks for a client certificate."""
    folder = tmp_path_factory.mktemp("etcd-tls")
    cert_file, key_file = authority.issue("server")
    client, peer = f"https://127.0.0.1:{ports.free_port()}", f"http://127.0.0.1:{ports.free_port()}"
    command = [
        str(etcd_binary.find(announce=lambda _: None, cancel=threading.Event())),
        f"--data-dir={folder / 'data'}",
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=default={peer}",
        f"--cert-file={cert_file}",
        f"--key-file={key_file}",
        f"--trusted-ca-file={authority.ca_file}",
        "--client-cert-auth",
    ]
    child = process.Child(
        "etcd",
        command,
        log_path=folder / "etcd.log",
        book=records.Records(folder),
        env=etcd_binary.clean_environment(),
    )
    child.start()
    try:
        child.wait_until(lambda: is_open(client), timeout_seconds=20, cancel=threading.Event())
        yield client
    finally:
        child.stop(5)


def is_open(url: str) -> bool:
    host, _, number = url.removeprefix("https://").rpartition(":")
    with contextlib.suppress(OSError), socket.create_connection((host, int(number)), timeout=1):
        return True
    return False


async def test_a_client_with_its_certificate_speaks_tls(tls_endpoint: str, authority: Authority) -> None:
    cert_file, key_file = authority.issue("client")
    tls = settings.Tls(authority.ca_file, cert_file, key_file)
    client = await adapter.connect([tls_endpoint], tls=tls, settings=SETTINGS)
    revision = await client.put("/k", b"1")
    async with contextlib.aclosing(client.watch_prefix("/k", revision)) as watch:
        event = await asyncio.wait_for(anext(watch), 10)
    assert isinstance(event, KeyPut)
    await client.close()


async def test_a_client_without_a_certificate_is_not_let_in(tls_endpoint: str, authority: Authority) -> None:
    with pytest.raises(NOT_LET_IN):
        await adapter.connect([tls_endpoint], tls=settings.Tls(authority.ca_file), settings=IMPATIENT)


async def test_a_server_of_another_authority_is_not_trusted(
    tls_endpoint: str, authority: Authority, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path, "stranger")
    cert_file, key_file = authority.issue("client")
    with pytest.raises(NOT_LET_IN):
        await adapter.connect(
            [tls_endpoint], tls=settings.Tls(stranger.ca_file, cert_file, key_file), settings=IMPATIENT
        )
