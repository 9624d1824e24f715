"""Errors as HTTP: one table of statuses, one form of body."""

import math
from collections.abc import Mapping
from typing import Final

from leasehold.core import errors
from starlette import responses
from typing_extensions import TypedDict

STATUSES: Final[Mapping[type[errors.LeaseholdError], int]] = {
    errors.LeaseholdError: 500,
    errors.InvalidArgument: 400,
    errors.NotFound: 404,
    errors.AlreadyExists: 409,
    errors.FailedPrecondition: 409,
    # The leader was another's by then: asked again, the new one answers.
    errors.StaleEpoch: 503,
    errors.VersionConflict: 409,
    errors.Superseded: 409,
    errors.ResourceExhausted: 429,
    errors.Unavailable: 503,
    errors.DeadlineExceeded: 504,
    errors.PermissionDenied: 403,
    errors.Unimplemented: 501,
}

_RETRY_STATUSES: Final = frozenset({429, 503})
_RETRY_SECONDS: Final = 1.0


class Refusal(TypedDict):
    """What is wrong. `reason` is stable, and programs match on it; `field` names the parameter at fault."""

    reason: str
    message: str
    field: str | None
    metadata: dict[str, str]


class ErrorAnswer(TypedDict):
    """The body of every answer of status 400 and above."""

    error: Refusal


class HttpRefusal(Exception):
    """Refused by the gateway itself, for a reason that only HTTP has."""

    def __init__(self, status: int, reason: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.reason, self.message = status, reason, message
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def status_of(error: errors.LeaseholdError) -> int:
    """The status of the nearest class in the table."""
    return next(STATUSES[ancestor] for ancestor in type(error).__mro__ if ancestor in STATUSES)


def refusal(error: errors.LeaseholdError) -> Refusal:
    """The document of an error."""
    return {
        "reason": error.metadata.get("unknown_reason") or error.reason,
        "message": error.message,
        "field": error.field,
        "metadata": {name: value for name, value in error.metadata.items() if name != "unknown_reason"},
    }


def headers(error: errors.LeaseholdError) -> dict[str, str]:
    """Retry-After, in whole seconds, where trying again may help."""
    if status_of(error) not in _RETRY_STATUSES:
        return {}
    delay = _RETRY_SECONDS if error.retry_after_seconds is None else error.retry_after_seconds
    return {"retry-after": str(max(1, math.ceil(min(delay, 86_400.0))))}


def answer(error: errors.LeaseholdError | HttpRefusal) -> responses.JSONResponse:
    """The whole response."""
    if isinstance(error, HttpRefusal):
        body: ErrorAnswer = {
            "error": {"reason": error.reason, "message": error.message, "field": None, "metadata": {}}
        }
        return responses.JSONResponse(body, error.status, error.headers)
    return responses.JSONResponse({"error": refusal(error)}, status_of(error), headers(error))
