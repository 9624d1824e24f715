"""The API's own description: OpenAPI 3.1, made from the types of the answers, and a plain page of it."""

import functools
import html
import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import pydantic
from leasehold.core.node import model
from leasehold.gateway import monitoring, parameters, refusals
from leasehold.rpc import budget_documents
from typing_extensions import TypedDict

_REF: Final = "#/components/schemas/{model}"


class Health(TypedDict):
    """The gateway itself; of the allocators /metrics tells, as leasehold_allocator_up."""

    status: str
    version: str
    uptime_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One route and its verb, as the document tells it."""

    method: str
    path: str
    summary: str
    description: str
    parameters: Sequence[str] = ()
    answer: Any = None
    #: Where `answer` is None.
    media_type: str = "application/json"
    #: Statuses of its own errors, beside those that every route has.
    refusals: Sequence[int] = ()


PARAMETERS: Final[Mapping[str, tuple[str, Mapping[str, Any]]]] = {
    "node": ("A node's name; left out: every one, and for scale the only one", {"type": "string"}),
    "pool": ("A pool's name; left out: every one, and for scale the only one", {"type": "string"}),
    "target_workers": (
        "How many workers the pool shall have, MIN to MAX",
        {"type": "integer", "minimum": 0, "maximum": model.WORKERS_MAX},
    ),
    "mode": (
        "auto ends a target by hand; manual, with target_workers, is what is meant without it",
        {"type": "string", "enum": ["auto", "manual"]},
    ),
    "hold_seconds": (
        "The target ends by itself after so long; left out: it stays until it is ended",
        {"type": "number", "exclusiveMinimum": 0, "maximum": parameters.HOLD_SECONDS_MAX},
    ),
    "request_id": (
        "A name of this request: sent again, it is answered the same and applied once",
        {"type": "string", "pattern": "^[!-~]{1,64}$"},
    ),
    "budget": ("A budget's name; left out: the only one", {"type": "string"}),
    "worker_id": ("A worker's name; left out: the first active one", {"type": "string"}),
}

_FLEET: Final = (404, 429, 503, 504)

OPERATIONS: Final = (
    Operation(
        method="get",
        path="/monitoring/status",
        summary="Nodes, pools and workers, with their sums",
        description="Everything that the allocator knows of its nodes, as their agents last reported it.",
        parameters=monitoring.READING,
        answer=monitoring.StatusAnswer,
        refusals=_FLEET,
    ),
    Operation(
        method="get",
        path="/monitoring/memory",
        summary="Memory and load of each node",
        description="Bytes, and GB of 2^30 bytes. A warning above 80%.",
        parameters=monitoring.MEMORY,
        answer=monitoring.MemoryAnswer,
        refusals=_FLEET,
    ),
    Operation(
        method="get",
        path="/monitoring/workers",
        summary="Every pool and every worker",
        description="Workers that ended recently are there too, with the cause.",
        parameters=monitoring.READING,
        answer=monitoring.WorkersAnswer,
        refusals=_FLEET,
    ),
    Operation(
        method="post",
        path="/monitoring/workers/scale",
        summary="Set a pool's number of workers by hand, or end that",
        description="The target survives restarts of the agent; memory safety may hold it lower, and "
        "the pool's summary then says so. It ends by mode=auto, by /monitoring/monitoring/start, or "
        "after hold_seconds. Outside MIN..MAX: 400. Beyond memory now: 409, with the numbers. node and "
        "pool may be left out where there is one.",
        parameters=monitoring.SCALING,
        answer=monitoring.ScaleAnswer,
        refusals=(*_FLEET, 409),
    ),
    Operation(
        method="post",
        path="/monitoring/monitoring/start",
        summary="Take sizing up again",
        description="Also ends targets by hand. Of every node that is connected, or of one.",
        parameters=monitoring.SWITCHING,
        answer=monitoring.SwitchAnswer,
        refusals=(*_FLEET, 409),
    ),
    Operation(
        method="post",
        path="/monitoring/monitoring/stop",
        summary="Pause sizing",
        description="Restarts, kernel limits and the hard floor go on. It may be repeated, and survives "
        "restarts of the agent. Of every node that is connected, or of one.",
        parameters=monitoring.SWITCHING,
        answer=monitoring.SwitchAnswer,
        refusals=(*_FLEET, 409),
    ),
    Operation(
        method="get",
        path="/scaling_status",
        summary="One worker's view of a budget",
        description="The fields of `leasehold budget status -o json`.",
        parameters=monitoring.BUDGET,
        answer=budget_documents.BudgetStatus,
        refusals=_FLEET,
    ),
    Operation(
        method="get",
        path="/metrics",
        summary="Prometheus' text format",
        description="The gateway's own, gauges of nodes, pools, workers and memory, and what the leading "
        "allocator counts. Where no allocator answers it still succeeds, with leasehold_allocator_up 0.",
        media_type="text/plain",
    ),
    Operation(
        method="get",
        path="/healthz",
        summary="Whether the gateway serves",
        description="It asks nobody: a gateway without allocators is healthy.",
        answer=Health,
    ),
    Operation(
        method="get", path="/openapi.json", summary="This document", description="OpenAPI 3.1.", answer=dict
    ),
    Operation(
        method="get",
        path="/docs",
        summary="This document as a page",
        description="It loads nothing from elsewhere.",
        media_type="text/html",
    ),
)

_STATUS_TEXTS: Final = {
    400: "A parameter is wrong; `field` names it",
    403: "A page of another site sent it",
    404: "There is no such node, pool or budget",
    409: "The present state does not allow it; `metadata` has the numbers",
    413: "The body is too large",
    421: "The Host is not served here",
    429: "Too much at once: try again after Retry-After",
    500: "The gateway failed; its log has more",
    503: "No allocator leads, or the node is not connected: try again after Retry-After",
    504: "Not done in time",
}
_OF_EVERY_ROUTE: Final = (400, 421, 500)
_OF_CHANGING: Final = (403, 413)


@functools.cache
def document() -> dict[str, Any]:
    """The OpenAPI document, as JSON values; it is made once, and not to be changed."""
    schemas: dict[str, Any] = {}
    paths: dict[str, Any] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation, schemas)
    _schema(refusals.ErrorAnswer, schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Leasehold gateway",
            "version": importlib.metadata.version("leasehold"),
            "description": "Worker pools, memory and budgets over HTTP. Bytes are integers; GB are 2^30 bytes; "
            "null says that a thing is not known, or that there is none.",
        },
        "paths": paths,
        "components": {"schemas": dict(sorted(schemas.items()))},
    }


def _operation(operation: Operation, schemas: dict[str, Any]) -> dict[str, Any]:
    statuses = {*operation.refusals, *_OF_EVERY_ROUTE, *(_OF_CHANGING if operation.method != "get" else ())}
    error = {"application/json": {"schema": {"$ref": _REF.format(model="ErrorAnswer")}}}
    responses: dict[str, Any] = {"200": {"description": "Done", "content": _content(operation, schemas)}}
    responses |= {
        str(status): {"description": _STATUS_TEXTS[status], "content": error} for status in sorted(statuses)
    }
    found: dict[str, Any] = {
        "operationId": operation.path.strip("/").replace("/", "_").replace(".", "_"),
        "summary": operation.summary,
        "description": operation.description,
        "responses": responses,
    }
    if operation.parameters:
        found["parameters"] = [
            {
                "name": name,
                "in": "query",
                "required": False,
                "description": PARAMETERS[name][0],
                "schema": dict(PARAMETERS[name][1]),
            }
            for name in operation.parameters
        ]
    return found


def _content(operation: Operation, schemas: dict[str, Any]) -> dict[str, Any]:
    if operation.answer is None:
        return {operation.media_type: {"schema": {"type": "string"}}}
    if operation.answer is dict:
        return {operation.media_type: {"schema": {"type": "object"}}}
    return {operation.media_type: {"schema": _schema(operation.answer, schemas)}}


def _schema(answer: Any, schemas: dict[str, Any]) -> dict[str, str]:
    """Put the schemas of a type, and of those within it, among `schemas`; a reference to it."""
    found = pydantic.TypeAdapter(answer).json_schema(ref_template=_REF)
    schemas |= {name: _closed(each) for name, each in found.pop("$defs", {}).items()}
    name: str = answer.__name__
    schemas[name] = _closed(found)
    return {"$ref": _REF.format(model=name)}


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """Without titles that say nothing; an object has the keys that are listed, and no others."""
    schema.pop("title", None)
    if "properties" in schema:
        schema["additionalProperties"] = False
        for each in schema["properties"].values():
            each.pop("title", None)
    return schema


_STYLE: Final = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:56rem;margin:2rem auto;padding:0 1rem}"
    "h2{font-size:1.1rem;margin:2rem 0 .2rem}code,h2{font-family:ui-monospace,monospace}"
    "table{border-collapse:collapse;margin:.5rem 0}td,th{border:1px solid #bbb;padding:.2rem .6rem;"
    "text-align:left;vertical-align:top}"
)
#: For the page alone: nothing is loaded, run or framed but its own style.
PAGE_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'"


def page() -> str:
    """The document for people, as one HTML page without anything from elsewhere."""
    spec = document()
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>Leasehold gateway</title>",
        f"<style>{_STYLE}</style><h1>Leasehold gateway {html.escape(spec['info']['version'])}</h1>",
        f"<p>{html.escape(spec['info']['description'])} <a href='/openapi.json'>openapi.json</a></p>",
    ]
    for path, methods in spec["paths"].items():
        for method, operation in methods.items():
            parts += [f"<h2>{method.upper()} {html.escape(path)}</h2>", _section(operation)]
    parts.append("<h1>Answers</h1>")
    for name, schema in spec["components"]["schemas"].items():
        parts += [f"<h2 id='{html.escape(name)}'>{html.escape(name)}</h2>", _keys(schema)]
    return "".join(parts) + "</html>"


def _section(operation: Mapping[str, Any]) -> str:
    told = f"<p>{html.escape(operation['summary'])}. {html.escape(operation['description'])}</p>"
    rows = [
        f"<tr><td><code>{html.escape(each['name'])}</code><td>{html.escape(each['description'])}"
        for each in operation.get("parameters", ())
    ]
    parameters_table = f"<table><tr><th>parameter<th>meaning{''.join(rows)}</table>" if rows else ""
    answers = [
        f"<tr><td>{status}<td>{html.escape(each['description'])}<td>{_link(each)}"
        for status, each in operation["responses"].items()
    ]
    return f"{told}{parameters_table}<table><tr><th>status<th>meaning<th>body{''.join(answers)}</table>"


def _link(response: Mapping[str, Any]) -> str:
    media_type, content = next(iter(response["content"].items()))
    return _type(content["schema"]) if media_type == "application/json" else f"<code>{media_type}</code>"


def _keys(schema: Mapping[str, Any]) -> str:
    told = f"<p>{html.escape(schema.get('description', ''))}</p>"
    rows = [
        f"<tr><td><code>{html.escape(key)}</code><td>{_type(each)}"
        for key, each in schema.get("properties", {}).items()
    ]
    if rows:
        return f"{told}<table><tr><th>key<th>type{''.join(rows)}</table>"
    return f"{told}<p>{_type(schema)}</p>"


def _type(schema: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        name = html.escape(schema["$ref"].rpartition("/")[2])
        return f"<a href='#{name}'>{name}</a>"
    if "anyOf" in schema:
        return " or ".join(_type(each) for each in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(f"<code>{html.escape(str(each))}</code>" for each in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}"
    if isinstance(schema.get("additionalProperties"), dict):
        return f"map of {_type(schema['additionalProperties'])}"
    return html.escape(str(schema.get("type", "any")))
