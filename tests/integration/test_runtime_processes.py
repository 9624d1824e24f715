"""Identities and deaths of real processes."""

import asyncio
import dataclasses
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from leasehold.core import errors
from leasehold.runtime import identity
from leasehold.runtime.process_watch import ProcessWatch

Child = subprocess.Popen[bytes]


class Children:
    def __init__(self) -> None:
        self.started: list[Child] = []

    def start(self, *command: str) -> Child:
        child = subprocess.Popen(command or ("sleep", "600"), stdin=subprocess.DEVNULL)
        self.started.append(child)
        return child


@pytest.fixture
def children() -> Iterator[Children]:
    made = Children()
    yield made
    for child in made.started:
        child.kill()
        child.wait()


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_living_process_is_opened_and_its_death_is_seen(children: Children) -> None:
    child = children.start()
    descriptor = identity.open_pidfd(identity.identify(child.pid))
    assert descriptor is not None
    try:
        assert not identity.is_dead(descriptor)
        child.kill()
        child.wait()
        assert identity.is_dead(descriptor)
    finally:
        os.close(descriptor)


def test_this_process_knows_itself_and_a_forked_child_is_another(children: Children) -> None:
    here = identity.current()
    assert here == identity.identify(os.getpid())
    assert identity.is_local(here)
    script = "from leasehold.runtime import identity; print(identity.current())"
    told = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=30
    )
    assert str(here).partition(" (")[2].partition(", started")[0] in told.stdout  # the same boot and namespace
    assert str(here) not in told.stdout


def test_a_name_with_spaces_and_parentheses_does_not_shift_the_start_time(
    children: Children, tmp_path: Path
) -> None:
    program = tmp_path / "a ) b (c) 1 2"
    program.symlink_to("/bin/sleep")
    before = identity.start_time_ticks(children.start().pid)
    odd = identity.start_time_ticks(children.start(str(program), "600").pid)
    after = identity.start_time_ticks(children.start().pid)
    assert before is not None
    assert odd is not None
    assert after is not None
    assert before <= odd <= after


def test_a_reaped_process_is_certainly_dead(children: Children) -> None:
    child = children.start()
    who = identity.identify(child.pid)
    child.kill()
    child.wait()
    assert identity.open_pidfd(who) is None
    with pytest.raises(errors.NotFound):
        identity.identify(child.pid)


def test_a_process_that_nobody_has_reaped_yet_is_dead_all_the_same(children: Children) -> None:
    child = children.start()
    who = identity.identify(child.pid)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    descriptor = identity.open_pidfd(who)
    assert descriptor is not None
    assert identity.is_dead(descriptor)
    os.close(descriptor)


def test_a_pid_that_now_belongs_to_another_process_is_told_apart(children: Children) -> None:
    now = identity.identify(children.start().pid)
    former = dataclasses.replace(now, start_time_ticks=now.start_time_ticks - 1)
    before = open_descriptors()
    assert identity.open_pidfd(former) is None
    assert open_descriptors() == before


@pytest.mark.parametrize("change", [{"boot_id": "0" * 36}, {"pid_namespace": 1}])
def test_nothing_is_said_of_another_host_or_container(children: Children, change: dict[str, object]) -> None:
    here = identity.identify(children.start().pid)
    elsewhere = dataclasses.replace(here, **change)  # type: ignore[arg-type]
    assert not identity.is_local(elsewhere)
    with pytest.raises(errors.FailedPrecondition):
        identity.open_pidfd(elsewhere)


def test_a_process_that_proc_hides_is_not_taken_for_dead(
    children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    who = identity.identify(children.start().pid)
    monkeypatch.setattr(identity, "start_time_ticks", lambda pid: None)  # as with hidepid and another user
    before = open_descriptors()
    with pytest.raises(errors.FailedPrecondition, match="cannot be checked"):
        identity.open_pidfd(who)
    assert open_descriptors() == before


@pytest.mark.parametrize("left", [0, 1])
def test_running_out_of_descriptors_is_told_as_such(children: Children, left: int) -> None:
    who = identity.identify(children.start().pid)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + left, hard))
    try:
        refusal: BaseException | None = None
        try:
            identity.open_pidfd(who)
        except Exception as error:
            refusal = error
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert isinstance(refusal, errors.ResourceExhausted)


