"""One batch of the ledger, as statements of one transaction; each kind of change is one statement.

Their order is that of `changes.Batch`. Every statement tells which of its changes found what they expected, by
number; the others changed nothing.
"""

from collections.abc import Mapping, Sequence

from leasehold.core import epoch as epochs
from leasehold.core.job import changes, model
from leasehold.postgres import columns, database, job_rows, queries, rowmap, writes

_SQL = queries.load("job_flush.sql")

_Verdicts = tuple[changes.Verdict, ...]


async def flush(
    cursor: database.Cursor, epoch: epochs.Epoch, batch: changes.Batch
) -> changes.BatchResult | None:
    """Do a batch in the cursor's transaction; what came of it. None: another epoch has the fence."""
    await cursor.execute(_SQL["take_fence"], {**rowmap.epoch_columns(epoch), "batch_id": batch.batch_id})
    fence = await cursor.fetchone()
    if fence is None:
        return None
    flush_seq: int = fence["flush_seq"]
    boots, over = await _lock(cursor, batch)
    ends = await _end(cursor, epoch, batch.ends, flush_seq)
    cancels = await _cancel(cursor, epoch, batch.cancels)
    queues = [await _change_queue(cursor, epoch, change) for change in batch.queues]
    capacities = await _put_capacities(cursor, batch.capacities)
    kept, refused = await _keep(cursor, batch.answers)
    submits = await _submit(cursor, batch.submits, refused)
    boots |= {change.node: change.boot_id for change in batch.capacities}
    allocations = await _allocate(cursor, epoch, batch.allocations, flush_seq, boots)
    changed = sorted({change.node for change in batch.capacities} | over)
    if changed:
        await cursor.execute(_SQL["log_capacities"], {"nodes": columns.texts(changed), "flush_seq": flush_seq})
    return changes.BatchResult(
        flush_seq=flush_seq,
        time_seconds=fence["time_seconds"],
        ends=ends,
        cancels=cancels,
        queues=tuple(queues),
        capacities=capacities,
        submits=submits,
        allocations=allocations,
        kept_before=kept,
    )


async def release_ended(cursor: database.Cursor, epoch: epochs.Epoch) -> int | None:
    """Release live rows of jobs that have ended; how many. None: another epoch has the fence."""
    await cursor.execute(_SQL["live_of_ended"])
    if not await cursor.fetchall():
        return 0
    await cursor.execute(_SQL["advance_fence"], rowmap.epoch_columns(epoch))
    fence = await cursor.fetchone()
    if fence is None:
        return None
    # Read again under the fence: the flusher may have released some meanwhile.
    await cursor.execute(_SQL["live_of_ended"])
    told = "its job has ended, and its row was left live: by a statement by hand"
    ends = tuple(
        changes.EndAttempt(
            ref=model.AttemptRef(row["job_id"], row["attempt"]),
            outcome=model.Outcome(cause=model.EndCause.FORCED, detail=told),
            next_state=model.JobState.FAILED,
            is_failure=False,
            actor="leasehold",
        )
        for row in await cursor.fetchall()
    )
    _, over = await _lock(cursor, changes.Batch(batch_id="-", ends=ends))
    released = await _end(cursor, epoch, ends, fence["flush_seq"])
    if over:
        await cursor.execute(
            _SQL["log_capacities"], {"nodes": columns.texts(sorted(over)), "flush_seq": fence["flush_seq"]}
        )
    return released.count(changes.Verdict.APPLIED)


async def kept_answers(
    cursor: database.Cursor, keys: Sequence[changes.RequestKey]
) -> dict[changes.RequestKey, changes.KeepAnswer]:
    """First answers under these keys."""
    if not keys:
        return {}
    await cursor.execute(_SQL["kept_answers"], _key_columns(keys))
    found = [job_rows.kept_answer(row) for row in await cursor.fetchall()]
    return {kept.key: kept for kept in found}


def _key_columns(keys: Sequence[changes.RequestKey]) -> dict[str, str]:
    return {
        "principals": columns.texts([key.principal for key in keys]),
        "request_ids": columns.texts([key.request_id for key in keys]),
        "chunks": columns.numbers(key.chunk for key in keys),
    }


