"""What a request passes before any route: Host, Origin, verbs, sizes; and what every answer carries."""

import gateway_scene
import httpx
import pytest

SCALE = "/monitoring/workers/scale?target_workers=5"


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.0.0.1:8000",
        "localhost:8000",
        "LOCALHOST",
        "[::1]:8000",
        "[::1]",
        "gateway.example.org",
    ],
)
async def test_a_name_of_this_gateway_is_served(host: str) -> None:
    async with gateway_scene.client(gateway_scene.fleet()) as calls:
        assert (await calls.get("/healthz", headers={"host": host})).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "evil.example:8000", "10.0.0.1", "localhost.", "0.0.0.0"]
)
@pytest.mark.parametrize("url", ["/healthz", "/monitoring/status", "/metrics", "/none"])
async def test_another_name_is_421_whatever_is_asked_since_it_may_be_rebound(host: str, url: str) -> None:
    fleet = gateway_scene.fleet()

    async with gateway_scene.client(fleet) as calls:
        response = await calls.get(url, headers={"host": host})

    assert (response.status_code, response.json()["error"]["reason"]) == (421, "HOST_NOT_ALLOWED")
    assert fleet.calls == []


@pytest.mark.parametrize("host", ["", "a b", "user@localhost", "localhost:port", "local/x", "[::1", "ho\xffst"])
async def test_a_host_that_is_none_is_400(host: str) -> None:
    async with gateway_scene.client(gateway_scene.fleet()) as calls:
        response = await calls.get("/healthz", headers=[(b"host", host.encode("latin-1"))])

    assert (response.status_code, response.json()["error"]["reason"]) == (400, "BAD_HOST")


async def test_two_hosts_are_400() -> None:
    async with gateway_scene.client(gateway_scene.fleet()) as calls:
        response = await calls.get("/healthz", headers=[("host", "localhost"), ("host", "evil.example")])

    assert response.status_code == 400


FOREIGN: list[dict[str, str]] = [
    {"origin": "https://evil.example"},
    {"origin": "null"},
    {"origin": "http://localhost:8000"},
    {"origin": "http://127.0.0.1:8001"},
    {"origin": "https://127.0.0.1:8000"},
    {"origin": "http://127.0.0.1:8000.evil.example"},
    {"origin": "http://127.0.0.1:8000@evil.example"},
    {"origin": ""},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
    {"origin": "http://127.0.0.1:8000", "sec-fetch-site": "cross-site"},
]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
@pytest.mark.parametrize("url", [SCALE, "/monitoring/monitoring/stop", "/monitoring/monitoring/start"])
async def test_a_page_of_another_site_changes_nothing(headers: dict[str, str], url: str) -> None:
    fleet = gateway_scene.fleet()

    async with gateway_scene.client(fleet) as calls:
        response = await calls.post(url, headers=headers)

    assert (response.status_code, response.json()["error"]["reason"]) == (403, "FOREIGN_ORIGIN")
    assert fleet.calls == []
    assert fleet.hosts["r620-1"].applied == []


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"origin": "http://127.0.0.1:8000"},
        {"origin": "http://127.0.0.1:8000", "sec-fetch-site": "same-origin"},
        {"sec-fetch-site": "none"},
        {"origin": "HTTP://LOCALHOST", "host": "localhost"},
        {"origin": "http://localhost:80", "host": "localhost"},
    ],
    ids=str,
)
async def test_a_program_or_a_page_of_the_gateway_itself_may_change_things(headers: dict[str, str]) -> None:
    async with gateway_scene.client(gateway_scene.fleet()) as calls:
        assert (await calls.post(SCALE, headers=headers)).status_code == 200


async def test_reading_needs_no_origin_and_no_answer_allows_another_site_to_read_it() -> None:
    async with gateway_scene.client(gateway_scene.fleet()) as calls:
        for url in ("/monitoring/status", "/none", "/docs"):
            response = await calls.get(url, headers={"origin": "https://evil.example"})
            assert response.status_code in (200, 404)
            assert not [name for name in response.headers if name.startswith("access-control-")]
            assert response.headers["x-content-type-options"] == "nosniff"
            assert response.headers["cache-control"] == "no-store"
            assert response.headers["x-frame-options"] == "DENY"
        preflight = await calls.options(
            SCALE, headers={"origin": "http://127.0.0.1:8000", "access-control-request-method": "POST"}
        )
        assert preflight.status_code == 405
        assert not [name for name in preflight.headers if name.startswith("access-control-")]


