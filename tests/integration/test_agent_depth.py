"""What waits in queues, counted on a real broker as real Celery fills it; not known is never 0."""

import asyncio
import json
import time
import types
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from allocator_kit import until
from celery_scene import CeleryScene
from fake_rabbitmq import FakeRabbit
from fixtures_broker import BrokerServer
from leasehold.core import errors
from leasehold.core.node import model
from leasehold.nodeagent import broker_url, depth, watchers


@pytest.fixture
def scene(broker: BrokerServer, tmp_path: Path) -> Iterator[CeleryScene]:
    scene = CeleryScene(broker, tmp_path)
    yield scene
    scene.end()


@pytest.fixture
def probe(broker: BrokerServer) -> Iterator[depth.DepthProbe]:
    probe = depth.probe_of(broker.url)
    yield probe
    probe.close()


@pytest.fixture
async def rabbit() -> AsyncIterator[FakeRabbit]:
    async with FakeRabbit({"work": 7, "other": 2}) as rabbit:
        yield rabbit


async def test_an_empty_queue_is_known_to_be_empty(broker: BrokerServer, probe: depth.DepthProbe) -> None:
    assert await probe.depth(["work"]) == model.Depth(ready=0, unacknowledged=0, scheduled=0)


async def test_every_priority_is_counted_where_llen_of_the_name_shows_half(
    scene: CeleryScene, probe: depth.DepthProbe
) -> None:
    for priority in (0, 1, 2, 3, 6, 9):
        scene.submit("work", str(priority), priority=priority)
    scene.submit("work", "other", queue="other")

    assert scene.queued() == 3
    assert (await probe.depth(["work"])).ready == 6
    assert (await probe.depth(["work", "other"])).ready == 7


async def test_a_running_task_and_one_that_waits_for_its_time_are_told_apart(
    scene: CeleryScene, probe: depth.DepthProbe
) -> None:
    await scene.start()
    scene.submit("work", "later", countdown=3600)
    scene.submit("work", "a")
    await scene.until_count("started", "a")
    scene.submit("work", "b")

    assert await probe.depth(["work"]) == model.Depth(ready=1, unacknowledged=1, scheduled=1)
    assert await probe.depth(["other"]) == model.Depth(ready=0, unacknowledged=0, scheduled=0)


async def test_a_task_whose_time_has_come_is_not_scheduled_any_more(broker: BrokerServer) -> None:
    _put_unacked(broker, "1", "work", eta="2026-01-01T00:00:10+00:00")
    _put_unacked(broker, "2", "work", eta="nonsense")
    where = broker_url.parse(broker.url, setting="test")
    before = depth.RedisDepth(where, wall=lambda: 1767225600.0)
    after = depth.RedisDepth(where, wall=lambda: 1767225611.0)

    assert await before.depth(["work"]) == model.Depth(ready=0, unacknowledged=1, scheduled=1)
    assert await after.depth(["work"]) == model.Depth(ready=0, unacknowledged=2, scheduled=0)
    before.close()
    after.close()


async def test_messages_are_attributed_by_the_bindings_of_their_exchange(
    broker: BrokerServer, probe: depth.DepthProbe
) -> None:
    with broker.client() as client:
        client.sadd("_kombu.binding.media", "audio\x06\x16\x06\x16work", "video.*\x06\x16\x06\x16other")
    _put_unacked(broker, "1", "audio", exchange="media")
    _put_unacked(broker, "2", "video.short", exchange="media")
    _put_unacked(broker, "3", "work")

    assert (await probe.depth(["work"])).unacknowledged == 2
    assert (await probe.depth(["other"])).unacknowledged == 1


async def test_a_global_prefix_of_keys_is_honoured(broker: BrokerServer) -> None:
    with broker.client() as client:
        client.lpush("app1:work", "{}")
        client.lpush("app1:work\x06\x163", "{}")
        client.lpush("work", "{}", "{}", "{}")
    probe = depth.probe_of(broker.url, key_prefix="app1:")

    assert await probe.depth(["work"]) == model.Depth(ready=2, unacknowledged=0, scheduled=0)
    probe.close()


async def test_beyond_its_bound_it_says_at_least(broker: BrokerServer) -> None:
    for number in range(300):
        _put_unacked(broker, str(number), "work")
    probe = depth.RedisDepth(broker_url.parse(broker.url, setting="test"), unacked_max=100)

    found = await probe.depth(["work"])

    assert found.is_lower_bound
    assert found.unacknowledged is not None
    assert 100 <= found.unacknowledged < 300
    probe.close()


async def test_thousands_of_unacknowledged_messages_are_counted_quickly(
    broker: BrokerServer, probe: depth.DepthProbe
) -> None:
    body = "x" * 700
    with broker.client() as client:
        for number in range(2000):
            client.hset("unacked", str(number), _unacked("work", body=body))
    begun_at = time.monotonic()

    found = await probe.depth(["work"])

    assert (found.unacknowledged, found.is_lower_bound) == (2000, False)
    assert time.monotonic() - begun_at < 1.0


async def test_a_message_too_large_to_be_read_makes_the_count_a_lower_bound(
    broker: BrokerServer, probe: depth.DepthProbe
) -> None:
    _put_unacked(broker, "1", "work", body="x" * 3_000_000)
    _put_unacked(broker, "2", "work")

    assert await probe.depth(["work"]) == model.Depth(
        ready=0, unacknowledged=1, scheduled=0, is_lower_bound=True
    )


