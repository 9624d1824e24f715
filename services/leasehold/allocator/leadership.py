"""Becoming the leader, reigning, and losing it.

A takeover, in this order: win the election; `takeover.Takeover` (generation, epoch, records); serve leases; and
only then Postgres: raise the epoch there before the first read, and bring the definitions in line with it.
"""

import asyncio
from typing import Any, NoReturn

from leasehold.allocator import administration, job_gauges, jobs, nodes, records, takeover
from leasehold.allocator import reign as reigns
from leasehold.core import errors
from leasehold.etcd import election as elections
from leasehold.etcd import port as etcd_port
from leasehold.observe import logs
from leasehold.postgres import job_port, port
from leasehold.runtime import clock as clocks

_log = logs.get_logger(__name__)


class Leadership:
    """Campaigns for ever; `reign` is the present one, or None while another leads or etcd is not known yet."""

    def __init__(
        self,
        store: port.Store,
        keys: records.Keys,
        *,
        job_store: job_port.JobStore,
        job_metrics: job_gauges.FlushMetrics,
        candidate_id: str,
        accept_new_etcd: bool = False,
    ) -> None:
        self.reign: reigns.Reign | None = None
        #: The nodes of the present reign.
        self.nodes: nodes.Nodes | None = None
        #: The jobs of the present reign.
        self.jobs: jobs.Jobs | None = None
        self.administration = administration.Administration(store, self.require)
        self._store = store
        self._job_store = job_store
        self._job_metrics = job_metrics
        self._keys = keys
        self._candidate_id = candidate_id
        self._accept_new_etcd = accept_new_etcd
        self._candidacy: elections.Election | None = None
        #: Postgres knows a later epoch than the etcd that has just elected this replica.
        self._is_etcd_set_back = False

    def require(self) -> reigns.Reign:
        """The present reign; raises `NotLeader`."""
        reign = self.reign
        if reign is None or reign.is_over:
            raise self.not_leader()
        return reign

    def require_nodes(self) -> nodes.Nodes:
        """The nodes of the present reign; raises `NotLeader`."""
        reign = self.require()
        if self.nodes is None or self.nodes.reign is not reign:
            raise self.not_leader()
        return self.nodes

    def require_jobs(self) -> jobs.Jobs:
        """The jobs of the present reign; raises `NotLeader`."""
        reign = self.require()
        if self.jobs is None or self.jobs.reign is not reign:
            raise self.not_leader()
        return self.jobs

    def not_leader(self) -> errors.NotLeader:
        """The refusal that names who leads, so far as that is known."""
        leader = self._candidacy.leader() if self._candidacy is not None else None
        is_other = leader is not None and leader.candidate_id != self._candidate_id
        return errors.NotLeader(leader.address if leader is not None and is_other else "")

    async def run(self, etcd: etcd_port.EtcdPort, candidacy: elections.Election) -> NoReturn:
        """Campaign and reign, over and over, until cancelled. Raises only what waiting does not heal."""
        self._candidacy = candidacy
        while True:
            won = await candidacy.campaign()
            try:
                await self._reign(etcd, candidacy, won)
            except errors.StaleEpoch as error:
                _log.warning("reign_ended", why=error.message)
            finally:
                await self._step_down()

    async def _step_down(self) -> None:
        reign, self.reign = self.reign, None
        known, self.nodes = self.nodes, None
        work, self.jobs = self.jobs, None
        if work is not None:
            work.close(self.not_leader())
        if known is not None:
            known.close(self.not_leader())
        if reign is not None:
            await reign.close(self.not_leader())
        if known is not None:
            await known.flush()

    async def _reign(
        self, etcd: etcd_port.EtcdPort, candidacy: elections.Election, won: elections.Won
    ) -> NoReturn:
        taking_over = takeover.Takeover(etcd, self._store, self._keys, candidacy, won)
        epoch = await taking_over.begin(
            accept_new_etcd=self._accept_new_etcd, is_set_back=self._is_etcd_set_back
        )
        self._is_etcd_set_back = False
        reign = reigns.Reign(
            epoch, etcd, self._keys, self._store, clock=clocks.MonotonicClock(), boot_clock=clocks.BootClock()
        )
        known = nodes.Nodes(reign, self._store)
        work = jobs.Jobs(reign, self._job_store, known, metrics=self._job_metrics)
        past = await taking_over.restore(reign)
        self.reign, self.nodes, self.jobs = reign, known, work
        _log.info("leading", epoch=epoch.encode(), budgets=len(reign.core.budgets))
        tasks = [
            asyncio.create_task(reign.run(), name="committer"),
            asyncio.create_task(self._follow_postgres(reign, past), name="postgres"),
            asyncio.create_task(known.run(self.administration.is_synchronized), name="nodes"),
            asyncio.create_task(work.run(self.administration.is_synchronized), name="jobs"),
            asyncio.create_task(_lost(candidacy), name="election"),
        ]
        try:
            # None of them ends but by raising.
            parts: list[asyncio.Future[Any]] = [*tasks, reign.ending]
            done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            for each in done:
                each.result()
            raise errors.LeaseholdError("a part of the reign ended by itself")
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow_postgres(self, reign: reigns.Reign, past: takeover.Past) -> None:
        try:
            await self.administration.follow(reign, past)
        except errors.StaleEpoch:
            # If etcd agrees that this is the newest epoch, the later one that Postgres knows was given out by
            # the etcd that this one was before its data went back.
            await reign.flush()
            self._is_etcd_set_back = True
            raise


async def _lost(candidacy: elections.Election) -> NoReturn:
    await candidacy.lost.wait()
    raise errors.StaleEpoch(candidacy.lost_reason)