@pytest.mark.parametrize(
    ("method", "url", "allow"),
    [
        ("GET", SCALE, {"POST"}),
        ("PUT", SCALE, {"POST"}),
        ("DELETE", "/monitoring/status", {"GET", "HEAD"}),
        ("POST", "/monitoring/status", {"GET", "HEAD"}),
        ("POST", "/metrics", {"GET", "HEAD"}),
        ("TRACE", "/healthz", {"GET", "HEAD"}),
        ("BREW", "/healthz", {"GET", "HEAD"}),
    ],
)
async def test_another_verb_is_405_and_names_those_that_are_taken(
    method: str, url: str, allow: set[str]
) -> None:
    fleet = gateway_scene.fleet()

    async with gateway_scene.client(fleet) as calls:
        response = await calls.request(method, url)

    assert (response.status_code, response.json()["error"]["reason"]) == (405, "METHOD_NOT_ALLOWED")
    assert set(response.headers["allow"].replace(" ", "").split(",")) == allow
    assert fleet.calls == []


async def test_an_unknown_route_is_404_and_no_slash_leads_elsewhere() -> None:
    async with gateway_scene.client(gateway_scene.fleet()) as calls:
        for url in ("/", "/monitoring", "/monitoring/status/", "/monitoring/workers/scale/", "//healthz"):
            response = await calls.get(url)
            assert (response.status_code, response.json()["error"]["reason"]) == (404, "NO_SUCH_ROUTE")


async def test_head_is_get_without_the_body() -> None:
    async with gateway_scene.client(gateway_scene.fleet()) as calls:
        response = await calls.head("/healthz")

    assert response.status_code == 200


@pytest.mark.parametrize("body", [b"", b"{}", b"null", b" {} "])
async def test_a_body_that_says_nothing_is_passed_over(body: bytes) -> None:
    async with gateway_scene.client(gateway_scene.fleet()) as calls:
        assert (await calls.post(SCALE, content=body)).status_code == 200


async def test_a_body_that_says_something_is_refused_since_it_would_not_be_heard() -> None:
    fleet = gateway_scene.fleet()

    async with gateway_scene.client(fleet) as calls:
        response = await calls.post("/monitoring/monitoring/stop", json={"node": "r620-1"})

    assert (response.status_code, response.json()["error"]["reason"]) == (400, "BODY_NOT_TAKEN")
    assert fleet.calls == []


async def test_a_body_that_is_too_large_is_413_told_before_or_not() -> None:
    fleet = gateway_scene.fleet()

    async def chunks() -> object:
        for _ in range(100):
            yield b" " * 1024

    async with gateway_scene.client(fleet, body_bytes_max=10_000) as calls:
        told = await calls.post(SCALE, content=b" " * 10_001)
        streamed = await calls.post(SCALE, content=chunks())  # type: ignore[arg-type]
        nonsense = await calls.post(SCALE, headers={"content-length": "-5"})

    assert [each.status_code for each in (told, streamed, nonsense)] == [413, 413, 413]
    assert told.json()["error"]["reason"] == "BODY_TOO_LARGE"
    assert fleet.calls == []


async def test_what_strangers_send_does_not_become_a_label_of_a_metric() -> None:
    async with gateway_scene.client(gateway_scene.fleet()) as calls:
        for number in range(20):
            await calls.request(f"VERB{number}", f"/path-{number}")
        text = (await calls.get("/metrics")).text

    assert 'leasehold_gateway_requests_total{route="other",method="other",status="404"} 20' in text
    assert "path-1" not in text


async def test_a_websocket_is_refused() -> None:
    sent: list[object] = []

    async def receive() -> dict[str, object]:
        return {"type": "websocket.connect"}

    async def send(message: object) -> None:
        sent.append(message)

    async with gateway_scene.client(gateway_scene.fleet()) as calls:
        transport = calls._transport
        assert isinstance(transport, httpx.ASGITransport)
        await transport.app({"type": "websocket", "path": "/", "headers": []}, receive, send)

    assert sent == [{"type": "websocket.close", "code": 1008}]
