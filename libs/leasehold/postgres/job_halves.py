"""A batch of which Postgres refuses something, in halves, and what came of them as of the whole.

A kept answer and the submits that it tells of are never parted: they are committed together, are a repeat
together, or are refused together, so that no answer ever tells of jobs that are not there.
"""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

from leasehold.core.job import changes

_KINDS = ("ends", "cancels", "queues", "capacities", "answers", "submits", "allocations")
_JUDGED = tuple(kind for kind in _KINDS if kind != "answers")

#: Kind and place in the batch, of changes that go together.
Unit = tuple[tuple[str, int], ...]


def units(batch: changes.Batch) -> list[Unit]:
    """What can be parted, in the order of the batch."""
    owners = {job_id: number for number, answer in enumerate(batch.answers) for job_id in answer.job_ids}
    told: dict[int, list[tuple[str, int]]] = {number: [] for number in range(len(batch.answers))}
    alone: list[int] = []
    for place, submit in enumerate(batch.submits):
        owner = owners.get(submit.job.job_id)
        if owner is None:
            alone.append(place)
        else:
            told[owner].append(("submits", place))
    found: list[Unit] = []
    for kind in _KINDS:
        if kind == "answers":
            found += [(("answers", number), *submits) for number, submits in told.items()]
        elif kind == "submits":
            found += [(("submits", place),) for place in alone]
        else:
            found += [((kind, place),) for place in range(len(getattr(batch, kind)))]
    return found


def picked(batch: changes.Batch, chosen: Sequence[Unit], batch_id: str) -> changes.Batch:
    """A batch of these alone."""
    places = _places(chosen)
    kinds: dict[str, Any] = {
        kind: tuple(getattr(batch, kind)[place] for place in places[kind]) for kind in _KINDS
    }
    return changes.Batch(batch_id=batch_id, **kinds)


def joined(
    batch: changes.Batch, parts: Sequence[tuple[Sequence[Unit], changes.BatchResult]]
) -> changes.BatchResult:
    """What came of the whole batch, from what came of its parts, the last one committed last."""
    verdicts: dict[str, Any] = {kind: [changes.Verdict.STALE] * len(getattr(batch, kind)) for kind in _JUDGED}
    kept: dict[changes.RequestKey, changes.KeepAnswer] = {}
    for chosen, result in parts:
        places = _places(chosen)
        for kind in _JUDGED:
            for place, verdict in zip(places[kind], getattr(result, kind), strict=True):
                verdicts[kind][place] = verdict
        kept.update(result.kept_before)
    found: dict[str, Any] = {kind: tuple(each) for kind, each in verdicts.items()}
    return dataclasses.replace(parts[-1][1], kept_before=kept, **found)


def poisoned(batch: changes.Batch, result: changes.BatchResult, poison: Collection[str]) -> changes.BatchResult:
    """`result` of an empty batch, with every change of `batch` told as poison.

    Of submits only those of the jobs `poison`, if there are any: the others are STALE.
    """
    verdicts: dict[str, Any] = {kind: (changes.Verdict.POISON,) * len(getattr(batch, kind)) for kind in _JUDGED}
    if poison:
        verdicts["submits"] = tuple(
            changes.Verdict.POISON if submit.job.job_id in poison else changes.Verdict.STALE
            for submit in batch.submits
        )
    return dataclasses.replace(result, **verdicts)


def _places(chosen: Sequence[Unit]) -> dict[str, list[int]]:
    """Places in the batch by kind, each in the order of the batch."""
    places: dict[str, list[int]] = {kind: [] for kind in _KINDS}
    for unit in chosen:
        for kind, place in unit:
            places[kind].append(place)
    return {kind: sorted(found) for kind, found in places.items()}
