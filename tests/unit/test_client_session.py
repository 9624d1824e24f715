"""Following the leader and feeding the stream, on a transport that the test plays by hand."""

import asyncio
from collections.abc import Callable

import client_scene
import pytest
from fake_allocator import LIMITS, terms_of
from leasehold.api.budget.v1 import budget_service_pb2
from leasehold.client import gates
from leasehold.client import session as sessions
from leasehold.core import epoch as epochs
from leasehold.core import errors
from leasehold.core.budget import messages
from leasehold.core.budget.quantity import MICRO
from leasehold.rpc import lease_codec


class HandStream:
    """A stream whose other end is the test."""

    def __init__(self, address: str, log: list[str]) -> None:
        self.address = address
        self.sent: asyncio.Queue[messages.Report] = asyncio.Queue()
        self.releases: list[messages.Release] = []
        self.answers: asyncio.Queue[budget_service_pb2.HoldLeasesResponse | errors.LeaseholdError] = (
            asyncio.Queue()
        )
        self._log = log

    async def send(self, request: budget_service_pb2.HoldLeasesRequest) -> None:
        """See `link.Stream`."""
        for report in request.reports:
            self.sent.put_nowait(lease_codec.decode_report(report))
        self.releases += [lease_codec.decode_release(release) for release in request.releases]

    async def receive(self) -> budget_service_pb2.HoldLeasesResponse:
        """See `link.Stream`."""
        answer = await self.answers.get()
        if isinstance(answer, errors.LeaseholdError):
            raise answer
        return answer

    async def half_close(self) -> None:
        """See `link.Stream`."""
        self.answers.put_nowait(errors.Unavailable("ended"))

    async def close(self) -> None:
        """See `link.Stream`."""
        self._log.append(f"close {self.address}")

    async def answer(self) -> messages.Report:
        """Grant all of it to the next report."""
        report = await self.sent.get()
        grant = messages.Grant(
            budget=report.budget,
            holder=report.holder,
            incarnation=report.incarnation,
            lease_id=7,
            epoch=epochs.Epoch(1, 1),
            version=1,
            answered_sequence=report.sequence,
            ttl_seconds=10.0,
            refresh_seconds=2.0,
            amounts={name: units * MICRO for name, units in LIMITS.items()},
            terms=terms_of(),
        )
        self.answers.put_nowait(budget_service_pb2.HoldLeasesResponse(grants=[lease_codec.encode_grant(grant)]))
        return report


class HandLink:
    """Hands out streams, and tells the order in which they were opened and closed."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.opened: asyncio.Queue[HandStream] = asyncio.Queue()

    async def open(self, address: str) -> HandStream:
        """See `link.Link`."""
        self.log.append(f"open {address}")
        stream = HandStream(address, self.log)
        self.opened.put_nowait(stream)
        return stream

    async def close(self) -> None:
        """See `link.Link`."""


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Backoff takes no time; the pauses that it asked for."""
    pauses: list[float] = []
    really_sleep = asyncio.sleep

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        await really_sleep(0)

    monkeypatch.setattr("asyncio.sleep", sleep)
    return pauses


async def _run(
    addresses: list[str], play: "Callable[[HandLink, client_scene.Scene, sessions.Session], object]"
) -> HandLink:
    scene, link = client_scene.Scene(), HandLink()
    session = sessions.Session(addresses, link, now=scene.clock.now)
    scene.engine.poke = session.poke
    session.add(scene.engine)
    try:
        async with asyncio.timeout(10):
            result = play(link, scene, session)
            assert asyncio.iscoroutine(result)
            await result
    finally:
        await session.close(timeout_seconds=0.0)
    return link


async def test_it_goes_where_a_follower_points(no_pauses: list[float]) -> None:
    async def play(link: HandLink, scene: client_scene.Scene, session: sessions.Session) -> None:
        (await link.opened.get()).answers.put_nowait(errors.NotLeader("c:3"))
        leader = await link.opened.get()
        assert leader.address == "c:3"
        await leader.answer()

    link = await _run(["a:1", "b:2"], play)

    assert link.log[:3] == ["open a:1", "close a:1", "open c:3"]
    assert no_pauses == []


