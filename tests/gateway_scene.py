"""The gateway's application on a made-up fleet, without a socket; and a strict reader of JSON schemas."""

import contextlib
import re
from collections.abc import AsyncIterator, Mapping
from typing import Any

import fake_fleet
import httpx
from leasehold.gateway import allocators, app
from leasehold.observe import metrics

HOSTS = frozenset({"127.0.0.1", "localhost", "::1", "gateway.example.org"})
BASE = "http://127.0.0.1:8000"


class FakeAllocators(allocators.Allocators):
    """What the fleet answers, without gRPC between."""

    def __init__(self, fleet: fake_fleet.FakeFleet) -> None:
        self.fleet = fleet
        self._order_seconds = 1.0
        self.timeout_seconds = 1.0

    async def call(self, method: str, request: Any, *, timeout_seconds: float | None = None) -> Any:
        """As `Allocators.call`."""
        await self.fleet.wait()
        return self.fleet.answer(method, request)


def fleet() -> fake_fleet.FakeFleet:
    """One R620 with one pool of three workers; the second node of `two` has two pools and little memory."""
    host = fake_fleet.FakeHost("r620-1")
    host.add_pool("transcription", 3)
    return fake_fleet.FakeFleet(host)


def two() -> fake_fleet.FakeFleet:
    """Two nodes; the second has two pools and little memory."""
    second = fake_fleet.FakeHost("r620-2", available_gb=6.0)
    second.add_pool("summarization", 1)
    second.add_pool("transcription", 2)
    first = fleet().hosts["r620-1"]
    return fake_fleet.FakeFleet(first, second)


@contextlib.asynccontextmanager
async def client(of: fake_fleet.FakeFleet, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    """Calls to the application as if by HTTP."""
    settings = {"allowed_hosts": HOSTS, "registry": metrics.Registry(), **settings}
    application = app.build(FakeAllocators(of), **settings)
    transport = httpx.ASGITransport(application)
    async with httpx.AsyncClient(transport=transport, base_url=BASE) as calls:
        yield calls


_TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
_KNOWN = {
    "type",
    "properties",
    "required",
    "additionalProperties",
    "items",
    "enum",
    "anyOf",
    "$ref",
    "description",
    "pattern",
}


def faults(value: Any, schema: Mapping[str, Any], document: Mapping[str, Any], where: str = "$") -> list[str]:
    """Where a value differs from its schema; a keyword that is not understood here is a fault too."""
    unknown = set(schema) - _KNOWN
    if unknown:
        return [f"{where}: the schema has {unknown}"]
    if "$ref" in schema:
        name = schema["$ref"].removeprefix("#/components/schemas/")
        return faults(value, document["components"]["schemas"][name], document, where)
    if "anyOf" in schema:
        found = [faults(value, each, document, where) for each in schema["anyOf"]]
        return [] if any(not each for each in found) else min(found, key=len)
    told: list[str] = []
    if "type" in schema and (
        not isinstance(value, _TYPES[schema["type"]])
        or (isinstance(value, bool) and schema["type"] != "boolean")
    ):
        return [f"{where}: {value!r} is no {schema['type']}"]
    if "enum" in schema and value not in schema["enum"]:
        told.append(f"{where}: {value!r} is not in {schema['enum']}")
    if "pattern" in schema and not re.search(schema["pattern"], value):
        told.append(f"{where}: {value!r} is not {schema['pattern']}")
    if isinstance(value, list) and "items" in schema:
        for number, item in enumerate(value):
            told += faults(item, schema["items"], document, f"{where}[{number}]")
    if isinstance(value, dict):
        told += _object_faults(value, schema, document, where)
    return told


def _object_faults(
    value: Mapping[str, Any], schema: Mapping[str, Any], document: Mapping[str, Any], where: str
) -> list[str]:
    told = [f"{where}: {name} is missing" for name in schema.get("required", ()) if name not in value]
    properties, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    for name, item in value.items():
        if name in properties:
            told += faults(item, properties[name], document, f"{where}.{name}")
        elif others is False:
            told.append(f"{where}: {name} is not in the schema")
        elif isinstance(others, dict):
            told += faults(item, others, document, f"{where}.{name}")
    return told
