"""The etcd adapter against real servers that are killed, frozen, cut off, wiped and compacted."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from leasehold import devstack
from leasehold.core import errors
from leasehold.etcd import adapter, clock, election, keeper, port, settings
from leasehold.etcd.port import Compare, KeyDeleted, KeyPut, Put, Reset

CALL_TIMEOUT_SECONDS = 1.0
SLACK_SECONDS = 2.0  # for a machine that does much else
IMPATIENT = settings.Settings(call_timeout_seconds=CALL_TIMEOUT_SECONDS)


class Proxy:
    """A TCP proxy on loopback whose connections can be cut, and refused until `heal`."""

    def __init__(self, target: str) -> None:
        host, _, port_ = target.rpartition(":")
        self._target = (host, int(port_))
        self._is_cut = False
        self._writers: set[asyncio.StreamWriter] = set()
        self._serving: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> "Proxy":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        await asyncio.gather(*self._serving)

    @property
    def endpoint(self) -> str:
        assert self._server is not None
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def cut(self) -> None:
        self._is_cut = True
        for writer in self._writers:
            writer.transport.abort()

    def heal(self) -> None:
        self._is_cut = False

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)
        if self._is_cut:
            writer.transport.abort()
            return
        up_reader, up_writer = await asyncio.open_connection(*self._target)
        mine = {writer, up_writer}
        self._writers |= mine
        try:
            await asyncio.gather(_pump(reader, up_writer), _pump(up_reader, writer))
        finally:
            self._writers -= mine


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.transport.abort()


async def eventually(condition: Callable[[], Awaitable[bool]], seconds: float = 20.0) -> None:
    """Polls until the condition holds; errors of an absent etcd count as no."""
    async with asyncio.timeout(seconds):
        while True:
            with contextlib.suppress(errors.Unavailable, errors.DeadlineExceeded):
                if await condition():
                    return
            await asyncio.sleep(0.02)


async def put_surely(etcd: port.EtcdPort, key: str, value: bytes) -> None:
    """Puts until etcd answers; each value is written once more only if the outcome was not known."""

    async def put() -> bool:
        record = await etcd.get(key)
        if record is None or record.value != value:
            await etcd.put(key, value)
        return True

    await eventually(put)


@pytest.fixture
async def etcd(own_etcd: devstack.EtcdServer) -> AsyncIterator[port.EtcdPort]:
    client = await adapter.connect([own_etcd.endpoint], settings=IMPATIENT)
    yield client
    await client.close()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[devstack.EtcdCluster]:
    with devstack.EtcdCluster(tmp_path / "cluster") as running:
        yield running


class Recorder:
    """Takes in a watch in the background."""

    def __init__(self, watch: AsyncGenerator[port.WatchEvent, None]) -> None:
        self.events: list[port.WatchEvent] = []
        self._watch = watch
        self._task = asyncio.create_task(self._record())
        self.error: errors.LeaseholdError | None = None

    async def _record(self) -> None:
        try:
            async with contextlib.aclosing(self._watch) as events:
                async for event in events:
                    self.events.append(event)
        except errors.LeaseholdError as error:
            self.error = error

    def values(self) -> list[int]:
        return [int(event.record.value) for event in self.events if isinstance(event, KeyPut)]

    async def until(self, condition: Callable[["Recorder"], bool]) -> None:
        async def holds() -> bool:
            if self._task.done():
                self._task.result()  # shows what ended it, if unforeseen
            return condition(self)

        await eventually(holds)

    async def __aenter__(self) -> "Recorder":
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])


# -- killed


async def test_a_watch_and_a_lease_outlive_a_sigkill_of_etcd_with_no_event_lost_or_repeated(
    own_etcd: devstack.EtcdServer, etcd: port.EtcdPort
) -> None:
    """etcd is SIGKILLed three times, each between two acknowledged writes; a writer writes 0..119 in order."""
    asked_at = time.monotonic()
    lease = await etcd.grant_lease(8)
    await etcd.put("/live", b"", lease_id=lease.lease_id)
    start = (await etcd.get_prefix("/seq/")).revision + 1
    async with (
        keeper.LeaseKeeper(etcd, lease, granted_at=asked_at) as kept,
        Recorder(etcd.watch_prefix("/seq/", start)) as recorder,
    ):
        for number in range(120):
            await put_surely(etcd, f"/seq/{number}", str(number).encode())
            if number % 40 == 20:
                await asyncio.to_thread(own_etcd.kill)
                await asyncio.to_thread(own_etcd.start)
        await recorder.until(lambda seen: len(seen.events) >= 120)
        assert recorder.values() == list(range(120))
        assert len(recorder.events) == 120
        assert not kept.lost.is_set()
        assert await etcd.get("/live") is not None


async def test_a_call_to_a_killed_etcd_was_not_applied_and_fails_in_time(
    own_etcd: devstack.EtcdServer, etcd: port.EtcdPort
) -> None:
    own_etcd.kill()
    for call in (etcd.get("/a"), etcd.put("/a", b"1"), etcd.txn([], [Put("/a", b"1")])):
        began = time.monotonic()
        with pytest.raises(errors.EtcdUnavailable) as failed:
            await call
        assert failed.value.metadata["outcome"] == "not_applied"
        assert time.monotonic() - began < CALL_TIMEOUT_SECONDS + SLACK_SECONDS


async def test_a_name_that_does_not_resolve_is_an_etcd_that_does_not_answer() -> None:
    with pytest.raises(errors.EtcdUnavailable) as failed:
        await adapter.connect(["etcd.invalid:2379"], settings=IMPATIENT)
    assert failed.value.metadata["outcome"] == "not_applied"


async def test_a_call_waits_for_etcd_to_come_back_within_its_timeout(own_etcd: devstack.EtcdServer) -> None:
    etcd = await adapter.connect([own_etcd.endpoint], settings=settings.Settings(call_timeout_seconds=20))
    own_etcd.kill()
    writing = asyncio.create_task(etcd.txn([], [Put("/a", b"1")]))
    reading = asyncio.create_task(etcd.get("/a"))
    await asyncio.to_thread(own_etcd.start)
    assert (await writing).succeeded
    await reading
    await etcd.close()


async def test_a_transaction_cut_off_by_a_kill_is_of_unknown_outcome(
    own_etcd: devstack.EtcdServer, etcd: port.EtcdPort
) -> None:
    await etcd.put("/a", b"1")
    own_etcd.freeze()
    writing = asyncio.create_task(etcd.txn([], [Put("/a", b"2")]))
    await asyncio.wait([writing], timeout=0.2)  # long enough to be sent, shorter than its timeout
    assert not writing.done()
    own_etcd.kill()
    with pytest.raises(errors.EtcdUnavailable) as failed:
        await writing
    assert failed.value.metadata["outcome"] == "unknown"


# -- frozen


async def test_a_frozen_etcd_fails_calls_within_their_timeout(
    own_etcd: devstack.EtcdServer, etcd: port.EtcdPort
) -> None:
    await etcd.put("/epoch", b"1")
    own_etcd.freeze()
    try:
        began = time.monotonic()
        with pytest.raises(errors.EtcdUnavailable) as failed:
            await etcd.txn([Compare.value("/epoch", b"1")], [Put("/a", b"1")])
        assert failed.value.metadata["outcome"] == "unknown"
        assert time.monotonic() - began < CALL_TIMEOUT_SECONDS + SLACK_SECONDS
        began = time.monotonic()
        with pytest.raises((errors.DeadlineExceeded, errors.EtcdUnavailable)):
            await etcd.get("/epoch")
        assert time.monotonic() - began < CALL_TIMEOUT_SECONDS + SLACK_SECONDS
    finally:
        own_etcd.thaw()

    async def answers() -> bool:
        return await etcd.get("/epoch") is not None

    await eventually(answers, 5)


async def test_a_lease_kept_on_a_frozen_etcd_is_reported_lost_when_its_ttl_has_passed(
    own_etcd: devstack.EtcdServer, etcd: port.EtcdPort
) -> None:
    asked_at = time.monotonic()
    lease = await etcd.grant_lease(2)
    async with keeper.LeaseKeeper(etcd, lease, granted_at=asked_at) as kept:
        own_etcd.freeze()
        try:
            await asyncio.wait_for(kept.lost.wait(), 2 * lease.ttl_seconds + SLACK_SECONDS)
            assert time.monotonic() - asked_at >= lease.ttl_seconds
            assert kept.reason == "no renewal succeeded within the TTL"
        finally:
            own_etcd.thaw()


async def test_an_idle_watch_leaves_a_frozen_connection_by_keepalive(own_etcd: devstack.EtcdServer) -> None:
    """The watch is the only call; once etcd is thawed it goes on where it was, over a new stream."""
    quick = settings.Settings(call_timeout_seconds=5, keepalive_seconds=1)
    etcd = await adapter.connect([own_etcd.endpoint], settings=quick)
    start = await etcd.put("/k", b"0") + 1
    async with Recorder(etcd.watch_prefix("/k", start)) as recorder:
        await etcd.put("/k", b"1")
        await recorder.until(lambda seen: seen.values() == [1])
        own_etcd.freeze()
        try:
            stream = next(iter(etcd._calls.current().watches))

            async def is_given_up() -> bool:
                return stream.done()

            await eventually(is_given_up, 10)
        finally:
            own_etcd.thaw()
        await put_surely(etcd, "/k", b"2")
        await recorder.until(lambda seen: seen.values() == [1, 2])
    await etcd.close()


# -- cut off, compacted


async def test_a_watch_resumes_after_a_cut(own_etcd: devstack.EtcdServer, etcd: port.EtcdPort) -> None:
    async with Proxy(own_etcd.endpoint) as proxy:
        behind = await adapter.connect([proxy.endpoint], settings=IMPATIENT)
        start = (await etcd.get_prefix("/k")).revision + 1
        async with Recorder(behind.watch_prefix("/k", start)) as recorder:
            await etcd.put("/k", b"1")
            await recorder.until(lambda seen: seen.values() == [1])
            proxy.cut()
            await etcd.put("/k", b"2")
            deleted = start + 2
            await etcd.delete("/k")
            await etcd.put("/k", b"3")
            proxy.heal()
            await recorder.until(lambda seen: len(seen.events) >= 4)
            assert recorder.values() == [1, 2, 3]
            assert recorder.events[2] == KeyDeleted("/k", deleted)
        await behind.close()


@pytest.mark.parametrize("keep_after", [0, 1], ids=["all changes gone", "one change left"])
async def test_a_compaction_during_a_cut_resets_the_watch(
    own_etcd: devstack.EtcdServer, etcd: port.EtcdPort, keep_after: int
) -> None:
    async with Proxy(own_etcd.endpoint) as proxy:
        behind = await adapter.connect([proxy.endpoint], settings=IMPATIENT)
        start = (await etcd.get_prefix("/k")).revision + 1
        async with Recorder(behind.watch_prefix("/k", start)) as recorder:
            await etcd.put("/k/1", b"1")
            await recorder.until(lambda seen: seen.values() == [1])
            proxy.cut()
            await etcd.delete("/k/1")
            await etcd.put("/k/2", b"2")
            newest = await etcd.put("/k/3", b"3")
            await etcd.compact(newest - keep_after)
            proxy.heal()
            await recorder.until(lambda seen: len(seen.events) >= 2)
            reset = recorder.events[1]
            assert isinstance(reset, Reset)
            assert [record.key for record in reset.listing.records] == ["/k/2", "/k/3"]
            await etcd.put("/k/4", b"4")
            await recorder.until(lambda seen: len(seen.events) >= 3)
            assert recorder.values() == [1, 4]
        await behind.close()


async def test_a_leader_cut_off_from_etcd_is_replaced_and_its_late_write_is_refused(
    own_etcd: devstack.EtcdServer, etcd: port.EtcdPort
) -> None:
    """Leader a is cut off at its proxy; b is elected; a's transaction under its epoch then changes nothing."""
    async with Proxy(own_etcd.endpoint) as proxy:
        behind = await adapter.connect([proxy.endpoint], settings=IMPATIENT)
        a = election.Election(behind, "/e", "a", "a:1", ttl_seconds=1)
        b = election.Election(etcd, "/e", "b", "b:1", ttl_seconds=1)
        async with a, b:
            first = await asyncio.wait_for(a.campaign(), 10)
            assert (await etcd.txn([], [Put("/epoch", str(first.revision).encode())])).succeeded
            waiting = asyncio.create_task(b.campaign())
            await b.observer.wait_until(lambda leader: leader is not None)
            proxy.cut()
            await asyncio.wait_for(a.lost.wait(), 1 + SLACK_SECONDS)
            second = await asyncio.wait_for(waiting, 10)
            await etcd.put("/epoch", str(second.revision).encode())
            proxy.heal()
            late = None

            async def is_answered() -> bool:
                nonlocal late
                late = await behind.txn(
                    [Compare.value("/epoch", str(first.revision).encode())], [Put("/mark", b"a")]
                )
                return True

            await eventually(is_answered)
            assert late is not None
            assert not late.succeeded
            assert second.revision > first.revision
        await behind.close()


