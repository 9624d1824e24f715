"""Wiring: an allocator's parts, started and stopped in order."""

import asyncio
import random
from collections.abc import Mapping
from typing import Any

from leasehold.allocator import budget_file, config, leadership, records, servicer
from leasehold.api.budget.v1 import budget_service_pb2, budget_service_pb2_grpc
from leasehold.core import errors
from leasehold.etcd import adapter, election
from leasehold.etcd import port as etcd_port
from leasehold.etcd import settings as etcd_settings
from leasehold.observe import logs, metrics
from leasehold.postgres import port, store
from leasehold.rpc import server as servers
from leasehold.runtime import tasks

HOUSEKEEPING_SECONDS = 600.0
CONNECT_RETRY_SECONDS = 0.5
CONNECT_WAIT_SECONDS = 60.0

_log = logs.get_logger(__name__)


async def serve(settings: config.Settings) -> None:
    """Run an allocator until SIGTERM or SIGINT. Raises core errors for what the user must mend."""
    if settings.budgets_file is not None:
        # A file that is wrong at the start is told at once; later the last good one stays in force.
        await asyncio.to_thread(budget_file.read, settings.budgets_file)
    etcd = await _connect(settings)
    try:
        async with store.PostgresStore(settings.dsn()) as durable:
            await _serve_with(settings, etcd, durable)
    finally:
        await etcd.close()


async def _connect(settings: config.Settings) -> etcd_port.EtcdPort:
    endpoints = [part.strip() for part in settings.etcd_endpoints.split(",") if part.strip()]
    options = etcd_settings.Settings(txn_ops_max=settings.etcd_txn_ops_max)
    deadline = asyncio.get_running_loop().time() + CONNECT_WAIT_SECONDS
    is_told = False
    while True:
        try:
            return await adapter.connect(
                endpoints, tls=settings.etcd_tls, login=settings.etcd_login(), settings=options
            )
        except (errors.EtcdUnavailable, errors.DeadlineExceeded) as error:
            if asyncio.get_running_loop().time() > deadline:
                raise
            if not is_told:
                _log.warning("waiting_for_etcd", endpoints=endpoints, error=error.message)
            is_told = True
            await asyncio.sleep(CONNECT_RETRY_SECONDS)


async def _serve_with(settings: config.Settings, etcd: etcd_port.EtcdPort, durable: port.Store) -> None:
    registry = metrics.Registry()
    server = servers.Server([settings.listen], tls_files=settings.tls_files, registry=registry)
    keys = records.Keys(settings.etcd_prefix.rstrip("/"))
    leader = leadership.Leadership(
        etcd, durable, keys, candidate_id=settings.candidate_id, accept_new_etcd=settings.accept_new_etcd
    )
    budgets = servicer.BudgetServicer(leader, durable, server.draining)
    server.add(
        budget_service_pb2_grpc.add_BudgetServiceServicer_to_server,
        budgets,
        budget_service_pb2.DESCRIPTOR.services_by_name["BudgetService"],
    )
    await server.start()
    # The address that others are told is known only now that the port is bound.
    candidate = election.Election(
        etcd,
        keys.prefix,
        settings.candidate_id,
        settings.advertise or server.bound[0],
        settings.election_ttl_seconds,
        randomness=random.Random(),  # noqa: S311 - spreads retries, guards nothing
    )
    async with candidate, tasks.BackgroundTasks() as background:
        background.start(leader.run(candidate), name="leadership")
        background.start(_keep_house(leader, durable), name="housekeeping")
        if settings.budgets_file is not None:
            background.start(budget_file.BudgetFile(settings.budgets_file, leader).run(), name="budgets-file")

        def hand_over() -> None:
            background.start(leader.step_down(), name="step-down", may_end=True)

        server.on_drain(hand_over)
        await servers.serve_until_signal(server, background)


async def _keep_house(leader: leadership.Leadership, durable: port.Store) -> None:
    """Old ledger lines and kept answers go after their retention."""
    while True:
        await leader.is_synchronized.wait()
        reign = leader.reign
        if reign is not None:
            try:
                await durable.delete_ledger_before(reign.epoch)
                await durable.delete_requests_before(reign.epoch)
            except (errors.PostgresUnavailable, errors.StaleEpoch) as error:
                _log.warning("housekeeping_put_off", error=error.message)
        await asyncio.sleep(HOUSEKEEPING_SECONDS)


def run(flags: Mapping[str, Any]) -> None:
    """Serve with settings from flags, environment and defaults; returns after a drain."""
    settings = config.load(flags)
    logs.configure(settings.log_format, settings.log_level, service="allocator")  # type: ignore[arg-type]
    asyncio.run(serve(settings))
