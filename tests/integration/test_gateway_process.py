"""The gateway as a process of its own: it listens, drains, refuses to start, and keeps strangers out by TLS."""

import asyncio
import contextlib
import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import allocator_kit
import fake_fleet
import gateway_scene
import httpx
import pytest
import tls_kit
from leasehold.devstack import ports

NOWHERE = "127.0.0.1:9"


@contextlib.contextmanager
def gateway(*flags: str, log: Path, **env: str) -> Iterator["subprocess.Popen[bytes]"]:
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "leasehold.gateway", *flags],
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextlib.asynccontextmanager
async def served(
    tmp_path: Path, addr: str, *flags: str, **env: str
) -> AsyncIterator[tuple["subprocess.Popen[bytes]", httpx.AsyncClient]]:
    """A gateway that answers, and calls to it."""
    listen = f"127.0.0.1:{ports.free_port()}"
    with gateway("--listen", listen, "--addr", addr, *flags, log=tmp_path / "gateway.log", **env) as process:
        async with httpx.AsyncClient(base_url=f"http://{listen}", timeout=15.0) as calls:
            await allocator_kit.until(lambda: answers(process, calls), "the gateway answers")
            yield process, calls


async def answers(process: "subprocess.Popen[bytes]", calls: httpx.AsyncClient) -> bool:
    assert process.poll() is None, "it ended"
    try:
        return (await calls.get("/healthz")).status_code == 200
    except httpx.TransportError:
        return False


async def ended(process: "subprocess.Popen[bytes]") -> int:
    await allocator_kit.until(lambda: process.poll() is not None, "the gateway ends")
    return int(process.returncode)


async def test_a_fleet_is_seen_and_scaled_through_it(tmp_path: Path) -> None:
    fleet = gateway_scene.fleet()
    with fake_fleet.serve(fleet) as addr:
        async with served(tmp_path, addr) as (_, calls):
            status = (await calls.get("/monitoring/status")).json()
            scaled = await calls.post("/monitoring/workers/scale?target_workers=4")
            beyond = await calls.post("/monitoring/workers/scale?target_workers=7")
            metrics = (await calls.get("/metrics")).text

    assert status["totals"]["workers_running"] == 3
    assert (scaled.status_code, scaled.json()["pool"]["desired"]) == (200, 4)
    assert (beyond.status_code, beyond.json()["error"]["field"]) == (400, "target_workers")
    assert "leasehold_allocator_up 1\n" in metrics
    assert "leasehold_calls_total 3\n" in metrics
    assert "server" not in scaled.headers


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_it_drains_requests_in_flight_are_answered_and_it_exits_with_0(
    tmp_path: Path, number: signal.Signals
) -> None:
    fleet = gateway_scene.fleet()
    fleet.gate = asyncio.Event()
    with fake_fleet.serve(fleet) as addr:
        async with served(tmp_path, addr) as (process, calls):
            waiting = asyncio.ensure_future(calls.get("/monitoring/memory"))
            await allocator_kit.until(lambda: fleet.waiting, "the request is at the allocator")
            process.send_signal(number)
            await allocator_kit.until(lambda: refuses(calls), "nothing listens any more")
            assert process.poll() is None
            fleet.open_gate()
            answer = await waiting
            assert answer.status_code == 200
            assert await ended(process) == 0


async def refuses(calls: httpx.AsyncClient) -> bool:
    try:
        _, writer = await asyncio.open_connection(calls.base_url.host, calls.base_url.port)
    except OSError:
        return True
    writer.close()
    return False


async def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    fleet = gateway_scene.fleet()
    fleet.gate = asyncio.Event()
    with fake_fleet.serve(fleet) as addr:
        async with served(tmp_path, addr) as (process, calls):
            waiting = asyncio.ensure_future(calls.get("/monitoring/memory"))
            await allocator_kit.until(lambda: fleet.waiting, "the request is at the allocator")
            process.terminate()
            await allocator_kit.until(lambda: refuses(calls), "nothing listens any more")
            process.terminate()
            await ended(process)
            with contextlib.suppress(httpx.TransportError):
                await waiting
            fleet.open_gate()


