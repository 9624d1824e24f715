"""`leasehold budget watch` against servers that end, freeze, and point elsewhere: scripted, on loopback."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest
from leasehold.api.budget.v1 import budget_service_pb2 as wire
from leasehold.api.budget.v1 import budget_service_pb2_grpc
from leasehold.cli import main
from leasehold.core import errors
from leasehold.rpc import errors as rpc_errors

#: Of --timeout. A server is quiet for longer than this between two states.
TIMEOUT_SECONDS = 0.5
QUIET_SECONDS = 1.2

Script = Callable[["Server", Any], Iterator[wire.WatchBudgetResponse]]


class Server(budget_service_pb2_grpc.BudgetServiceServicer):
    """Answers WatchBudget by a script; `calls` counts."""

    def __init__(self, script: Script) -> None:
        self.calls = 0
        self.ended = threading.Event()
        self._script = script

    def WatchBudget(self, request: wire.WatchBudgetRequest, context: Any) -> Iterator[wire.WatchBudgetResponse]:
        self.calls += 1
        return self._script(self, context)


@contextlib.contextmanager
def serving(script: Script) -> Iterator[str]:
    """A server on a free port; its address."""
    server = grpc.server(futures.ThreadPoolExecutor(4))
    servicer = Server(script)  # type: ignore[abstract]  # the other methods answer UNIMPLEMENTED
    budget_service_pb2_grpc.add_BudgetServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        servicer.ended.set()
        server.stop(grace=None).wait()


def state(holder: str) -> wire.WatchBudgetResponse:
    return wire.WatchBudgetResponse(holders=[wire.HolderView(holder=holder)])


def watch(addr: str, count: int) -> int:
    options = ["--addr", addr, "--count", str(count), "--timeout", str(TIMEOUT_SECONDS), "-o", "name"]
    return main.run(["budget", "watch", "llm-api", *options])


def test_a_quiet_budget_whose_leader_ends_is_watched_on(capsys: pytest.CaptureFixture[str]) -> None:
    def script(server: Server, context: Any) -> Iterator[wire.WatchBudgetResponse]:
        yield state(f"w{server.calls}")
        server.ended.wait(QUIET_SECONDS)
        context.abort(grpc.StatusCode.UNAVAILABLE, "going away")

    with serving(script) as addr:
        assert watch(addr, 2) == 0
    assert capsys.readouterr() == ("w1\nw2\n", "")


def test_a_server_that_does_not_lead_sends_the_watcher_on(capsys: pytest.CaptureFixture[str]) -> None:
    def leads(server: Server, context: Any) -> Iterator[wire.WatchBudgetResponse]:
        yield state("w1")

    with serving(leads) as leader:

        def follows(server: Server, context: Any) -> Iterator[wire.WatchBudgetResponse]:
            context.abort_with_status(rpc_errors.to_status(errors.NotLeader(leader)))
            yield state("never")

        with serving(follows) as follower:
            assert watch(follower, 1) == 0
    assert capsys.readouterr() == ("w1\n", "")


def test_a_server_that_never_answers_is_given_up_after_the_timeout(capsys: pytest.CaptureFixture[str]) -> None:
    def hangs(server: Server, context: Any) -> Iterator[wire.WatchBudgetResponse]:
        server.ended.wait()
        yield state("late")

    with serving(hangs) as addr:
        assert watch(addr, 1) == main.EXIT_UNREACHABLE
    out, err = capsys.readouterr()
    assert out == ""
    assert f"{addr} did not answer within 0.5 s" in err


def test_a_budget_that_is_deleted_meanwhile_ends_the_watch(capsys: pytest.CaptureFixture[str]) -> None:
    def deletes(server: Server, context: Any) -> Iterator[wire.WatchBudgetResponse]:
        yield state("w1")
        context.abort_with_status(rpc_errors.to_status(errors.NotFound("there is no budget named 'llm-api'")))

    with serving(deletes) as addr:
        assert watch(addr, 0) == main.EXIT_FAILED
    assert capsys.readouterr() == ("w1\n", "leasehold: there is no budget named 'llm-api'\n")
