"""First answers to requests that may be repeated: how they are kept, and read again.

A kept answer is plain JSON. A repeat is told the first answer, refusals included; another request under the
same key is refused.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from leasehold.core import errors
from leasehold.core.job import changes, effects

_KINDS: Mapping[str, type[errors.LeaseholdError]] = {
    kind.reason: kind
    for kind in (errors.NotFound, errors.FailedPrecondition, errors.RefusedTogether, errors.LeaseholdError)
}


def encode(verdicts: Sequence[effects.SubmitVerdict]) -> dict[str, Any]:
    """The verdicts of a submit as JSON."""
    return {"verdicts": [_encode_one(verdict) for verdict in verdicts]}


def _encode_one(verdict: effects.SubmitVerdict) -> dict[str, str]:
    error = verdict.error
    if error is None:
        return {"job_id": verdict.job_id}
    return {"reason": error.reason, "message": error.message, "field": error.field or ""}


def decode(answer: Mapping[str, Any]) -> tuple[effects.SubmitVerdict, ...]:
    """The verdicts that `encode` was given. Of an error this version does not know: `FailedPrecondition`."""
    return tuple(_decode_one(kept) for kept in answer["verdicts"])


def _decode_one(kept: Mapping[str, str]) -> effects.SubmitVerdict:
    if "reason" not in kept:
        return effects.SubmitVerdict(kept["job_id"])
    message, field = kept["message"], kept["field"]
    if kept["reason"] == errors.InvalidArgument.reason:
        return effects.SubmitVerdict("", errors.InvalidArgument(message, field=field))
    kind = _KINDS.get(kept["reason"], errors.FailedPrecondition)
    return effects.SubmitVerdict("", kind(message, field=field or None))


def reused(key: changes.RequestKey) -> errors.RequestIdReused:
    """The refusal of another request under a key that is taken."""
    chunk = f", chunk {key.chunk}" if key.chunk else ""
    return errors.RequestIdReused(
        f"request id {key.request_id!r}{chunk} was used for another request", field="request_id"
    )