def _verdicts(count: int, applied: Sequence[int]) -> _Verdicts:
    """Of changes numbered from 1, those in `applied` were done."""
    found = [changes.Verdict.STALE] * count
    for number in applied:
        found[number - 1] = changes.Verdict.APPLIED
    return tuple(found)


async def _numbers(cursor: database.Cursor) -> list[int]:
    return [row["number"] for row in await cursor.fetchall()]


async def _lock(cursor: database.Cursor, batch: changes.Batch) -> tuple[dict[str, str], set[str]]:
    """Lock the nodes that the batch touches; their boots, and those whose gated total falls as jobs release."""
    nodes = {change.node for change in batch.capacities} | {change.node for change in batch.allocations}
    ends = [change.ref.job_id for change in batch.ends]
    if not nodes and not ends:
        return {}, set()
    await cursor.execute(
        _SQL["lock_nodes"], {"nodes": columns.texts(sorted(nodes)), "job_ids": columns.texts(ends)}
    )
    found = await cursor.fetchall()
    over = {row["node"] for row in found if row["is_over"]} if ends else set()
    return {row["node"]: row["boot_id"] for row in found}, over


async def _end(
    cursor: database.Cursor, epoch: epochs.Epoch, ends: Sequence[changes.EndAttempt], flush_seq: int
) -> _Verdicts:
    if not ends:
        return ()
    await cursor.execute(
        _SQL["end_attempts"],
        {
            "flush_seq": flush_seq,
            "job_ids": columns.texts([end.ref.job_id for end in ends]),
            "attempts": columns.numbers(end.ref.attempt for end in ends),
            "outcomes": columns.texts(
                [job_rows.encoded(job_rows.outcome_document(end.outcome)) for end in ends]
            ),
            "states": columns.texts([end.next_state.value for end in ends]),
            "are_failures": columns.booleans(end.is_failure for end in ends),
            "not_befores": columns.numbers(end.not_before_seconds for end in ends),
        },
    )
    verdicts = _verdicts(len(ends), await _numbers(cursor))
    for end, verdict in zip(ends, verdicts, strict=True):
        if end.actor and verdict is changes.Verdict.APPLIED:
            await writes.note_change(
                cursor,
                epoch,
                method="ForceReleaseAllocation",
                target=f"job/{end.ref.job_id}",
                actor=end.actor,
                cause=end.outcome.detail,
                before={"attempt": end.ref.attempt, "released": False},
                after={"attempt": end.ref.attempt, "released": True, "state": end.next_state.value},
            )
    return verdicts


async def _cancel(cursor: database.Cursor, epoch: epochs.Epoch, cancels: Sequence[changes.Cancel]) -> _Verdicts:
    if not cancels:
        return ()
    await cursor.execute(_SQL["cancel_jobs"], {"job_ids": columns.texts([cancel.job_id for cancel in cancels])})
    verdicts = _verdicts(len(cancels), await _numbers(cursor))
    for cancel, verdict in zip(cancels, verdicts, strict=True):
        if verdict is changes.Verdict.APPLIED:
            await writes.note_change(
                cursor,
                epoch,
                method="CancelJob",
                target=f"job/{cancel.job_id}",
                actor=cancel.actor,
                cause="",
                before=None,
                after={"is_cancel_requested": True},
            )
    return verdicts


async def _change_queue(
    cursor: database.Cursor, epoch: epochs.Epoch, change: changes.PutQueue | changes.DeleteQueue
) -> changes.Verdict:
    if isinstance(change, changes.PutQueue):
        queue = change.queue
        row = {
            "name": queue.name,
            "nominal_cpus": queue.nominal_cpus,
            "nominal_memory_bytes": queue.nominal_memory_bytes,
        }
        await cursor.execute(_SQL["put_queue"], row)
        method, name, after = "PutQueue", queue.name, {**row}
    else:
        await cursor.execute(_SQL["delete_queue"], {"name": change.name})
        if not cursor.rowcount:
            return changes.Verdict.STALE
        method, name, after = "DeleteQueue", change.name, {"is_deleted": True}
    await writes.note_change(
        cursor,
        epoch,
        method=method,
        target=f"queue/{name}",
        actor=change.actor,
        cause="",
        before=None,
        after=after,
    )
    return changes.Verdict.APPLIED