async def test_without_an_allocator_it_serves_and_says_so(tmp_path: Path) -> None:
    async with served(tmp_path, NOWHERE, "--allocator-timeout-seconds", "0.2") as (_, calls):
        away = await calls.get("/monitoring/status")
        metrics = await calls.get("/metrics")
        health = await calls.get("/healthz")

    assert (away.status_code, away.headers["retry-after"]) == (503, "1")
    assert NOWHERE in away.json()["error"]["message"]
    assert (metrics.status_code, health.status_code) == (200, 200)
    assert "leasehold_allocator_up 0\n" in metrics.text


async def test_what_is_no_http_is_refused_and_harms_nobody(tmp_path: Path) -> None:
    async with served(tmp_path, NOWHERE) as (_, calls):
        for content in (b"\x16\x03\x01 nonsense\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"A" * 200_000):
            reader, writer = await asyncio.open_connection(calls.base_url.host, calls.base_url.port)
            with contextlib.suppress(ConnectionError):
                writer.write(content)
                await writer.drain()
                answer = await asyncio.wait_for(reader.read(), 10)
                assert answer.startswith(b"HTTP/1.1 400")
            writer.close()
        assert (await calls.get("/healthz")).status_code == 200


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--listen", "0.0.0.0:0"], "LEASEHOLD_GATEWAY_LISTEN"),
        (["--listen", "8000"], "--listen"),
        (["--addr", "nowhere"], "--addr"),
        (["--body-bytes-max", "-1"], "LEASEHOLD_GATEWAY_BODY_BYTES_MAX"),
    ],
)
async def test_a_setting_that_is_wrong_is_told_in_one_line(
    tmp_path: Path, flags: list[str], words: str
) -> None:
    log = tmp_path / "log"
    with gateway(*flags, log=log) as process:
        assert await ended(process) == 1

    told = log.read_text()
    assert words in told
    assert told.startswith("leasehold gateway: ")
    assert told.count("\n") == 1


async def test_a_port_that_is_taken_is_told_with_the_flag(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with gateway(log=log, LEASEHOLD_GATEWAY_LISTEN=f"127.0.0.1:{port}") as process:
            assert await ended(process) == 1

    assert f"port {port}" in log.read_text()
    assert "--listen" in log.read_text()


async def test_beyond_loopback_it_answers_only_clients_with_a_certificate(tmp_path: Path) -> None:
    authority = tls_kit.make_authority(tmp_path, "authority")
    server, client = authority.issue("server"), authority.issue("client")
    stranger = tls_kit.make_authority(tmp_path, "stranger").issue("foreign")
    port = ports.free_port()
    files = {
        "LEASEHOLD_GATEWAY_TLS_CERTIFICATE_FILE": str(server.certificate_file),
        "LEASEHOLD_GATEWAY_TLS_KEY_FILE": str(server.key_file),
        "LEASEHOLD_GATEWAY_TLS_CA_FILE": str(authority.file),
    }
    flags = ["--listen", f"0.0.0.0:{port}", "--allowed-hosts", "gateway.example.org", "--addr", NOWHERE]
    with gateway(*flags, log=tmp_path / "log", **files) as process:

        async def status(certificate: Path | None, key: Path | None) -> int:
            context = ssl.create_default_context(cafile=str(authority.file))
            if certificate is not None:
                context.load_cert_chain(certificate, key)
            async with httpx.AsyncClient(verify=context, base_url=f"https://127.0.0.1:{port}") as calls:
                try:
                    return (await calls.get("/healthz")).status_code
                except httpx.TransportError:
                    assert process.poll() is None, (tmp_path / "log").read_text()
                    return 0

        async def is_served() -> bool:
            return await status(client.certificate_file, client.key_file) == 200

        await allocator_kit.until(is_served, "the gateway answers")
        assert await status(None, None) == 0
        assert await status(stranger.certificate_file, stranger.key_file) == 0
