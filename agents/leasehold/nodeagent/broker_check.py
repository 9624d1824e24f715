"""Before a pool starts: can its broker be reached, and does the login work? Each failure comes with advice."""

import asyncio
import contextlib
import errno
from dataclasses import dataclass
from typing import Final

from leasehold.core import errors
from leasehold.nodeagent import amqp_wire, broker_url, redis_wire

TIMEOUT_SECONDS: Final = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerFailure:
    """Why a broker cannot be used, and what to do about it. Neither shows a password."""

    problem: str
    advice: str


async def check(
    url: str | None, *, url_variable: str = "CELERY_BROKER_URL", timeout_seconds: float = TIMEOUT_SECONDS
) -> BrokerFailure | None:
    """None: the broker answers, and takes the login. Raises nothing.

    `url` is the value of `url_variable`; None where that is not set.
    """
    if not url:
        return BrokerFailure(
            problem=f"{url_variable} is not set",
            advice=f"set {url_variable} in the agent's environment, or {url_variable}_FILE to a file with it",
        )
    try:
        where = broker_url.parse(url, setting=url_variable)
    except errors.InvalidArgument as error:
        return BrokerFailure(
            problem=error.message, advice=f"correct {url_variable}, as redis://:password@host:6379/0"
        )
    try:
        async with asyncio.timeout(timeout_seconds):
            await _log_in(where)
    except TimeoutError:
        return BrokerFailure(
            problem=f"{where.place} did not answer within {timeout_seconds:g} s",
            advice="look at the firewall and the broker's load; or one side speaks TLS and the other does not",
        )
    except errors.LeaseholdError as error:
        return BrokerFailure(problem=error.message, advice=_advice(error, where, url_variable))
    return None


async def _log_in(where: broker_url.BrokerUrl) -> None:
    connection: redis_wire.RedisConnection | amqp_wire.AmqpConnection
    if where.kind == broker_url.REDIS:
        redis = connection = await redis_wire.RedisConnection.open(where)
        with contextlib.closing(connection):
            # Without a login that is needed even this is refused; a replica answers, and takes no messages.
            ping, role = await redis.ask([["PING"], ["ROLE"]])
            if isinstance(ping, redis_wire.Refused):
                raise redis_wire.as_error(ping, where.place)
            if isinstance(role, list) and role and role[0] in {b"slave", b"replica"}:
                raise errors.FailedPrecondition(f"{where.place} is a replica, which takes no messages")
    else:
        connection = await amqp_wire.AmqpConnection.open(where)
        connection.close()


def _advice(error: errors.LeaseholdError, where: broker_url.BrokerUrl, url_variable: str) -> str:
    if isinstance(error, errors.PermissionDenied):
        return f"the broker is there; the user or the password in {url_variable} is wrong, or may not do this"
    if isinstance(error, errors.FailedPrecondition):
        return f"the broker is there; what {url_variable} asks of it (database, virtual host, primary) is not"
    cause = error.__cause__
    if isinstance(cause, ConnectionRefusedError):
        return f"nothing listens there: start the broker, or correct host and port in {url_variable}"
    if isinstance(cause, FileNotFoundError):
        return f"there is no such socket: start the broker, or correct the path in {url_variable}"
    if isinstance(cause, PermissionError):
        return "the agent's user may not open that socket: correct its mode, or the agent's groups"
    if isinstance(cause, OSError) and cause.errno in {errno.EHOSTUNREACH, errno.ENETUNREACH}:
        return "there is no way to that host from here: look at the network"
    if type(cause).__name__ == "gaierror":
        return f"the name is not known here: correct the host in {url_variable}, or the resolver"
    if type(cause).__name__.startswith("SSL"):
        return f"no TLS is spoken there, or its certificate is not trusted: see ssl_ca_certs in {url_variable}"
    return "look at the broker's log"
