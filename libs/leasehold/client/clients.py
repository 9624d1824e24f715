"""The entry: a connection to the allocators, from which budgets are taken."""

import asyncio
from collections.abc import Sequence
from concurrent import futures
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from leasehold.client import budgets, environment, runtime
from leasehold.client import engine as engines
from leasehold.client import jobs as job_faces
from leasehold.core import errors

if TYPE_CHECKING:
    from leasehold.rpc import tls

#: How long `close` waits for the allocators to have read what it says.
_CLOSE_SECONDS: Final = 2 * runtime.CLOSE_SECONDS


class _BaseClient:
    def __init__(
        self,
        addresses: str | Sequence[str] | None,
        worker_id: str | None,
        tls_files: "tls.TlsFiles | None",
    ) -> None:
        self._endpoint = runtime.Endpoint(environment.addresses(addresses), tls_files)
        self._worker_id = environment.worker_id(worker_id)
        self._worker_count = environment.worker_count()
        self._engines: dict[str, engines.Engine] = {}
        self._is_closed = False

    @property
    def addresses(self) -> tuple[str, ...]:
        """The allocators that are asked first; the leader may be another one."""
        return self._endpoint.addresses

    @property
    def worker_count(self) -> int | None:
        """``WORKER_COUNT``, for whoever defines a budget: its ``expected_workers``. None where it is not set.

        Workers do not need it: a budget's own definition decides its base shares.
        """
        return self._worker_count

    def _engine(self, name: str) -> engines.Engine:
        with runtime.PROCESS.lock:
            if self._is_closed:
                raise errors.FailedPrecondition("the client is closed")
            engine = self._engines.get(name)
            if engine is None:
                engine = runtime.PROCESS.engine(self._endpoint, name, self._worker_id)
                self._engines[name] = engine
            return engine

    def _give_up(self, jobs: job_faces.BaseJobs) -> list[futures.Future[None]]:
        with runtime.PROCESS.lock:
            self._is_closed = True
            given, self._engines = list(self._engines.values()), {}
        pending = [*(runtime.PROCESS.give_up(engine) for engine in given), jobs.leave()]
        return [future for future in pending if future is not None]


class Client(_BaseClient):
    """A connection for threads. Every method may be called from any of them."""

    def __init__(
        self,
        addresses: str | Sequence[str] | None,
        worker_id: str | None,
        tls_files: "tls.TlsFiles | None",
        timeout_seconds: float,
    ) -> None:
        super().__init__(addresses, worker_id, tls_files)
        #: Jobs, and allocations of CPUs and memory.
        self.jobs = job_faces.Jobs(self._endpoint, timeout_seconds=timeout_seconds)

    def budget(self, name: str) -> budgets.Budget:
        """This worker's part of the budget `name`. Raises `InvalidArgument` if that is no name.

        Whether there is such a budget is told by the first acquire.
        """
        return budgets.Budget(self._engine(name))

    def close(self) -> None:
        """Give the leases back, and fail who still waits. A second time does nothing."""
        futures.wait(self._give_up(self.jobs), _CLOSE_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncClient(_BaseClient):
    """A connection for asyncio. Its budgets may be used from several event loops."""

    def __init__(
        self,
        addresses: str | Sequence[str] | None,
        worker_id: str | None,
        tls_files: "tls.TlsFiles | None",
        timeout_seconds: float,
    ) -> None:
        super().__init__(addresses, worker_id, tls_files)
        #: Jobs, and allocations of CPUs and memory.
        self.jobs = job_faces.AsyncJobs(self._endpoint, timeout_seconds=timeout_seconds)

    def budget(self, name: str) -> budgets.AsyncBudget:
        """This worker's part of the budget `name`. Raises `InvalidArgument` if that is no name.

        Whether there is such a budget is told by the first acquire.
        """
        return budgets.AsyncBudget(self._engine(name))

    async def close(self) -> None:
        """Give the leases back, and fail who still waits. A second time does nothing."""
        pending = [asyncio.wrap_future(future) for future in self._give_up(self.jobs)]
        if pending:
            await asyncio.wait(pending, timeout=_CLOSE_SECONDS)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def connect(
    addresses: str | Sequence[str] | None = None,
    *,
    worker_id: str | None = None,
    tls_files: "tls.TlsFiles | None" = None,
    timeout_seconds: float = job_faces.TIMEOUT_SECONDS,
) -> AsyncClient:
    """A client for asyncio: ``async with client.connect() as leasehold: ...``.

    `addresses` are allocators, ``host:port`` (several in a list, or with commas between); default: of
    ``LEASEHOLD_ADDR``, else ``127.0.0.1:7400``. `worker_id` names this worker, uniquely among all; default: of
    ``WORKER_ID``, else ``worker_<pid>``. Clients of one process with the same of both share their leases.
    `timeout_seconds` bounds each call about jobs. Connects with the first use. Raises `InvalidArgument` for a
    malformed value.
    """
    return AsyncClient(addresses, worker_id, tls_files, timeout_seconds)


def connect_blocking(
    addresses: str | Sequence[str] | None = None,
    *,
    worker_id: str | None = None,
    tls_files: "tls.TlsFiles | None" = None,
    timeout_seconds: float = job_faces.TIMEOUT_SECONDS,
) -> Client:
    """A client for threads: ``with client.connect_blocking() as leasehold: ...``; see `connect`."""
    return Client(addresses, worker_id, tls_files, timeout_seconds)
