"""One worker on one budget: who is admitted, who waits, who is woken. Time is an input; nothing sleeps."""

import asyncio
import threading

import client_scene
import pytest
from fake_allocator import CALLS, LIMITS, REQUESTS, SLOTS, TOKENS, terms_of
from leasehold import client
from leasehold.client import engine as engines
from leasehold.client import gates
from leasehold.core import errors
from leasehold.core.budget import messages, model
from leasehold.core.budget.quantity import MICRO


@pytest.fixture
def scene() -> client_scene.Scene:
    """A worker that owns all of it and is known as active."""
    made = client_scene.Scene()
    made.join()
    made.renew()
    return made


class CountingGate:
    """A gate that only notes that it was opened."""

    def __init__(self) -> None:
        self.opened = 0

    def open(self) -> bool:
        """See `gates.Gate`."""
        self.opened += 1
        return True


def _submit(scene: client_scene.Scene, **arguments: object) -> tuple[engines.Ticket, CountingGate]:
    gate = CountingGate()
    return scene.engine.submit(engines.Request(**arguments), gate), gate  # type: ignore[arg-type]


def test_a_permit_reserves_in_every_dimension_and_gives_back_at_exit(scene: client_scene.Scene) -> None:
    stocks = scene.limiter.stocks
    with scene.budget.acquire(tokens=100) as permit:
        scene.limiter.fold(scene.now)
        assert stocks[CALLS].in_use == MICRO
        assert stocks[TOKENS].free == (40_000 - 100) * MICRO
        permit.settle(tokens=60)

    assert stocks[CALLS].in_use == 0
    assert stocks[TOKENS].free == (40_000 - 60) * MICRO
    assert stocks[REQUESTS].free == 799 * MICRO


