"""Refusals of the allocator as errors of the core tree, without gRPC: a forked child must not touch that."""

from collections.abc import Iterator
from typing import Final

from leasehold.core import errors
from leasehold.core.budget import messages

#: Refusals that asking again cannot heal while nothing else changes: who waits is told at once.
_LASTING: Final = (
    errors.InvalidArgument,
    errors.NotFound,
    errors.FailedPrecondition,
    errors.PermissionDenied,
    errors.Superseded,
    errors.Unimplemented,
)


def error_of(refusal: messages.Refusal) -> errors.LeaseholdError:
    """The error that a refusal carries; an unknown reason gives a plain `LeaseholdError`."""
    return build(refusal.reason, refusal.message, field=refusal.field or None)


def build(
    reason: str,
    message: str,
    *,
    field: str | None = None,
    retry_after_seconds: float | None = None,
    metadata: dict[str, str] | None = None,
) -> errors.LeaseholdError:
    """The error whose class has `reason`, with these parts."""
    kind = next((each for each in _classes() if each.reason == reason), errors.LeaseholdError)
    if issubclass(kind, errors.NotLeader):
        return kind((metadata or {}).get("leader_address", ""))
    # Some classes have constructors of their own, for those who raise them; here every part is known.
    error = kind.__new__(kind, message)
    errors.LeaseholdError.__init__(
        error, message, field=field, retry_after_seconds=retry_after_seconds, metadata=metadata
    )
    return error


def is_lasting(error: errors.LeaseholdError) -> bool:
    """Whether asking again in a moment is of no use."""
    return isinstance(error, _LASTING)


def ended(budget: str, end: messages.LeaseEnd) -> errors.LeaseholdError:
    """Why an acquire of a budget fails whose lease has ended."""
    if end is messages.LeaseEnd.SUPERSEDED:
        return errors.Superseded(
            f"budget {budget}: another process has joined under the same worker id; this one stopped. Give "
            "each worker its own worker_id (or WORKER_ID)"
        )
    if end is messages.LeaseEnd.BUDGET_DELETED:
        return errors.NotFound(f"budget {budget} was deleted")
    return errors.FailedPrecondition(f"budget {budget}: the client is closed")


def _classes() -> Iterator[type[errors.LeaseholdError]]:
    pending: list[type[errors.LeaseholdError]] = [errors.LeaseholdError]
    while pending:
        kind = pending.pop()
        yield kind
        pending.extend(kind.__subclasses__())
