"""The control plane under the demo: a running allocator, or an own one with etcd and Postgres."""

import contextlib
import os
import pathlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from leasehold import devstack
from leasehold.api.budget.v1 import budget_service_pb2, budget_service_pb2_grpc
from leasehold.core import errors
from leasehold.core.budget import model, quantity
from leasehold.demo import plan
from leasehold.devstack import ports
from leasehold.rpc import budget_codec

READY_SECONDS = 30.0
CALL_SECONDS = 5.0
RETRY_SECONDS = 0.1


@contextlib.contextmanager
def allocator(address: str | None, data_dir: pathlib.Path, announce: Callable[[str], None]) -> Iterator[str]:
    """The address of an allocator that serves: the given one, or one that lives as long as the block.

    Raises `Unavailable` if it does not come up.
    """
    if address is not None:
        yield address
        return
    with devstack.Stack(data_dir, announce=announce) as stack:
        yield start_allocator(stack, announce)


def start_allocator(stack: devstack.Stack, announce: Callable[[str], None]) -> str:
    """Start an allocator on a free port; its address, once it serves. Raises `Unavailable` if it does not."""
    child, address = spawn_allocator(stack, "allocator")
    wait_for_allocator(child, address, announce)
    return address


def spawn_allocator(stack: devstack.Stack, name: str) -> tuple[devstack.Child, str]:
    """Start an allocator on a free port; its process and its address."""
    address = f"{ports.HOST}:{ports.free_port()}"
    child = stack.spawn(
        name,
        [sys.executable, "-m", "leasehold.allocator", "--listen", address],
        env={**os.environ, **stack.variables},
    )
    return child, address


def wait_for_allocator(child: devstack.Child, address: str, announce: Callable[[str], None]) -> None:
    """Wait until it serves. Raises `Unavailable` if it does not."""
    began_seconds = time.monotonic()
    with grpc.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        child.wait_until(
            lambda: _is_serving(health),
            timeout_seconds=READY_SECONDS,
            cancel=threading.Event(),
            port=int(address.rpartition(":")[2]),
        )
    announce(f"the allocator serves on {address}, {time.monotonic() - began_seconds:.1f} s")


def _is_serving(health: health_pb2_grpc.HealthStub) -> bool:
    try:
        answer = health.Check(health_pb2.HealthCheckRequest(), timeout=1.0)
    except grpc.RpcError:
        return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


@contextlib.contextmanager
def budget(address: str, name: str, wanted: plan.Plan) -> Iterator[None]:
    """Defines the demo's budget for the time of the block, and deletes it afterwards.

    Raises `Unavailable` if no leader takes it within 30 s, `InvalidArgument` if it is refused.
    """
    message = budget_codec.encode_budget(_spec(name, wanted))
    with grpc.insecure_channel(address) as channel:
        service = budget_service_pb2_grpc.BudgetServiceStub(channel)
        _until_taken(
            lambda: service.PutBudget(budget_service_pb2.PutBudgetRequest(budget=message), timeout=CALL_SECONDS)
        )
        try:
            yield
        finally:
            # Nothing rests on it: the name is this run's alone.
            with contextlib.suppress(grpc.RpcError):
                service.DeleteBudget(budget_service_pb2.DeleteBudgetRequest(name=name), timeout=CALL_SECONDS)


def _until_taken(call: Callable[[], object]) -> None:
    deadline_seconds = time.monotonic() + READY_SECONDS
    while True:
        try:
            call()
        except grpc.RpcError as error:
            code, details = error.code(), error.details()
            if code == grpc.StatusCode.INVALID_ARGUMENT:
                raise errors.InvalidArgument(f"the budget was refused: {details}", field="budget") from error
            if time.monotonic() >= deadline_seconds:
                raise errors.Unavailable(f"the allocator does not take the budget: {details}") from error
            time.sleep(RETRY_SECONDS)
        else:
            return


def _spec(name: str, wanted: plan.Plan) -> model.BudgetSpec:
    limits = wanted.limits
    amounts = {
        "max_concurrent_requests": limits.concurrency,
        "rpm_limit": limits.requests,
        "tpm_limit": limits.tokens,
    }
    return model.BudgetSpec(
        name=name,
        dimensions=tuple(
            model.Dimension(
                name=dimension,
                kind=model.STANDARD_KINDS[dimension],
                limit=amount * quantity.MICRO,
                window_seconds=limits.window_seconds,
            )
            for dimension, amount in amounts.items()
        ),
        expected_workers=len(plan.WORKERS),
        activity_timeout_seconds=wanted.activity_timeout_seconds,
        window_seconds=limits.window_seconds,
        arrival_jitter_seconds=wanted.arrival_jitter_seconds,
        max_call_seconds=wanted.max_call_seconds,
        # The demo's provider frees the slot of a broken connection.
        orphan_seconds=0.0,
    )
