"""A hundred thousand jobs in line: a leader reads them all, and keeps its leadership meanwhile."""

from collections.abc import Callable
from typing import LiteralString

import allocator_kit as kit
import job_agents
from allocator_kit import until
from job_agents import ask
from leasehold.api.job.v1 import job_service_pb2 as wire
from psycopg import AsyncConnection

MakeFleet = Callable[..., kit.Fleet]

JOBS = 100_000

#: No two are alike, as those of a batch whose parameters name its files.
SEED: LiteralString = """
    INSERT INTO job (job_id, name, queue, priority, required_cpus, required_memory_bytes, spec, state,
        principal, submit_time)
    SELECT gen_random_uuid(), 'job-' || i, 'default', 0, 1 + i %% 8, (1 + i %% 125) * 134217728::bigint,
        jsonb_build_object('template', 'render', 'parameters', jsonb_build_object('input', 'file-' || i)),
        'PENDING', 'tests', now() - make_interval(secs => i)
    FROM generate_series(1, %(jobs)s) AS i
"""

#: An allocation of a job that there never was: the sweep gives it back, and has the leader read all anew.
ORPHAN: LiteralString = """
    INSERT INTO resource_allocation (job_id, attempt, node, boot_id, queue, allocated_cpus,
        allocated_memory_bytes, allocated_time, alloc_seq, epoch)
    VALUES (gen_random_uuid(), 1, 'nowhere', 'boot', 'default', 1, 1, now(), 1, '')
"""


async def _execute(dsn: str, statement: LiteralString) -> None:
    async with await AsyncConnection.connect(dsn, autocommit=True) as connection:
        await connection.execute(statement, {"jobs": JOBS})


async def _first_of_line(fleet: kit.Fleet, leader: kit.AllocatorProcess) -> str:
    request = wire.ListJobsRequest(page_size=1)
    return str((await ask(fleet, "ListJobs", request, at=leader)).jobs[0].job_id)


async def test_a_long_line_is_read_without_a_loss_of_the_leadership(
    make_fleet: MakeFleet, postgres_dsn: str
) -> None:
    fleet = make_fleet()
    await fleet.start()
    await job_agents.ready(fleet)
    member = fleet.members[0]
    member.kill()
    await _execute(postgres_dsn, SEED)
    member.log_path.unlink()
    member.start()
    leader = await job_agents.ready(fleet)
    explained = await ask(
        fleet, "ExplainJob", wire.ExplainJobRequest(job_id=await _first_of_line(fleet, leader)), at=leader
    )

    assert explained.explanation.line_length == JOBS

    await _execute(postgres_dsn, ORPHAN)
    await until(lambda: "jobs_reloaded" in leader.log(), "all are read anew")
    # Its TTL is a second.
    assert [member.log().count(event) for event in ("leader_elected", "leadership_lost")] == [1, 0]