# -- wiped


@pytest.mark.parametrize("is_token_kept", [False, True], ids=["another id", "the same id"])
async def test_a_wiped_etcd_is_told_apart(tmp_path: Path, is_token_kept: bool) -> None:
    token = (lambda: "kept") if is_token_kept else None
    with devstack.EtcdServer(tmp_path / "etcd", token=token) as server:
        etcd = await adapter.connect([server.endpoint], settings=IMPATIENT)
        before = await etcd.cluster_id()
        for number in range(10):
            await etcd.put("/k", str(number).encode())
        start = (await etcd.get_prefix("/k")).revision + 1
        async with Recorder(etcd.watch_prefix("/k", start)) as recorder:
            await etcd.put("/k", b"10")
            await recorder.until(lambda seen: seen.values() == [10])
            await asyncio.to_thread(server.wipe)
            await asyncio.to_thread(server.start)
            await recorder.until(lambda seen: seen.error is not None)
            assert isinstance(recorder.error, errors.ForeignEtcdCluster)
        with pytest.raises(errors.ForeignEtcdCluster):
            await etcd.get("/k")
        await etcd.close()
        fresh = await adapter.connect([server.endpoint], settings=IMPATIENT)
        assert (await fresh.cluster_id() == before) is is_token_kept
        await fresh.close()


