"""Whatever is asked, the gateway answers as its document says, and what it refuses changes nothing."""

import asyncio
import math
from typing import Any

import fake_fleet
import gateway_scene
import httpx
from hypothesis import given, settings
from hypothesis import strategies as st
from leasehold.gateway import openapi

ROUTES = [(operation.method.upper(), operation.path) for operation in openapi.OPERATIONS]
GOOD: dict[str, list[str]] = {
    "node": ["r620-1", "r620-2"],
    "pool": ["transcription", "summarization"],
    "target_workers": ["0", "1", "2", "6", "7"],
    "mode": ["auto", "manual"],
    "hold_seconds": ["0.5", "60", "2592000"],
    "request_id": ["a", "nightly-1"],
    "budget": ["llm-api"],
    "worker_id": ["w1"],
}
NASTY = st.one_of(
    st.text(max_size=70),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(["", "../etc/passwd", "*", "r620-1\n", "1e999", "٤", "%00", "x" * 5000, "null", "-0"]),
)


@st.composite
def queries(draw: st.DrawFn) -> list[tuple[str, str]]:
    names = st.one_of(st.sampled_from(sorted(GOOD)), st.text(max_size=20))
    chosen = draw(st.lists(names, max_size=5))
    return [
        (name, draw(st.one_of(st.sampled_from(GOOD[name]), NASTY) if name in GOOD else NASTY))
        for name in chosen
    ]


METHODS = st.sampled_from(["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD", "TRACE"])
HEADERS = st.dictionaries(
    st.sampled_from(["origin", "sec-fetch-site", "referer", "content-type", "x-forwarded-host", "cookie"]),
    st.one_of(
        st.sampled_from(["http://127.0.0.1:8000", "https://evil.example", "null", "same-origin", "cross-site"]),
        st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40),
    ),
    max_size=3,
)
BODIES = st.sampled_from([b"", b"{}", b'{"target_workers": 4}', b"\xff" * 100, b" " * 70_000])


def faults_of(response: httpx.Response, path: str) -> list[str]:
    """Where an answer is not what the document says of it."""
    document = openapi.document()
    operation = document["paths"].get(path, {}).get(response.request.method.lower())
    if response.status_code == 200:
        if operation is None:
            return []  # HEAD
        ((media_type, content),) = operation["responses"]["200"]["content"].items()
        if media_type != "application/json":
            return []
        return gateway_scene.faults(response.json(), content["schema"], document)
    told = [] if response.status_code != 503 or "retry-after" in response.headers else ["no Retry-After"]
    if operation is not None and str(response.status_code) not in operation["responses"]:
        told.append(f"{response.status_code} is not documented for {path}")
    if response.request.method == "HEAD":
        return told
    error = {"$ref": "#/components/schemas/ErrorAnswer"}
    return told + gateway_scene.faults(response.json(), error, document)


def state(fleet: fake_fleet.FakeFleet) -> list[bytes]:
    return [host.status().SerializeToString(deterministic=True) for host in fleet.hosts.values()]


def ask(method: str, path: str, **request: Any) -> tuple[httpx.Response, fake_fleet.FakeFleet, bool]:
    """The answer, the fleet, and whether anything was changed."""
    fleet = gateway_scene.two()

    async def answered() -> tuple[httpx.Response, bool]:
        before = state(fleet)
        async with gateway_scene.client(fleet) as calls:
            response = await calls.request(method, path, **request)
        return response, state(fleet) != before

    response, is_changed = asyncio.run(answered())
    return response, fleet, is_changed


@settings(max_examples=300)
@given(st.sampled_from(ROUTES), queries())
def test_any_query_is_answered_as_the_document_says(
    route: tuple[str, str], query: list[tuple[str, str]]
) -> None:
    method, path = route

    response, fleet, is_changed = ask(method, path, params=query)

    assert response.status_code < 500
    assert faults_of(response, path) == []
    if method == "GET" or response.status_code != 200:
        assert not is_changed
        assert [host.applied for host in fleet.hosts.values()] == [[], []]


@settings(max_examples=300)
@given(METHODS, st.sampled_from(ROUTES), HEADERS, BODIES)
def test_any_verb_header_and_body_is_answered_and_only_what_is_allowed_changes_anything(
    method: str, route: tuple[str, str], headers: dict[str, str], body: bytes
) -> None:
    listed, path = route
    query = {"target_workers": "2", "node": "r620-1"} if path.endswith("scale") else {}

    response, _, is_changed = ask(method, path, params=query, headers=headers, content=body)

    assert response.status_code in (200, 400, 403, 405, 413)
    assert faults_of(response, path) == []
    if method != listed or response.status_code != 200:
        assert not is_changed
    if method not in ("GET", "HEAD", "POST"):
        assert response.status_code != 200
    if headers.get("origin", "http://127.0.0.1:8000") != "http://127.0.0.1:8000":
        assert not is_changed


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_a_hold_is_a_positive_number_of_seconds_or_refused(seconds: float) -> None:
    response, _, is_changed = ask(
        "POST",
        "/monitoring/workers/scale",
        params={"target_workers": "2", "node": "r620-1", "hold_seconds": repr(seconds)},
    )

    is_good = math.isfinite(seconds) and 0 < seconds <= 30 * 86_400
    assert (response.status_code == 200) is is_good
    assert is_changed is is_good
