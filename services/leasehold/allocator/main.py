"""Wiring: an allocator's parts, started and stopped in order."""

import asyncio
import functools
import gc
import random
from collections.abc import Mapping
from typing import Any

from leasehold.allocator import (
    budget_file,
    config,
    gauges,
    job_gauges,
    job_servicer,
    leadership,
    node_servicer,
    records,
    roles_file,
    servicer,
)
from leasehold.api.budget.v1 import budget_service_pb2, budget_service_pb2_grpc
from leasehold.api.job.v1 import job_service_pb2, job_service_pb2_grpc
from leasehold.api.node.v1 import node_service_pb2, node_service_pb2_grpc
from leasehold.core import errors, server_versions
from leasehold.etcd import adapter, election
from leasehold.etcd import port as etcd_port
from leasehold.etcd import settings as etcd_settings
from leasehold.observe import logs, metrics
from leasehold.postgres import job_port, job_store, port, store
from leasehold.rpc import access, metrics_service, options
from leasehold.rpc import server as servers
from leasehold.runtime import roles_yaml, tasks

HOUSEKEEPING_SECONDS = 600.0
CONNECT_RETRY_SECONDS = 0.5
CONNECT_WAIT_SECONDS = 60.0
#: The collector looks at what is new once there is so much of it; most of it is gone with its call anyway.
GARBAGE_OBJECTS = 10_000

_BUDGETS = budget_service_pb2.DESCRIPTOR.services_by_name["BudgetService"]
_JOBS = job_service_pb2.DESCRIPTOR.services_by_name["JobService"]
_NODES = node_service_pb2.DESCRIPTOR.services_by_name["NodeService"]

_log = logs.get_logger(__name__)


async def serve(settings: config.Settings) -> None:
    """Run an allocator until SIGTERM or SIGINT. Raises core errors for what the user must mend."""
    settings.check()
    if settings.budgets_file is not None:
        # A file that is wrong at the start is told at once; later the last good one stays in force.
        await asyncio.to_thread(budget_file.read, settings.budgets_file)
    async with (
        store.PostgresStore(settings.dsn()) as durable,
        job_store.PostgresJobStore(settings.dsn()) as ledger,
    ):
        await _Allocator(settings, durable, ledger).serve()


