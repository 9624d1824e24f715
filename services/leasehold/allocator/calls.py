"""What servicers share: who calls, pages, waiting for one of several."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import grpc
from leasehold.core import errors

PRINCIPAL_LENGTH_MAX = 200


def actor(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    """Who calls, for the audit log: the name in its certificate, else its address."""
    certificate = context.auth_context()
    for kind in ("x509_subject_alternative_name", "x509_common_name"):
        for name in certificate.get(kind, ()):
            return f"{name.decode('utf-8', 'replace')} at {context.peer()}"
    return context.peer()


def principal(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    """Who calls, the same over all its connections: the name in its certificate, else its host."""
    certificate = context.auth_context()
    for kind in ("x509_subject_alternative_name", "x509_common_name"):
        for name in certificate.get(kind, ()):
            return str(name.decode("utf-8", "replace"))[:PRINCIPAL_LENGTH_MAX]
    family, _, where = context.peer().partition(":")
    host = where.rpartition(":")[0] if family in ("ipv4", "ipv6") else ""
    return (host or family)[:PRINCIPAL_LENGTH_MAX]


async def first_of(*waits: Coroutine[Any, Any, Any]) -> None:
    """Return when one of the waits does; the others are cancelled."""
    tasks = [asyncio.create_task(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


def page_size(asked: int, most: int, usual: int) -> int:
    """The size of a page; 0: `usual`. Raises `InvalidArgument`."""
    if asked < 0 or asked > most:
        raise errors.InvalidArgument(f"page_size: {asked} is not in 0 to {most}", field="page_size")
    return asked or usual