def test_a_refusal_takes_nothing_in_any_dimension(scene: client_scene.Scene) -> None:
    scene.grant({CALLS: 40, REQUESTS: 800, TOKENS: 50, SLOTS: 40}, answered_sequence=0)
    scene.report()

    assert scene.budget.try_acquire(tokens=51) is None

    free = {name: stock.free // MICRO for name, stock in scene.limiter.stocks.items()}
    assert free == {CALLS: 40, REQUESTS: 800, TOKENS: 50, SLOTS: 40}


def test_a_refund_returns_every_unit(scene: client_scene.Scene) -> None:
    with scene.budget.acquire(requests=2, tokens=100) as permit:
        permit.refund()

    assert {name: stock.free // MICRO for name, stock in scene.limiter.stocks.items()} == dict(LIMITS)


def test_settling_twice_keeps_the_last_word(scene: client_scene.Scene) -> None:
    with scene.budget.acquire(tokens=100) as permit:
        permit.settle(tokens=10)
        permit.settle(tokens=30)

    scene.limiter.fold(scene.now)
    assert scene.limiter.stocks[TOKENS].free == (40_000 - 30) * MICRO


def test_settling_after_the_end_is_refused_and_changes_nothing(scene: client_scene.Scene) -> None:
    with scene.budget.acquire(tokens=100) as permit:
        pass
    for act in (lambda: permit.settle(tokens=1), permit.refund, permit.__enter__):
        with pytest.raises(errors.FailedPrecondition):
            act()

    scene.limiter.fold(scene.now)
    assert scene.limiter.stocks[TOKENS].free == (40_000 - 100) * MICRO


def test_releasing_twice_gives_back_once(scene: client_scene.Scene) -> None:
    permit = scene.budget.try_acquire(tokens=100)
    assert permit is not None
    with permit:
        pass
    permit.release()
    permit.release()

    scene.limiter.fold(scene.now)
    assert scene.limiter.stocks[CALLS].in_use == 0


def test_settling_above_the_reserve_is_debt_and_told_as_overdraft(scene: client_scene.Scene) -> None:
    with scene.budget.acquire(tokens=100) as permit:
        permit.settle(tokens=150)

    scene.advance(3.0)
    report = scene.report()
    assert report is not None and report.holdings is not None
    assert report.holdings.overdraft_total == {TOKENS: 50 * MICRO}
    assert scene.limiter.stocks[TOKENS].free == (40_000 - 150) * MICRO


def test_a_body_that_raises_counts_as_used(scene: client_scene.Scene) -> None:
    with pytest.raises(ZeroDivisionError), scene.budget.acquire(tokens=100):
        raise ZeroDivisionError

    scene.limiter.fold(scene.now)
    assert scene.limiter.stocks[CALLS].in_use == 0
    assert scene.limiter.stocks[TOKENS].free == (40_000 - 100) * MICRO


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"tokens": -1}, "tokens"),
        ({"tokens": float("nan")}, "tokens"),
        ({"tokens": "many"}, "tokens"),
        ({"tokens": 1, "requests": True}, "requests"),
        ({"tokens": 1, "costs": {"images": 1}}, "images"),
        ({"tokens": 40_001}, TOKENS),
        ({}, "tokens"),
        ({"tokens": 1, "timeout_seconds": -1}, "timeout_seconds"),
    ],
)
def test_a_wrong_cost_is_refused_by_the_name_of_its_field(
    scene: client_scene.Scene, arguments: dict[str, object], field: str
) -> None:
    with pytest.raises(errors.InvalidArgument) as raised:
        scene.budget.acquire(**arguments).__enter__()  # type: ignore[arg-type]

    assert raised.value.field == field
    assert {name: stock.free // MICRO for name, stock in scene.limiter.stocks.items()} == dict(LIMITS)


def test_tokens_left_out_are_the_budgets_bound() -> None:
    scene = client_scene.Scene()
    scene.join(max_tokens_per_request=300 * MICRO)
    scene.renew()

    with scene.budget.acquire():
        scene.limiter.fold(scene.now)
        assert scene.limiter.stocks[TOKENS].free == (40_000 - 300) * MICRO


def test_waiting_acquires_are_admitted_in_order_as_units_come_back(scene: client_scene.Scene) -> None:
    scene.grant({**LIMITS, CALLS: 1}, answered_sequence=0)
    running = scene.budget.try_acquire(tokens=1)
    assert running is not None
    tickets = [_submit(scene, tokens=1) for _ in range(3)]
    assert [ticket.is_admitted for ticket, _ in tickets] == [False] * 3

    running.release()

    assert [ticket.is_admitted for ticket, _ in tickets] == [True, False, False]
    assert [gate.opened for _, gate in tickets] == [1, 0, 0]
    assert scene.engine.claim(tickets[0][0])


def test_nobody_overtakes_who_waits(scene: client_scene.Scene) -> None:
    scene.grant({**LIMITS, TOKENS: 500}, answered_sequence=0)
    large, _ = _submit(scene, tokens=501)
    small, _ = _submit(scene, tokens=1)

    assert not large.is_admitted and not small.is_admitted
    assert scene.budget.try_acquire(tokens=1) is None


def test_one_who_gives_up_lets_the_next_in(scene: client_scene.Scene) -> None:
    scene.grant({**LIMITS, TOKENS: 500}, answered_sequence=0)
    large, _ = _submit(scene, tokens=501)
    small, gate = _submit(scene, tokens=1)

    scene.engine.abandon(large)

    assert small.is_admitted and gate.opened == 1


def test_one_who_gives_up_when_just_admitted_gives_back(scene: client_scene.Scene) -> None:
    scene.grant({**LIMITS, CALLS: 1}, answered_sequence=0)
    running = scene.budget.try_acquire(tokens=1)
    assert running is not None
    ticket, _ = _submit(scene, tokens=100)
    running.release()
    assert ticket.is_admitted

    scene.engine.abandon(ticket)

    scene.limiter.fold(scene.now)
    assert scene.limiter.stocks[CALLS].in_use == 0
    assert scene.limiter.stocks[TOKENS].free == (40_000 - 1) * MICRO


def test_one_who_wakes_after_the_lease_ran_out_is_not_admitted(scene: client_scene.Scene) -> None:
    scene.grant({**LIMITS, CALLS: 1}, answered_sequence=0)
    running = scene.budget.try_acquire(tokens=1)
    assert running is not None
    ticket, _ = _submit(scene, tokens=100)
    running.release()
    scene.advance(11.0)

    assert not scene.engine.claim(ticket)

    assert scene.limiter.stocks[CALLS].in_use == 0
    assert not ticket.is_admitted and scene.limiter.waiters


def test_one_who_wakes_late_is_charged_from_then_on(scene: client_scene.Scene) -> None:
    scene.grant({**LIMITS, CALLS: 1}, answered_sequence=0)
    running = scene.budget.try_acquire(tokens=1)
    assert running is not None
    ticket, _ = _submit(scene, tokens=100)
    running.release()
    scene.advance(5.0)
    scene.renew()
    scene.advance(1.0)

    assert scene.engine.claim(ticket)

    cooling = {amount: seconds for seconds, amount in scene.limiter.stocks[TOKENS].cooling(scene.now)}
    assert cooling[100 * MICRO] >= 60.9


def test_a_waiter_whose_loop_is_gone_gives_back(scene: client_scene.Scene) -> None:
    async def submit() -> engines.Ticket:
        return scene.engine.submit(engines.Request(tokens=1), gates.LoopGate())

    scene.grant({**LIMITS, CALLS: 1}, answered_sequence=0)
    running = scene.budget.try_acquire(tokens=1)
    assert running is not None
    asyncio.run(submit())
    running.release()

    scene.limiter.fold(scene.now)
    assert scene.limiter.stocks[CALLS].in_use == 0


def test_who_asks_before_the_first_grant_is_served_in_order_by_it() -> None:
    scene = client_scene.Scene()
    tickets = [_submit(scene, tokens=tokens) for tokens in (10, 50_000, 20)]
    scene.engine.connected(1)
    report = scene.report()
    assert report is not None and report.is_active, "an acquire waits"

    scene.grant(terms=terms_of())

    assert [ticket.is_admitted for ticket, _ in tickets] == [True, False, True]
    with pytest.raises(errors.CostAboveLimit):
        scene.engine.claim(tickets[1][0])


def test_a_budget_that_is_not_there_fails_who_waits_at_once() -> None:
    scene = client_scene.Scene()
    ticket, gate = _submit(scene, tokens=10)
    scene.engine.connected(1)
    report = scene.report()
    assert report is not None

    refusal = messages.Refusal(
        budget="llm-api",
        holder="w",
        incarnation=report.incarnation,
        sequence=report.sequence,
        reason="NOT_FOUND",
        message="there is no budget llm-api",
    )
    scene.engine.refused(1, refusal)

    assert gate.opened == 1
    with pytest.raises(errors.NotFound):
        scene.engine.claim(ticket)
    with pytest.raises(errors.NotFound):
        scene.budget.try_acquire(tokens=1)


def test_a_superseded_worker_stops_for_good(scene: client_scene.Scene) -> None:
    scene.grant({**LIMITS, CALLS: 0}, answered_sequence=0)
    ticket, gate = _submit(scene, tokens=10)

    scene.grant(end=messages.LeaseEnd.SUPERSEDED, answered_sequence=0)

    assert gate.opened == 1
    with pytest.raises(errors.Superseded):
        scene.engine.claim(ticket)
    with pytest.raises(errors.Superseded):
        scene.budget.acquire(tokens=1).__enter__()
    assert scene.report() is None, "it never rejoins by itself"


def test_a_budget_deleted_and_made_anew_is_joined_again(scene: client_scene.Scene) -> None:
    scene.grant(end=messages.LeaseEnd.BUDGET_DELETED, answered_sequence=0)
    ticket, _ = _submit(scene, tokens=10)
    scene.lease_id += 1
    report = scene.report()
    assert report is not None and report.lease_id == 0 and not report.is_rejoin

    scene.grant(terms=terms_of())

    assert ticket.is_admitted and scene.engine.claim(ticket)


def test_calls_in_flight_go_on_when_the_lease_is_lost(scene: client_scene.Scene) -> None:
    with scene.budget.acquire(tokens=100) as permit:
        scene.advance(11.0)
        scene.report()
        assert scene.engine.allocation().state is client.AllocationState.EXPIRED
        assert scene.budget.try_acquire(tokens=1) is None
        permit.settle(tokens=40)

    assert scene.limiter.stocks[CALLS].in_use == 0
    assert scene.limiter.held()[TOKENS] <= 100 * MICRO


def test_changed_terms_price_the_queue_anew(scene: client_scene.Scene) -> None:
    scene.grant({**LIMITS, CALLS: 0}, answered_sequence=0)
    keeps, _ = _submit(scene, tokens=100)
    fails, gate = _submit(scene, tokens=30_000)
    limits = {"images": 10, CALLS: 40, REQUESTS: 800, TOKENS: 20_000}

    scene.grant(limits, terms=terms_of(limits), answered_sequence=0)

    assert keeps.is_admitted and gate.opened == 1
    with pytest.raises(errors.CostAboveLimit):
        scene.engine.claim(fails)


def test_a_call_from_before_changed_terms_ends_against_its_own_dimensions(scene: client_scene.Scene) -> None:
    with scene.budget.acquire(tokens=100):
        limits = {"images": 10, CALLS: 40, REQUESTS: 800, TOKENS: 40_000}
        scene.grant(limits, terms=terms_of(limits, window_seconds=30.0), answered_sequence=0)

    assert scene.limiter.stocks[CALLS].in_use == 0
    assert scene.limiter.stocks["images"].free == 10 * MICRO
    assert scene.limiter.stocks[TOKENS].held == 40_000 * MICRO
    scene.limiter.audit()


def test_charging_at_completion_cools_from_the_end_of_the_call() -> None:
    scene = client_scene.Scene()
    scene.join(charged_at=model.ChargedAt.COMPLETION)
    scene.renew()
    with scene.budget.acquire(tokens=100) as permit:
        assert not client_scene.is_short(permit)
        scene.advance(5.0)
        permit.settle(tokens=70)

    cooling = [(amount, seconds) for seconds, amount in scene.limiter.stocks[TOKENS].cooling(scene.now)]
    assert [amount for amount, _ in cooling] == [70 * MICRO]
    assert cooling[0][1] >= 60.9


def test_the_remaining_time_of_a_call_counts_down_from_admission(scene: client_scene.Scene) -> None:
    with scene.budget.acquire(tokens=1) as permit:
        scene.advance(5.0)
        assert permit.remaining_seconds == pytest.approx(595.0)


async def test_an_async_body_is_cancelled_at_the_deadline_of_its_call() -> None:
    scene = client_scene.Scene()
    scene.join(max_call_seconds=0.0)
    scene.renew()

    with pytest.raises(errors.DeadlineExceeded, match="max_call_seconds"):
        async with scene.async_budget.acquire(tokens=1):
            await asyncio.Event().wait()

    task = asyncio.current_task()
    assert task is not None and not task.cancelling()
    scene.limiter.fold(scene.now)
    assert scene.limiter.stocks[CALLS].in_use == 0


async def test_a_cancellation_from_outside_stays_one(scene: client_scene.Scene) -> None:
    entered = asyncio.Event()

    async def call() -> None:
        async with scene.async_budget.acquire(tokens=1):
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(call())
    await entered.wait()
    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task
    scene.limiter.fold(scene.now)
    assert scene.limiter.stocks[CALLS].in_use == 0


async def test_a_task_cancelled_while_it_waits_takes_nothing(scene: client_scene.Scene) -> None:
    scene.grant({**LIMITS, CALLS: 0}, answered_sequence=0)

    async def call() -> None:
        async with scene.async_budget.acquire(tokens=1):
            raise AssertionError

    tasks = [asyncio.create_task(call()) for _ in range(10)]
    await asyncio.sleep(0)
    assert len(scene.limiter.waiters) == 10
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

    assert not scene.limiter.waiters
    assert scene.limiter.stocks[TOKENS].free == 40_000 * MICRO


async def test_an_acquire_whose_time_is_up_leaves_the_queue(scene: client_scene.Scene) -> None:
    scene.grant({**LIMITS, CALLS: 0}, answered_sequence=0)

    with pytest.raises(errors.DeadlineExceeded, match="share"):
        await scene.async_budget.acquire(tokens=1, timeout_seconds=0).__aenter__()

    assert not scene.limiter.waiters


def test_closing_fails_who_waits_and_gives_the_lease_back(scene: client_scene.Scene) -> None:
    scene.grant({**LIMITS, CALLS: 0}, answered_sequence=0)
    ticket, gate = _submit(scene, tokens=10)

    release = scene.engine.close()

    assert release is not None and release.lease_id == 7
    assert gate.opened == 1
    with pytest.raises(errors.FailedPrecondition):
        scene.engine.claim(ticket)
    with pytest.raises(errors.FailedPrecondition):
        scene.budget.try_acquire(tokens=1)
    assert scene.engine.close() is None


def test_a_callback_is_told_each_change_in_order_and_its_failure_does_no_harm(
    scene: client_scene.Scene,
) -> None:
    seen: list[float] = []
    is_done = threading.Event()

    def callback(allocation: client.Allocation) -> None:
        seen.append(allocation.amounts[REQUESTS])
        if len(seen) == 3:
            is_done.set()
        raise ValueError("the user's own")

    scene.budget.set_allocation_callback(callback)
    for requests in (400, 200):
        scene.grant({**LIMITS, REQUESTS: requests}, answered_sequence=0)

    assert is_done.wait(5.0)
    assert seen == [800.0, 400.0, 200.0]


async def test_a_coroutine_callback_runs_on_the_loop_one_at_a_time(scene: client_scene.Scene) -> None:
    seen: list[tuple[str, float]] = []
    is_done = asyncio.Event()

    async def callback(allocation: client.Allocation) -> None:
        seen.append(("begin", allocation.amounts[REQUESTS]))
        await asyncio.sleep(0)
        seen.append(("end", allocation.amounts[REQUESTS]))
        if len(seen) == 4:
            is_done.set()

    scene.async_budget.set_allocation_callback(callback)
    scene.grant({**LIMITS, REQUESTS: 400}, answered_sequence=0)

    await asyncio.wait_for(is_done.wait(), 5.0)
    assert seen == [("begin", 800.0), ("end", 800.0), ("begin", 400.0), ("end", 400.0)]


def test_an_unknown_dimension_in_demand_or_throttle_is_refused(scene: client_scene.Scene) -> None:
    with pytest.raises(errors.InvalidArgument):
        scene.budget.declare_demand({"images": 1})
    with pytest.raises(errors.InvalidArgument):
        scene.budget.report_throttled(1.0, dimension="images")
    with pytest.raises(errors.InvalidArgument):
        scene.budget.report_throttled(-1.0)
    with pytest.raises(errors.InvalidArgument):
        scene.budget.declare_demand({TOKENS: float("nan")})


def test_a_429_is_told_at_once(scene: client_scene.Scene) -> None:
    scene.budget.report_throttled(2.0, dimension=TOKENS)

    report = scene.report()
    assert report is not None and report.throttles == (messages.Throttle(TOKENS, 2.0),)


def test_a_cost_above_the_credit_is_told_once_until_it_is_answered(scene: client_scene.Scene) -> None:
    scene.engine.update_activity(is_active=True, current_load=0.0, active_tasks=0)
    _submit(scene, tokens=20_000)  # more than pacing lets through without credit

    assert scene.report() is not None
    assert scene.report() is None, "told, and not answered yet"


def test_a_forked_child_begins_fenced_though_a_thread_of_the_parent_held_the_lock(
    scene: client_scene.Scene,
) -> None:
    inherited = scene.budget.try_acquire(tokens=1)
    assert inherited is not None
    incarnation, parents = scene.engine.holder.incarnation, scene.limiter
    scene.engine.lock.acquire()

    scene.engine.begin_anew("w-2", None)

    assert scene.budget.try_acquire(tokens=1) is None
    assert (scene.engine.name, scene.engine.holder.incarnation == incarnation) == ("w-2", False)
    inherited.release()
    assert scene.limiter is not parents and not scene.limiter.stocks


def test_an_executor_runs_in_order_as_wide_as_its_slots(scene: client_scene.Scene) -> None:
    scene.grant({**LIMITS, SLOTS: 2}, answered_sequence=0)
    order: list[int] = []
    started, go_on = [threading.Event() for _ in range(4)], threading.Event()

    def task(number: int) -> int:
        order.append(number)
        started[number].set()
        assert go_on.wait(5.0)
        return number

    with scene.budget.executor() as executor:
        futures = [executor.submit(task, number) for number in range(4)]
        assert started[0].wait(5.0) and started[1].wait(5.0)
        assert (executor.width, executor.queued) == (2, 2)
        assert sorted(order) == [0, 1]
        scene.grant({**LIMITS, SLOTS: 3}, answered_sequence=0)
        assert started[2].wait(5.0)
        scene.grant({**LIMITS, SLOTS: 1}, answered_sequence=0)
        go_on.set()
        assert [future.result(5.0) for future in futures] == [0, 1, 2, 3]

    assert sorted(order[:2]) == [0, 1] and order[2:] == [2, 3]
    assert scene.limiter.stocks[SLOTS].in_use == 0


def test_waiting_tasks_are_activity_and_do_not_stand_in_the_way_of_requests(scene: client_scene.Scene) -> None:
    scene.grant({**LIMITS, SLOTS: 0}, answered_sequence=0)
    executor = scene.budget.executor()
    future = executor.submit(int)

    report = scene.report()
    assert report is not None and report.is_active and report.waiting_cost == {SLOTS: MICRO}
    assert scene.budget.try_acquire(tokens=1) is not None
    executor.shutdown(wait=False, cancel_futures=True)
    assert future.cancelled()


def test_an_executor_of_a_dimension_that_is_not_there_says_so(scene: client_scene.Scene) -> None:
    executor = scene.budget.executor(dimension="seats")

    with pytest.raises(errors.InvalidArgument):
        executor.submit(int)