class _Allocator:
    """One replica: it serves from the start, as a follower, and stands for election once etcd answers."""

    def __init__(self, settings: config.Settings, durable: port.Store, ledger: job_port.JobStore) -> None:
        self._settings = settings
        self._store = durable
        self._keys = records.Keys(settings.etcd_prefix.rstrip("/"))
        registry = metrics.Registry()
        self._leader = leadership.Leadership(
            durable,
            self._keys,
            job_store=ledger,
            job_metrics=job_gauges.FlushMetrics(registry),
            candidate_id=settings.candidate_id,
            accept_new_etcd=settings.accept_new_etcd,
        )
        roles_path = settings.roles_file
        self._guard = None if roles_path is None else access.Guard(roles_yaml.read(roles_path))
        self._server = servers.Server(
            [settings.listen],
            tls_files=settings.tls_files,
            # A holder that was starved of its processor for a second is not gone: its lease's TTL decides.
            transport=options.Transport(ping_timeout_seconds=3.0),
            registry=registry,
            guard=None if self._guard is None else self._guard.check,
        )
        self._server.add(
            budget_service_pb2_grpc.add_BudgetServiceServicer_to_server,
            servicer.BudgetServicer(self._leader, durable, self._server.draining),
            _BUDGETS,
        )
        self._server.add(
            node_service_pb2_grpc.add_NodeServiceServicer_to_server,
            node_servicer.NodeServicer(self._leader, self._server.draining, self._guard),
            _NODES,
        )
        self._server.add(
            job_service_pb2_grpc.add_JobServiceServicer_to_server,
            job_servicer.JobServicer(self._leader, self._server.draining),
            _JOBS,
        )
        metrics_service.add(self._server, registry, functools.partial(gauges.collect, leadership=self._leader))
        self._failure: errors.LeaseholdError | None = None

    async def serve(self) -> None:
        # Before etcd is waited for: an address that is refused or taken is told at once.
        await self._server.start()
        self._set_serving(False)
        async with tasks.BackgroundTasks() as background:
            standing = background.start(self._stand(background), name="leadership", may_end=True)
            # Hands the leadership over before the last calls are done.
            self._server.on_drain(lambda: _cancel(standing))
            background.start(self._keep_house(), name="housekeeping")
            if self._settings.budgets_file is not None:
                followed = budget_file.BudgetFile(self._settings.budgets_file, self._leader)
                background.start(followed.run(), name="budgets-file")
            if self._settings.roles_file is not None and self._guard is not None:
                roles = roles_file.RolesFile(self._settings.roles_file, self._guard)
                background.start(roles.run(), name="roles-file")
            await servers.serve_until_signal(self._server, background)
        if self._failure is not None:
            raise self._failure

    def _set_serving(self, is_serving: bool) -> None:
        for service in (_BUDGETS, _NODES, _JOBS):
            self._server.set_serving(service, is_serving)

    async def _stand(self, background: tasks.BackgroundTasks) -> None:
        """Campaign and reign until cancelled. What the user must mend ends the service, without a traceback."""
        try:
            etcd = await self._connect()
            try:
                await self._campaign(etcd)
            finally:
                await etcd.close()
        except errors.LeaseholdError as error:
            self._failure = error
            background.start(self._server.drain(), name="drain", may_end=True)

    async def _campaign(self, etcd: etcd_port.EtcdPort) -> None:
        self._set_serving(True)
        candidate = election.Election(
            etcd,
            self._keys.prefix,
            self._settings.candidate_id,
            # The port is known only now that it is bound.
            self._settings.advertise or self._server.bound[0],
            self._settings.election_ttl_seconds,
            randomness=random.Random(),  # noqa: S311 - spreads retries, guards nothing
        )
        async with candidate:
            await self._leader.run(etcd, candidate)

    def _check_version(self, told: str) -> None:
        """Of the member that answers. Raises `FailedPrecondition` unless the user takes the risk."""
        version = server_versions.etcd_version(told)
        objection = None if version is None else server_versions.objection_to_etcd(version)
        if objection is None:
            return
        if not self._settings.accept_unfit_etcd:
            raise errors.FailedPrecondition(f"{objection}, or take the risk with --accept-unfit-etcd")
        _log.warning("etcd_unfit", objection=objection)

    async def _connect(self) -> etcd_port.EtcdPort:
        settings = self._settings
        endpoints = [part.strip() for part in settings.etcd_endpoints.split(",") if part.strip()]
        options = etcd_settings.Settings(txn_ops_max=settings.etcd_txn_ops_max)
        deadline = asyncio.get_running_loop().time() + CONNECT_WAIT_SECONDS
        is_told = False
        while True:
            try:
                etcd = await adapter.connect(
                    endpoints, tls=settings.etcd_tls, login=settings.etcd_login(), settings=options
                )
                try:
                    self._check_version((await etcd.status()).version)
                except BaseException:
                    await etcd.close()
                    raise
                return etcd
            except (errors.EtcdUnavailable, errors.DeadlineExceeded) as error:
                if asyncio.get_running_loop().time() > deadline:
                    raise
                if not is_told:
                    _log.warning("waiting_for_etcd", endpoints=endpoints, error=error.message)
                is_told = True
                await asyncio.sleep(CONNECT_RETRY_SECONDS)

    async def _keep_house(self) -> None:
        """Old ledger lines and kept answers go after their retention."""
        while True:
            await self._leader.administration.is_synchronized.wait()
            reign = self._leader.reign
            if reign is not None:
                try:
                    await self._store.delete_ledger_before(reign.epoch)
                    await self._store.delete_requests_before(reign.epoch)
                except errors.LeaseholdError as error:
                    _log.warning("housekeeping_put_off", error=error.message)
            await asyncio.sleep(HOUSEKEEPING_SECONDS)


def _cancel(task: asyncio.Task[Any]) -> None:
    task.cancel()


def run(flags: Mapping[str, Any]) -> None:
    """Serve with settings from flags, environment and defaults; returns after a drain."""
    settings = config.load(flags)
    logs.configure(settings.log_format, settings.log_level, service="allocator")  # type: ignore[arg-type]
    # What is loaded now stays: a collection that looks at all of it stops the allocator for 40 ms.
    gc.freeze()
    gc.set_threshold(GARBAGE_OBJECTS, 20, 20)
    asyncio.run(serve(settings))
