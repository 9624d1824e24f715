"""Before a pool starts its broker is asked; each failure names what to do, and none shows a password."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from fake_rabbitmq import FakeRabbit
from fixtures_broker import BrokerServer
from leasehold.devstack import ports
from leasehold.nodeagent import broker_check


@pytest.fixture
async def guarded(tmp_path: Path) -> AsyncIterator[BrokerServer]:
    server = BrokerServer(tmp_path, "--requirepass", "hunter2")
    server.start()
    for _ in range(1000):
        if await broker_check.check(server.url.replace("//", "//:hunter2@")) is None:
            break
        await asyncio.sleep(0.01)
    yield server
    server.kill()


async def _failure(url: str | None) -> str:
    failure = await broker_check.check(url, timeout_seconds=0.5)
    assert failure is not None
    assert "hunter" not in repr(failure)
    return f"{failure.problem} | {failure.advice}"


async def test_a_broker_that_answers_is_fine(broker: BrokerServer) -> None:
    assert await broker_check.check(broker.url) is None


async def test_a_variable_that_is_not_set_is_named() -> None:
    assert "CELERY_BROKER_URL is not set | set CELERY_BROKER_URL" in await _failure(None)


async def test_a_malformed_address_is_named() -> None:
    assert "correct CELERY_BROKER_URL" in await _failure("redis//127.0.0.1")


async def test_nobody_who_listens() -> None:
    assert "nothing listens there" in await _failure(f"redis://127.0.0.1:{ports.free_port()}/0")


async def test_a_name_that_nobody_knows() -> None:
    assert "the name is not known here" in await _failure("redis://no-such-host.invalid/0")


async def test_a_socket_that_is_not_there(tmp_path: Path) -> None:
    assert "there is no such socket" in await _failure(f"redis+socket://{tmp_path}/none.sock")


async def test_a_listener_that_says_nothing(silent_port: int) -> None:
    assert "did not answer within 0.5 s" in await _failure(f"redis://127.0.0.1:{silent_port}/0")


@pytest.mark.parametrize("scheme", ["redis", "amqp", "rediss"])
async def test_a_listener_of_another_kind(scheme: str) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    told = await _failure(f"{scheme}://127.0.0.1:{server.sockets[0].getsockname()[1]}/0")
    server.close()

    assert ("no TLS is spoken there" if scheme == "rediss" else "does not speak") in told


async def test_tls_where_the_broker_waits_for_plain_text(broker: BrokerServer) -> None:
    assert "one side speaks TLS" in await _failure(broker.url.replace("redis://", "rediss://"))


@pytest.mark.parametrize("login", ["", ":hunter3@", "nobody:hunter2@"])
async def test_a_login_that_is_refused(guarded: BrokerServer, login: str) -> None:
    told = await _failure(guarded.url.replace("//", f"//{login}"))

    assert "the user or the password in CELERY_BROKER_URL is wrong" in told


async def test_a_database_that_is_not_there(broker: BrokerServer) -> None:
    assert "what CELERY_BROKER_URL asks of it" in await _failure(broker.url.replace("/0", "/99"))


async def test_a_rabbitmq_that_answers_and_one_that_refuses_the_login() -> None:
    async with FakeRabbit({}, password="hunter2") as rabbit:
        assert await broker_check.check(rabbit.url) is None
        told = await _failure(rabbit.url.replace("hunter2", "hunter3"))

    assert "ACCESS_REFUSED" in told
    assert "the user or the password" in told
