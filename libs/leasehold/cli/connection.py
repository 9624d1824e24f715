"""Calling the allocator's leader from a command."""

import asyncio
import os
import pathlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from leasehold.api.budget.v1 import budget_service_pb2_grpc
from leasehold.core import errors
from leasehold.rpc import channel as channels
from leasehold.rpc import errors as rpc_errors
from leasehold.rpc import leader, tls

DEFAULT_ADDRESS = "127.0.0.1:7400"
TIMEOUT_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Target:
    """Which allocators to ask, how, and for how long."""

    addresses: Sequence[str]
    tls_files: tls.TlsFiles | None = None
    timeout_seconds: float = TIMEOUT_SECONDS

    @classmethod
    def of(cls, given: str | None, timeout_seconds: float) -> "Target":
        """From --addr, else LEASEHOLD_ADDR, else the default; TLS files from LEASEHOLD_TLS_*_FILE."""
        text = given or os.environ.get("LEASEHOLD_ADDR") or DEFAULT_ADDRESS
        addresses = [part.strip() for part in text.split(",") if part.strip()]
        if not addresses:
            raise errors.InvalidArgument("--addr: no address is given", field="addr")
        return cls(addresses, _tls_files(), timeout_seconds)

    def call(self, method: str, request: Any) -> Any:
        """Call a unary method of BudgetService on the leader; raises core errors."""
        return leader.call_leader(
            self.addresses,
            lambda channel: getattr(budget_service_pb2_grpc.BudgetServiceStub(channel), method),
            request,
            tls_files=self.tls_files,
            timeout_seconds=self.timeout_seconds,
        )

    def follow(self, method: str, request: Any, take: Callable[[Any], None]) -> None:
        """Read a stream of the leader for ever, across leader changes; `take` gets each message."""
        asyncio.run(self._follow(method, request, take))

    async def _follow(self, method: str, request: Any, take: Callable[[Any], None]) -> None:
        addresses = list(self.addresses)
        deadline = asyncio.get_running_loop().time() + self.timeout_seconds
        while True:
            address = addresses.pop(0)
            try:
                async for message in self._stream(address, method, request):
                    deadline = asyncio.get_running_loop().time() + self.timeout_seconds
                    take(message)
                failure: errors.Unavailable = errors.Unavailable(f"{address} ended the stream")
            except errors.Unavailable as error:
                failure = error
            hint = failure.leader_address if isinstance(failure, errors.NotLeader) else ""
            addresses = [hint] if hint else [*addresses, *(a for a in self.addresses if a not in addresses)]
            if asyncio.get_running_loop().time() > deadline:
                raise failure
            await asyncio.sleep(0.1)

    async def _stream(self, address: str, method: str, request: Any) -> AsyncIterator[Any]:
        async with channels.open_channel(address, tls_files=self.tls_files) as channel:
            stub = budget_service_pb2_grpc.BudgetServiceStub(channel)
            try:
                async for message in getattr(stub, method)(request):
                    yield message
            except grpc.RpcError as error:
                raise rpc_errors.from_rpc_error(error) from error


def _tls_files() -> tls.TlsFiles | None:
    def path(name: str) -> pathlib.Path | None:
        value = os.environ.get(f"LEASEHOLD_TLS_{name}_FILE")
        return pathlib.Path(value) if value else None

    files = tls.TlsFiles(path("CERTIFICATE"), path("KEY"), path("CA"), setting_prefix="LEASEHOLD_TLS_")
    return files if files.certificate_file or files.key_file or files.ca_file else None
