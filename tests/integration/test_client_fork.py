"""Fork: the child never spends the parent's units and gets its own, whatever was live in the parent.

Each case is a program of its own, because a test process with gRPC servers in it is no place to fork.
"""

import subprocess
import sys
import textwrap

import pytest
from fake_allocator import FakeAllocator

_PRELUDE = """
import multiprocessing, os, sys, threading, time
from leasehold import client

leasehold = client.connect_blocking(sys.argv[1], worker_id="w")
budget = leasehold.budget("llm-api")

def use():
    with budget.acquire(tokens=10, timeout_seconds=15):
        pass

def wait_for(pid):
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return "hung"
"""


def _run(allocator: FakeAllocator, program: str) -> str:
    finished = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", _PRELUDE + textwrap.dedent(program), allocator.address],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def _incarnations(allocator: FakeAllocator) -> dict[str, int]:
    found: dict[str, set[str]] = {}
    for report in allocator.reports:
        found.setdefault(report.holder.split("-")[0] + "-*" * ("-" in report.holder), set()).add(
            report.incarnation
        )
    return {name: len(incarnations) for name, incarnations in found.items()}


@pytest.mark.parametrize("how_it_ends", ["os._exit(7)", "sys.exit(7)"])
def test_a_child_starts_fenced_and_joins_by_itself(how_it_ends: str) -> None:
    with FakeAllocator() as allocator:
        _run(
            allocator,
            f"""
            use()
            pid = os.fork()
            if pid == 0:
                assert budget.try_acquire(tokens=1) is None, "the parent's lease is not the child's"
                assert budget.worker_id == f"w-{{os.getpid()}}"
                use()
                leasehold.close()
                {how_it_ends}
            assert wait_for(pid) == 7
            use()
            leasehold.close()
            """,
        )

    assert _incarnations(allocator) == {"w": 1, "w-*": 1}
    assert sorted(len(release.holder) > 1 for release in allocator.releases) == [False, True]


def test_a_child_of_a_parent_that_never_connected_speaks_for_itself() -> None:
    with FakeAllocator() as allocator:
        _run(
            allocator,
            """
            pid = os.fork()
            if pid == 0:
                assert "grpc" not in sys.modules
                use()
                assert "grpc" in sys.modules, "no relay is needed"
                leasehold.close()
                os._exit(7)
            assert wait_for(pid) == 7
            leasehold.close()
            """,
        )

    assert _incarnations(allocator) == {"w-*": 1}


def test_a_child_does_not_need_a_lock_that_a_thread_of_the_parent_holds() -> None:
    with FakeAllocator() as allocator:
        _run(
            allocator,
            """
            use()
            is_held = threading.Event()
            def hold():
                with budget._engine.lock:
                    is_held.set()
                    time.sleep(0.5)
            threading.Thread(target=hold, daemon=True).start()
            is_held.wait()
            pid = os.fork()
            if pid == 0:
                use()
                os._exit(7)
            assert wait_for(pid) == 7
            use()
            leasehold.close()
            """,
        )


def test_a_fork_in_the_middle_of_a_call_leaves_the_call_to_the_parent() -> None:
    with FakeAllocator() as allocator:
        _run(
            allocator,
            """
            with budget.acquire(tokens=10, timeout_seconds=15) as permit:
                pid = os.fork()
                if pid:
                    assert wait_for(pid) == 7
            if pid == 0:
                use()
                os._exit(7)
            assert budget._engine.limiter.calls_in_use() == 0
            leasehold.close()
            """,
        )


def test_processes_of_multiprocessing_lease_side_by_side_while_the_parent_goes_on() -> None:
    with FakeAllocator() as allocator:
        _run(
            allocator,
            """
            use()
            context = multiprocessing.get_context("fork")
            def work():
                for _ in range(20):
                    use()
            children = [context.Process(target=work) for _ in range(3)]
            for child in children:
                child.start()
            for _ in range(20):
                use()
            for child in children:
                child.join(30)
            assert [child.exitcode for child in children] == [0, 0, 0]
            leasehold.close()
            """,
        )

    assert _incarnations(allocator) == {"w": 1, "w-*": 3}
    assert len(allocator.releases) == 4, "each gives its lease back when it ends"


def test_a_grandchild_leases_too() -> None:
    with FakeAllocator() as allocator:
        _run(
            allocator,
            """
            use()
            pid = os.fork()
            if pid == 0:
                use()
                grandchild = os.fork()
                if grandchild == 0:
                    assert budget.worker_id == f"w-{os.getpid()}"
                    use()
                    os._exit(7)
                os._exit(wait_for(grandchild))
            assert wait_for(pid) == 7
            leasehold.close()
            """,
        )

    assert _incarnations(allocator) == {"w": 1, "w-*": 2}


def test_a_relay_ends_with_its_owner() -> None:
    with FakeAllocator() as allocator:
        _run(
            allocator,
            """
            import pathlib
            def relays(pid):
                children = pathlib.Path(f"/proc/{pid}/task/{pid}/children")
                found = []
                for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
                    found += (task / "children").read_text().split()
                return [int(each) for each in found]
            use()
            reader, writer = os.pipe()
            pid = os.fork()
            if pid == 0:
                use()
                os.write(writer, " ".join(map(str, relays(os.getpid()))).encode())
                time.sleep(60)
                os._exit(1)
            found = [int(each) for each in os.read(reader, 1000).split()]
            assert len(found) == 1
            pidfd = os.pidfd_open(found[0])
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            import select
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            assert poll.poll(10_000), "the relay outlived its owner"
            leasehold.close()
            """,
        )
