"""The client over real gRPC: cut streams, lost replies, leaders that change, crowds that wait."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from fake_allocator import CALLS, LIMITS, REQUESTS, SLOTS, TOKENS, FakeAllocator, terms_of
from leasehold import client
from leasehold.core import epoch as epochs
from leasehold.core import errors
from leasehold.core.budget import messages


@pytest.fixture
def allocator() -> Iterator[FakeAllocator]:
    """One that grants everything to everybody."""
    with FakeAllocator() as made:
        yield made


@pytest.fixture
def leasehold(allocator: FakeAllocator) -> Iterator[client.Client]:
    """A client of it, for threads."""
    with client.connect_blocking(allocator.address, worker_id="w") as made:
        yield made


def _until(is_so: Callable[[], bool], timeout_seconds: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not is_so():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def test_three_lines_are_enough(allocator: FakeAllocator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEASEHOLD_ADDR", allocator.address)
    monkeypatch.setenv("WORKER_ID", "from-the-environment")

    with client.connect_blocking() as leasehold, leasehold.budget("llm-api").acquire(tokens=10) as permit:
        permit.settle(tokens=5)

    assert {report.holder for report in allocator.reports} == {"from-the-environment"}
    assert [release.holder for release in allocator.releases] == ["from-the-environment"]


def test_a_report_carries_the_identity_of_the_process_once_a_connection(
    allocator: FakeAllocator, leasehold: client.Client
) -> None:
    leasehold.budget("llm-api").wait_for_allocation(5.0)
    leasehold.budget("llm-api").declare_demand({TOKENS: 100})
    allocator.wait_for(lambda: len(allocator.reports) >= 2)

    assert [report.process is not None for report in allocator.reports[:2]] == [True, False]


def test_an_unknown_budget_fails_promptly(leasehold: client.Client) -> None:
    begun = time.monotonic()
    with pytest.raises(errors.NotFound):
        leasehold.budget("nope").acquire(timeout_seconds=30).__enter__()
    with pytest.raises(errors.NotFound):
        leasehold.budget("nope").wait_for_allocation(30)
    assert time.monotonic() - begun < 3.0


def test_a_budget_that_appears_is_found(allocator: FakeAllocator, leasehold: client.Client) -> None:
    budget = leasehold.budget("later")
    with pytest.raises(errors.NotFound):
        budget.acquire(tokens=1, timeout_seconds=5).__enter__()
    allocator.budgets.add("later")

    with budget.acquire(tokens=1, timeout_seconds=5):
        pass


def test_an_acquire_waits_for_an_allocator_that_is_away() -> None:
    with FakeAllocator() as allocator:
        allocator.stop()
        with client.connect_blocking(allocator.address) as leasehold:
            budget = leasehold.budget("llm-api")
            with pytest.raises(errors.DeadlineExceeded, match="no allocator answers"):
                budget.acquire(tokens=1, timeout_seconds=0.3).__enter__()
            timer = threading.Timer(0.3, allocator.restart)
            timer.start()
            with budget.acquire(tokens=1, timeout_seconds=10):
                pass
            timer.join()


def test_a_cut_stream_is_opened_anew_and_the_lease_goes_on(
    allocator: FakeAllocator, leasehold: client.Client
) -> None:
    budget = leasehold.budget("llm-api")
    budget.wait_for_allocation(5.0)
    lease = allocator.holding("w")
    assert lease is not None

    allocator.cut()
    with budget.acquire(tokens=1, timeout_seconds=0.05):
        pass
    allocator.wait_for(lambda: allocator.streams == 2 and lease.stream is not None)

    assert allocator.reports[-1].lease_id == lease.lease_id


def test_a_lease_whose_replies_are_lost_expires_and_is_won_back() -> None:
    with (
        FakeAllocator(ttl_seconds=0.6, refresh_seconds=0.2) as allocator,
        client.connect_blocking(allocator.address, worker_id="w") as leasehold,
    ):
        budget = leasehold.budget("llm-api")
        budget.wait_for_allocation(5.0)
        allocator.is_silent = True
        _until(lambda: budget.allocation.state is client.AllocationState.EXPIRED)
        assert budget.try_acquire(tokens=1) is None
        allocator.is_silent = False

        with budget.acquire(tokens=1, timeout_seconds=5):
            pass

        assert any(report.is_rejoin for report in allocator.reports)


def test_a_silent_leader_is_left_for_another_before_the_lease_is_lost() -> None:
    with (
        FakeAllocator(ttl_seconds=2.0, refresh_seconds=0.2) as silent,
        FakeAllocator(ttl_seconds=2.0, refresh_seconds=0.2, epoch=epochs.Epoch(1, 2)) as other,
        client.connect_blocking([silent.address, other.address], worker_id="w") as leasehold,
    ):
        budget = leasehold.budget("llm-api")
        budget.wait_for_allocation(5.0)
        begun = time.monotonic()
        silent.is_silent = True
        other.wait_for(lambda: bool(other.reports))

        assert time.monotonic() - begun < 2.0
        assert other.reports[0].holdings is not None


def test_the_client_follows_the_leader_to_an_address_that_it_was_not_told() -> None:
    with FakeAllocator() as leader, FakeAllocator() as follower:
        follower.leader_address = leader.address
        with client.connect_blocking(follower.address, worker_id="w") as leasehold:
            begun = time.monotonic()
            with leasehold.budget("llm-api").acquire(tokens=1, timeout_seconds=5):
                pass
            assert time.monotonic() - begun < 2.0
        assert not follower.reports and leader.reports


def test_a_leader_that_steps_down_is_left_and_its_successor_gets_the_whole_truth() -> None:
    with (
        FakeAllocator() as first,
        FakeAllocator(epoch=epochs.Epoch(1, 2)) as second,
        client.connect_blocking([first.address, second.address], worker_id="w") as leasehold,
    ):
        budget = leasehold.budget("llm-api")
        with budget.acquire(tokens=100, timeout_seconds=5):
            first.leader_address = second.address
            second.holdings.update(first.holdings)
            first.cut()
            second.wait_for(lambda: bool(second.reports))
        report = second.reports[0]
        assert report.holdings is not None
        assert report.holdings.held[CALLS] == LIMITS[CALLS] * 1_000_000
        assert sum(sum(part.amounts) for part in report.holdings.cooling if part.dimension == TOKENS) > 0


def test_a_newer_incarnation_stops_the_older_for_good(
    allocator: FakeAllocator, leasehold: client.Client
) -> None:
    budget = leasehold.budget("llm-api")
    budget.wait_for_allocation(5.0)

    allocator.end(messages.LeaseEnd.SUPERSEDED)

    _until(lambda: budget.allocation.state is client.AllocationState.ENDED)
    with pytest.raises(errors.Superseded):
        budget.acquire(tokens=1).__enter__()


def test_pushed_shares_reach_the_callback_in_order(allocator: FakeAllocator, leasehold: client.Client) -> None:
    budget = leasehold.budget("llm-api")
    seen: list[float] = []
    budget.set_allocation_callback(lambda allocation: seen.append(allocation.amounts[REQUESTS]))
    budget.wait_for_allocation(5.0)
    for requests in (400, 266, 200):
        allocator.push({**LIMITS, REQUESTS: requests})

    _until(lambda: len(seen) == 4)
    assert seen == [800.0, 400.0, 266.0, 200.0]
    allocator.wait_for(lambda: allocator.holding("w").acknowledged == 4)  # type: ignore[union-attr]


async def test_a_thousand_tasks_are_admitted_in_the_order_in_which_they_asked(allocator: FakeAllocator) -> None:
    big = {CALLS: 1, REQUESTS: 1_000_000, TOKENS: 1_000_000_000}
    allocator.terms, allocator.amounts = terms_of(big), dict(big)
    order: list[int] = []

    async with client.connect(allocator.address) as leasehold:
        budget = leasehold.budget("llm-api")
        await budget.wait_for_allocation(5.0)

        async def call(number: int) -> None:
            async with budget.acquire(tokens=1, timeout_seconds=60):
                order.append(number)
                await asyncio.sleep(0)

        await asyncio.gather(*(call(number) for number in range(1_000)))

    assert order == list(range(1_000))


async def test_a_storm_of_cancellations_loses_no_unit(allocator: FakeAllocator) -> None:
    small = {CALLS: 3, REQUESTS: 1_000_000, TOKENS: 1_000_000_000}
    allocator.terms, allocator.amounts = terms_of(small), dict(small)
    running = 0

    async with client.connect(allocator.address) as leasehold:
        budget = leasehold.budget("llm-api")
        await budget.wait_for_allocation(5.0)

        async def call() -> None:
            nonlocal running
            async with budget.acquire(tokens=1):
                running += 1
                assert running <= 3
                try:
                    await asyncio.sleep(0.001)
                finally:
                    running -= 1

        for round_number in range(10):
            tasks = [asyncio.create_task(call()) for _ in range(60)]
            await asyncio.sleep(0.002)
            for index, task in enumerate(tasks):
                if (index + round_number) % 3:
                    task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        permits = [budget.try_acquire(tokens=1) for _ in range(4)]
        assert [permit is not None for permit in permits] == [True, True, True, False]
        for permit in permits[:3]:
            assert permit is not None
            permit.release()


def test_threads_and_tasks_share_one_lease_and_its_limit(allocator: FakeAllocator) -> None:
    small = {CALLS: 4, REQUESTS: 1_000_000, TOKENS: 1_000_000_000}
    allocator.terms, allocator.amounts = terms_of(small), dict(small)
    lock, running, highest, done = threading.Lock(), 0, 0, 0

    def change(by: int) -> None:
        nonlocal running, highest, done
        with lock:
            running += by
            highest = max(highest, running)
            done += by > 0

    def work(budget: client.Budget) -> None:
        for _ in range(50):
            with budget.acquire(tokens=2, timeout_seconds=30) as permit:
                change(1)
                permit.settle(tokens=1)
                change(-1)

    async def run() -> None:
        async with client.connect(allocator.address, worker_id="w") as leasehold:
            budget = leasehold.budget("llm-api")

            async def task() -> None:
                for _ in range(50):
                    async with budget.acquire(tokens=2, timeout_seconds=30) as permit:
                        change(1)
                        await asyncio.sleep(0)
                        permit.settle(tokens=1)
                        change(-1)

            await asyncio.gather(*(task() for _ in range(4)))

    with client.connect_blocking(allocator.address, worker_id="w") as leasehold:
        threads = [threading.Thread(target=work, args=(leasehold.budget("llm-api"),)) for _ in range(4)]
        threads.append(threading.Thread(target=lambda: asyncio.run(run())))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)

    assert (done, running) == (400, 0)
    assert highest <= 4
    assert len({report.incarnation for report in allocator.reports}) == 1
    assert len(allocator.releases) == 1


def test_renewals_go_on_while_the_users_event_loop_is_blocked() -> None:
    with FakeAllocator(ttl_seconds=0.6, refresh_seconds=0.1) as allocator:

        async def run() -> None:
            async with client.connect(allocator.address) as leasehold:
                budget = leasehold.budget("llm-api")
                await budget.wait_for_allocation(5.0)
                before = len(allocator.reports)
                # The user's fault, on purpose: the loop stands still for several TTLs.
                allocator.wait_for(lambda: len(allocator.reports) >= before + 15)
                assert budget.try_acquire(tokens=1) is not None

        asyncio.run(run())


def test_an_executor_follows_the_pushed_width(allocator: FakeAllocator, leasehold: client.Client) -> None:
    budget = leasehold.budget("llm-api")
    budget.wait_for_allocation(5.0)
    allocator.push({**LIMITS, SLOTS: 1})
    with budget.executor() as executor:
        _until(lambda: executor.width == 1)
        started, go_on = threading.Semaphore(0), threading.Event()

        def task() -> bool:
            started.release()
            return go_on.wait(10.0)

        futures = [executor.submit(task) for _ in range(3)]
        assert started.acquire(timeout=5.0)
        assert not started.acquire(blocking=False)
        allocator.push({**LIMITS, SLOTS: 3})
        assert started.acquire(timeout=5.0) and started.acquire(timeout=5.0)
        go_on.set()
        assert all(future.result(5.0) for future in futures)


def test_a_shrink_is_acknowledged_when_the_calls_above_it_have_ended(
    allocator: FakeAllocator, leasehold: client.Client
) -> None:
    budget = leasehold.budget("llm-api")
    budget.wait_for_allocation(5.0)
    permits = [budget.try_acquire(tokens=1) for _ in range(3)]
    allocator.push({**LIMITS, CALLS: 1})

    def told() -> int:
        holdings = allocator.reports[-1].holdings
        return holdings.held.get(CALLS, 0) // 1_000_000 if holdings else -1

    allocator.wait_for(lambda: told() == 3)
    for permit in permits[:2]:
        assert permit is not None
        permit.release()
    allocator.wait_for(lambda: told() == 1, 1.0)
    assert permits[2] is not None
    permits[2].release()