async def _put_capacities(cursor: database.Cursor, capacities: Sequence[changes.SetCapacity]) -> _Verdicts:
    if not capacities:
        return ()
    await cursor.execute(
        _SQL["put_capacities"],
        {
            "nodes": columns.texts([change.node for change in capacities]),
            "boot_ids": columns.texts([change.boot_id for change in capacities]),
            "cpus": columns.numbers(change.declared.cpus for change in capacities),
            "memory_bytes": columns.numbers(change.declared.memory_bytes for change in capacities),
        },
    )
    return (changes.Verdict.APPLIED,) * len(capacities)


async def _keep(
    cursor: database.Cursor, answers: Sequence[changes.KeepAnswer]
) -> tuple[dict[changes.RequestKey, changes.KeepAnswer], frozenset[str]]:
    """Keep first answers; those that were kept before, and the jobs of requests that are repeats."""
    if not answers:
        return {}, frozenset()
    await cursor.execute(
        _SQL["keep_answers"],
        {
            **_key_columns([answer.key for answer in answers]),
            "payloads": columns.octets(answer.payload_sha256 for answer in answers),
            "answers": columns.texts([job_rows.encoded(answer.answer) for answer in answers]),
        },
    )
    if cursor.rowcount == len(answers):
        return {}, frozenset()
    fresh = {job_rows.request_key(row) for row in await cursor.fetchall()}
    repeats = [answer for answer in answers if answer.key not in fresh]
    kept = await kept_answers(cursor, [answer.key for answer in repeats])
    return kept, frozenset(job_id for answer in repeats for job_id in answer.job_ids)


async def _submit(
    cursor: database.Cursor, submits: Sequence[changes.Submit], refused: frozenset[str]
) -> _Verdicts:
    jobs = [submit.job for submit in submits if submit.job.job_id not in refused]
    if not jobs:
        return (changes.Verdict.STALE,) * len(submits)
    await cursor.execute(
        _SQL["submit_jobs"],
        {
            "job_ids": columns.texts([job.job_id for job in jobs]),
            "names": columns.texts([job.spec.name for job in jobs]),
            "queues": columns.texts([job.spec.queue for job in jobs]),
            "priorities": columns.numbers(job.spec.priority for job in jobs),
            "cpus": columns.numbers(job.spec.required.cpus for job in jobs),
            "memory_bytes": columns.numbers(job.spec.required.memory_bytes for job in jobs),
            "specs": columns.texts([job_rows.encoded(job_rows.spec_document(job.spec)) for job in jobs]),
            "principals": columns.texts([job.principal for job in jobs]),
            "submit_times": columns.numbers(job.submit_time_seconds for job in jobs),
        },
    )
    inserted = {row["job_id"] for row in await cursor.fetchall()}
    return tuple(
        changes.Verdict.APPLIED if submit.job.job_id in inserted else changes.Verdict.STALE
        for submit in submits
    )


async def _allocate(
    cursor: database.Cursor,
    epoch: epochs.Epoch,
    allocations: Sequence[changes.Allocate],
    flush_seq: int,
    boots: Mapping[str, str],
) -> _Verdicts:
    # Their nodes are locked: what was read of them holds, and need not be looked for again.
    numbers = [number for number, each in enumerate(allocations) if boots.get(each.node) == each.boot_id]
    chosen = [allocations[number] for number in numbers]
    if not chosen:
        return (changes.Verdict.STALE,) * len(allocations)
    await cursor.execute(
        _SQL["allocate"],
        {
            "flush_seq": flush_seq,
            "epoch": epoch.encode(),
            "job_ids": columns.texts([each.ref.job_id for each in chosen]),
            "attempts": columns.numbers(each.ref.attempt for each in chosen),
            "nodes": columns.texts([each.node for each in chosen]),
            "boot_ids": columns.texts([each.boot_id for each in chosen]),
            "queues": columns.texts([each.queue for each in chosen]),
            "cpus": columns.numbers(each.held.cpus for each in chosen),
            "memory_bytes": columns.numbers(each.held.memory_bytes for each in chosen),
        },
    )
    return _verdicts(len(allocations), [1 + numbers[number - 1] for number in await _numbers(cursor)])