@pytest.mark.parametrize("pid", [0, -1])
def test_a_pid_is_positive(pid: int) -> None:
    with pytest.raises(errors.InvalidArgument):
        identity.ProcessIdentity("boot", 1, pid, 1)


async def test_a_kill_is_told_within_milliseconds(children: Children) -> None:
    watch = ProcessWatch()
    delays_ms = []
    for _ in range(20):
        child = children.start()
        died: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        watch.watch(identity.identify(child.pid), lambda who, died=died: died.set_result(time.perf_counter()))  # type: ignore[misc]
        killed_at = time.perf_counter()
        child.send_signal(signal.SIGKILL)
        delays_ms.append((await asyncio.wait_for(died, 10) - killed_at) * 1000)
    delays_ms.sort()
    assert delays_ms[10] < 50, delays_ms
    assert len(watch) == 0


async def test_one_descriptor_serves_all_who_watch_a_process(children: Children) -> None:
    watch = ProcessWatch()
    child = children.start()
    who = identity.identify(child.pid)
    told: list[int] = []
    all_told = asyncio.Event()
    before = open_descriptors()
    for number in range(5):
        watch.watch(who, lambda _, number=number: told.append(number))  # type: ignore[misc]
    watch.watch(who, lambda _: all_told.set())
    assert open_descriptors() == before + 1
    assert len(watch) == 1
    child.kill()
    await asyncio.wait_for(all_told.wait(), 10)
    assert told == [0, 1, 2, 3, 4]
    assert open_descriptors() == before


async def test_the_last_one_to_cancel_gives_the_descriptor_back(children: Children) -> None:
    watch = ProcessWatch()
    who = identity.identify(children.start().pid)
    before = open_descriptors()
    told: list[str] = []
    first = watch.watch(who, lambda _: told.append("first"))
    second = watch.watch(who, lambda _: told.append("second"))
    first()
    first()
    assert len(watch) == 1
    second()
    assert len(watch) == 0
    assert open_descriptors() == before
    watch.watch(who, lambda _: None)
    second()  # belongs to the former watch, not to this one
    assert len(watch) == 1
    watch.close()
    assert open_descriptors() == before


async def test_a_callback_may_cancel_another_one_of_the_same_process(children: Children) -> None:
    watch = ProcessWatch()
    child = children.start()
    who = identity.identify(child.pid)
    told: list[str] = []
    done = asyncio.Event()
    watch.watch(who, lambda _: cancel_second())
    cancel_second = watch.watch(who, lambda _: told.append("second"))
    watch.watch(who, lambda _: done.set())
    child.kill()
    await asyncio.wait_for(done.wait(), 10)
    assert told == []


async def test_a_callback_that_fails_keeps_none_of_the_others_from_being_told(children: Children) -> None:
    watch = ProcessWatch()
    child = children.start()
    done = asyncio.Event()
    who = identity.identify(child.pid)
    watch.watch(who, lambda _: [][0])
    watch.watch(who, lambda _: done.set())
    child.kill()
    await asyncio.wait_for(done.wait(), 10)


async def test_a_process_that_is_dead_already_is_told_soon_and_can_be_cancelled(children: Children) -> None:
    watch = ProcessWatch()
    child = children.start()
    who = identity.identify(child.pid)
    child.kill()
    child.wait()
    told: list[str] = []
    done = asyncio.Event()
    watch.watch(who, lambda _: told.append("cancelled"))()
    watch.watch(who, lambda _: done.set())
    assert not done.is_set()  # never from inside `watch` itself
    await asyncio.wait_for(done.wait(), 10)
    assert told == []


async def test_what_cannot_be_certified_is_not_watched(children: Children) -> None:
    watch = ProcessWatch()
    elsewhere = dataclasses.replace(identity.identify(children.start().pid), boot_id="another")
    with pytest.raises(errors.FailedPrecondition):
        watch.watch(elsewhere, lambda _: None)
    assert len(watch) == 0