async def test_it_tries_the_others_at_once_when_its_leader_goes(no_pauses: list[float]) -> None:
    async def play(link: HandLink, scene: client_scene.Scene, session: sessions.Session) -> None:
        first = await link.opened.get()
        await first.answer()
        first.answers.put_nowait(errors.Unavailable("gone"))
        second = await link.opened.get()
        report = await second.answer()
        assert (second.address, report.lease_id) == ("b:2", 7)

    link = await _run(["a:1", "b:2"], play)

    assert link.log[:3] == ["open a:1", "close a:1", "open b:2"], "the old one is left before the new one hears"
    assert no_pauses == []


async def test_it_pauses_between_two_rounds_without_success(no_pauses: list[float]) -> None:
    async def play(link: HandLink, scene: client_scene.Scene, session: sessions.Session) -> None:
        for _ in range(6):
            (await link.opened.get()).answers.put_nowait(errors.Unavailable("away"))
        await (await link.opened.get()).answer()

    await _run(["a:1", "b:2"], play)

    assert len(no_pauses) == 3
    assert 0.05 <= no_pauses[0] <= 0.1 and 0.2 <= no_pauses[2] <= 0.4


async def test_allocators_that_name_each_other_are_not_asked_in_a_tight_circle(no_pauses: list[float]) -> None:
    async def play(link: HandLink, scene: client_scene.Scene, session: sessions.Session) -> None:
        for _ in range(12):
            stream = await link.opened.get()
            stream.answers.put_nowait(errors.NotLeader("b:2" if stream.address == "a:1" else "a:1"))

    await _run(["a:1", "b:2"], play)

    assert no_pauses


async def test_a_stream_on_which_reports_are_not_answered_is_dropped(no_pauses: list[float]) -> None:
    async def play(link: HandLink, scene: client_scene.Scene, session: sessions.Session) -> None:
        silent = await link.opened.get()
        await silent.sent.get()
        scene.clock.advance(3.1)
        session.poke()
        other = await link.opened.get()
        assert other.address == "b:2"

    await _run(["a:1", "b:2"], play)


async def test_grants_of_an_unreadable_form_are_passed_over(no_pauses: list[float]) -> None:
    async def play(link: HandLink, scene: client_scene.Scene, session: sessions.Session) -> None:
        stream = await link.opened.get()
        stream.answers.put_nowait(
            budget_service_pb2.HoldLeasesResponse(grants=[{"amounts": {"rpm_limit": -1.0}}])  # type: ignore[list-item]
        )
        gate = gates.LoopGate()
        scene.engine.watch(gate)
        await stream.answer()
        await gate.wait()
        assert scene.engine.is_allocated()

    link = await _run(["a:1"], play)

    assert link.log == ["open a:1", "close a:1"]


async def test_closing_gives_the_lease_back(no_pauses: list[float]) -> None:
    async def play(link: HandLink, scene: client_scene.Scene, session: sessions.Session) -> None:
        stream = await link.opened.get()
        gate = gates.LoopGate()
        scene.engine.watch(gate)
        await stream.answer()
        await gate.wait()
        assert scene.engine.is_allocated()
        await session.remove(scene.engine, timeout_seconds=1.0)
        assert [release.lease_id for release in stream.releases] == [7]

    await _run(["a:1"], play)


async def test_work_that_fails_unforeseen_is_begun_anew(
    no_pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def play(link: HandLink, scene: client_scene.Scene, session: sessions.Session) -> None:
        turn, failures = scene.engine.turn, [ZeroDivisionError()]

        def fails_once() -> tuple[messages.Report | None, float]:
            if failures:
                raise failures.pop()
            return turn()

        monkeypatch.setattr(scene.engine, "turn", fails_once)
        await (await link.opened.get()).answer()

    await _run(["a:1"], play)