async def test_a_wiped_etcd_that_has_caught_up_in_revisions_is_told_apart_by_its_id(
    own_etcd: devstack.EtcdServer, etcd: port.EtcdPort
) -> None:
    await etcd.put("/k", b"1")
    await asyncio.to_thread(own_etcd.wipe)
    await asyncio.to_thread(own_etcd.start)
    fresh = await adapter.connect([own_etcd.endpoint], settings=IMPATIENT)
    for number in range(10):
        await fresh.put("/k", str(number).encode())
    with pytest.raises(errors.ForeignEtcdCluster) as foreign:
        await etcd.get("/k")
    assert foreign.value.metadata["found"] == f"{await fresh.cluster_id():016x}"
    await fresh.close()


# -- several members


async def test_a_client_and_its_watch_go_over_to_another_member_when_theirs_freezes(
    cluster: devstack.EtcdCluster,
) -> None:
    """The member that all calls go to is SIGSTOPped; a read goes on within its timeout, the watch with it.

    No ping tells, so it is the unanswered call alone that moves the watch.
    """
    silent = settings.Settings(call_timeout_seconds=3, keepalive_seconds=600, ping_timeout_seconds=600)
    etcd = await adapter.connect(cluster.endpoints, settings=silent)
    start = await etcd.put("/k", b"0") + 1
    async with Recorder(etcd.watch_prefix("/k", start)) as recorder:
        await etcd.put("/k", b"1")
        await recorder.until(lambda seen: seen.values() == [1])
        cluster.members[0].freeze()
        try:
            began = time.monotonic()
            record = await etcd.get("/k")
            assert record is not None
            assert time.monotonic() - began < 3 + SLACK_SECONDS
            await put_surely(etcd, "/k", b"2")
            await recorder.until(lambda seen: seen.values() == [1, 2])
        finally:
            cluster.members[0].thaw()
    await etcd.close()