async def test_a_broker_that_is_away_is_not_known_and_known_again_when_it_is_back(tmp_path: Path) -> None:
    server = BrokerServer(tmp_path)
    server.start()
    await server.until_ready()
    probe = depth.probe_of(server.url)
    assert (await probe.depth(["work"])).ready == 0

    server.kill()
    away = await probe.depth(["work"])
    server.start()
    await server.until_ready()
    back = await probe.depth(["work"])
    probe.close()
    server.kill()

    assert (away.ready, away.unacknowledged, away.scheduled, away.backlog) == (None, None, None, None)
    assert away.error
    assert (back.ready, back.error) == (0, "")


async def test_a_broker_that_is_stuck_is_given_up_in_time(silent_port: int) -> None:
    where = broker_url.parse(f"redis://127.0.0.1:{silent_port}", setting="test")
    probe = depth.RedisDepth(where, timeout_seconds=0.2)

    found = await probe.depth(["work"])

    assert (found.ready, found.error) == (None, "the broker did not answer within 0.2 s")


async def test_an_answer_that_makes_no_sense_is_told_as_not_known() -> None:
    is_over = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            writer.write(b"+OK\r\n" * data.count(b"SELECT") + b":1\r\n" * data.count(b"LEN\r\n"))
            # A field that has no value.
            writer.write(b"*2\r\n$1\r\n0\r\n*1\r\n$1\r\nx\r\n" * data.count(b"HSCAN"))
        writer.close()
        await writer.wait_closed()
        is_over.set()

    server = await asyncio.start_server(answer, "127.0.0.1")
    async with server:
        probe = depth.probe_of(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0")
        told = await probe.depth(["work"])
        probe.close()
        await is_over.wait()

    assert told.ready is None
    assert "makes no sense" in told.error


class FakePool:
    """A pool whose broker answers as soon as it is let."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.has_depth = True
        self.may_answer = asyncio.Event()
        self.asked = 0

    async def ask_depth(self, _: object) -> model.Depth:
        self.asked += 1
        await self.may_answer.wait()
        return model.Depth(ready=self.asked)


async def test_a_silent_broker_delays_no_other_pool() -> None:
    silent, other = FakePool("silent"), FakePool("other")
    other.may_answer.set()
    told: list[tuple[str, int | None]] = []
    host: Any = types.SimpleNamespace(
        pools={"silent": silent, "other": other},
        config=types.SimpleNamespace(environment={}),
        told_depths=lambda depths: told.extend((name, each.ready) for name, each in depths.items()),
    )
    asking = asyncio.create_task(watchers.ask_depths(host, interval_seconds=0.01))
    await until(lambda: ("other", 3) in told, "the other is asked again and again")
    assert silent.asked == 1
    silent.may_answer.set()
    await until(lambda: ("silent", 1) in told, "the silent one has answered")
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)


async def test_a_wrong_type_under_the_name_of_a_queue_is_an_error_not_a_count(
    broker: BrokerServer, probe: depth.DepthProbe
) -> None:
    with broker.client() as client:
        client.set("work", "something else")

    found = await probe.depth(["work"])

    assert found.ready is None
    assert "WRONGTYPE" in found.error


async def test_rabbitmq_tells_what_is_ready_and_nothing_of_what_is_unacknowledged(rabbit: FakeRabbit) -> None:
    probe = depth.probe_of(rabbit.url)

    assert await probe.depth(["work"]) == model.Depth(ready=7, unacknowledged=None)
    assert await probe.depth(["work", "missing", "other"]) == model.Depth(ready=9, unacknowledged=None)
    probe.close()


async def test_rabbitmqs_management_api_tells_what_is_unacknowledged(rabbit: FakeRabbit) -> None:
    rabbit.unacknowledged = {"work": 3, "other": 1}
    probe = depth.probe_of(rabbit.url, management_url=rabbit.management_url)

    assert await probe.depth(["work", "other"]) == model.Depth(ready=9, unacknowledged=4)
    rabbit.is_management_away = True
    assert await probe.depth(["work", "other"]) == model.Depth(ready=9, unacknowledged=None)
    probe.close()


async def test_the_fake_rabbitmq_answers_a_client_that_others_wrote_in_the_same_way(rabbit: FakeRabbit) -> None:
    def ask() -> int:
        import amqp  # Celery's own client

        with amqp.Connection(f"127.0.0.1:{rabbit.port}", userid="guest", password="guest") as connection:
            return int(connection.channel().queue_declare("work", passive=True).message_count)

    assert await asyncio.to_thread(ask) == 7


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("kafka://host", "is no scheme of a broker known here"),
        ("no address", "a text without ://"),
        ("redis://host:99999/0", "the port is not a number"),
        ("redis://:secret@host:6379/nine", "is no number of a database"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused_without_its_password(url: str, told: str) -> None:
    with pytest.raises(errors.InvalidArgument, match="CELERY_BROKER_URL") as caught:
        depth.probe_of(url)

    assert told in str(caught.value)
    assert "secret" not in str(caught.value)


def _unacked(key: str, *, exchange: str = "", eta: str | None = None, body: str = "") -> str:
    message: dict[str, Any] = {"body": body, "headers": {"eta": eta}, "properties": {}}
    return json.dumps([message, exchange, key])


def _put_unacked(broker: BrokerServer, tag: str, key: str, **options: Any) -> None:
    with broker.client() as client:
        client.hset("unacked", tag, _unacked(key, **options))


async def test_the_worker_is_gone_and_its_task_still_counts(
    scene: CeleryScene, probe: depth.DepthProbe
) -> None:
    worker = await scene.start()
    scene.submit("work", "a")
    await scene.until_count("started", "a")
    worker.send("KILL")
    await worker.ended()
    await until(lambda: scene.unacknowledged() == 1, "the message is hidden")

    assert (await probe.depth(["work"])).backlog == 1