async def test_writes_go_on_when_each_member_in_turn_is_killed(cluster: devstack.EtcdCluster) -> None:
    etcd = await adapter.connect(cluster.endpoints, settings=settings.Settings(call_timeout_seconds=3))
    start = (await etcd.get_prefix("/seq/")).revision + 1
    async with Recorder(etcd.watch_prefix("/seq/", start)) as recorder:
        for number in range(30):
            if number % 10 == 5:
                await asyncio.to_thread(cluster.members[number // 10].kill)
            await put_surely(etcd, f"/seq/{number}", str(number).encode())
            if number % 10 == 9:
                await asyncio.to_thread(cluster.start)
        await recorder.until(lambda seen: len(seen.events) >= 30)
        assert recorder.values() == list(range(30))
    await etcd.close()


# -- size


async def test_a_listing_above_the_message_limit_is_read_in_smaller_pages(
    own_etcd: devstack.EtcdServer, etcd: port.EtcdPort
) -> None:
    ops: list[port.Op] = [Put(f"/big/{number:05d}", b"x" * 1000) for number in range(5000)]
    for chunk in port.chunks(ops, etcd.txn_ops_max):
        await etcd.txn([], chunk)
    narrow = settings.Settings(message_bytes_max=64 * 1024)
    small = await adapter.connect([own_etcd.endpoint], settings=narrow)
    listing = await small.get_prefix("/big/")
    assert [record.key for record in listing.records] == [op.key for op in ops]
    await small.close()


async def test_a_watch_reads_a_transaction_that_etcd_sends_in_fragments(
    own_etcd: devstack.EtcdServer,
) -> None:
    """20 MB in one catch-up answer: above the message limit unless it comes in pieces."""
    etcd = await adapter.connect([own_etcd.endpoint], settings=settings.Settings(call_timeout_seconds=10))
    start = (await etcd.get_prefix("/big/")).revision + 1
    for round_ in range(10):
        await etcd.txn([], [Put(f"/big/{number}", str(round_).encode() * 20_000) for number in range(100)])
    async with Recorder(etcd.watch_prefix("/big/", start)) as recorder:
        await recorder.until(lambda seen: len(seen.events) >= 1000)
        revisions = [event.record.mod_revision for event in recorder.events if isinstance(event, KeyPut)]
        assert revisions == sorted(revisions)
        assert len(recorder.events) == 1000
    await etcd.close()


async def test_a_system_clock_sleeps() -> None:
    began = clock.SystemClock().now()
    await clock.SystemClock().sleep(0.01)
    assert clock.SystemClock().now() - began >= 0.009
