"""Every route on a made-up fleet: answers, bad input, and what the document says of them."""

import asyncio
from typing import Any

import fake_fleet
import gateway_scene
import pytest
from leasehold.api.node.v1 import node_pb2
from leasehold.core import errors
from leasehold.gateway import openapi

READS = ["/monitoring/status", "/monitoring/memory", "/monitoring/workers", "/scaling_status"]
CHANGES = ["/monitoring/workers/scale", "/monitoring/monitoring/start", "/monitoring/monitoring/stop"]


async def answered(fleet: fake_fleet.FakeFleet, method: str, url: str, **options: Any) -> tuple[int, Any]:
    async with gateway_scene.client(fleet) as calls:
        response = await calls.request(method, url, **options)
    return response.status_code, response.json()


async def test_status_has_nodes_pools_workers_and_their_sums() -> None:
    status, body = await answered(gateway_scene.two(), "GET", "/monitoring/status")

    assert status == 200
    assert [node["name"] for node in body["nodes"]] == ["r620-1", "r620-2"]
    assert body["totals"]["workers_running"] == 6
    assert body["totals"]["nodes_ready"] == 2
    assert body["totals"]["memory_total_gb"] == 128.0
    assert body["totals"]["memory_total_bytes"] == 128 * 2**30
    assert body["nodes"][1]["status"]["pools"][0]["workers"][0]["name"] == "summarization_1@r620-2"
    assert body["warnings"] == ["r620-2: memory 58.0/64.0 GB (90.6%) is above 80%"]


async def test_status_of_one_pool_has_only_that_and_of_an_unknown_one_tells_which_there_are() -> None:
    fleet = gateway_scene.two()

    _, body = await answered(fleet, "GET", "/monitoring/status?pool=summarization")
    status, refused = await answered(fleet, "GET", "/monitoring/status?pool=translation")

    assert [node["name"] for node in body["nodes"]] == ["r620-2"]
    assert body["totals"]["workers_running"] == 1
    assert status == 404
    assert refused["error"]["message"] == "there is no pool translation; there are summarization, transcription"


async def test_a_lost_node_is_shown_with_its_last_report_and_not_counted() -> None:
    fleet = gateway_scene.two()
    fleet.states["r620-1"] = node_pb2.NODE_STATE_LOST

    _, body = await answered(fleet, "GET", "/monitoring/status")

    assert body["nodes"][0]["state"] == "lost"
    assert body["totals"]["nodes_lost"] == 1
    assert body["totals"]["workers_running"] == 3
    assert "r620-1: has not reported for 1 s; its workers may well run" in body["warnings"]


async def test_memory_is_in_bytes_and_in_gb() -> None:
    _, body = await answered(gateway_scene.fleet(), "GET", "/monitoring/memory")

    (node,) = body["nodes"]
    assert (node["node"], node["state"], node["load_per_core"]) == ("r620-1", "ready", 0.5)
    assert (node["memory"]["total_bytes"], node["memory"]["total_gb"]) == (64 * 2**30, 64.0)
    assert (node["memory"]["available_gb"], node["memory"]["used_percent"]) == (32.0, 50.0)
    assert node["memory"]["pressure_full_percent"] is None


async def test_workers_are_listed_beside_their_pools() -> None:
    _, body = await answered(gateway_scene.two(), "GET", "/monitoring/workers?node=r620-2")

    assert [pool["name"] for pool in body["pools"]] == ["summarization", "transcription"]
    assert "workers" not in body["pools"][0]
    worker = body["workers"][0]
    assert (worker["name"], worker["state"], worker["pid"]) == ("summarization_1@r620-2", "running", 2001)
    assert (worker["is_busy"], worker["task_id"], worker["exit"]) == (True, "task-1", None)
    assert worker["memory_source"] == "cgroup_v2"


async def test_more_nodes_than_a_page_are_all_there() -> None:
    hosts = [fake_fleet.FakeHost(f"n{number:04}") for number in range(1203)]

    _, body = await answered(fake_fleet.FakeFleet(*hosts), "GET", "/monitoring/memory")

    assert len(body["nodes"]) == 1203


async def test_scale_sets_a_target_by_hand_on_the_only_pool() -> None:
    fleet = gateway_scene.fleet()

    status, body = await answered(fleet, "POST", "/monitoring/workers/scale?target_workers=4")

    assert status == 200
    assert (body["node"], body["pool"]["name"]) == ("r620-1", "transcription")
    assert (body["pool"]["mode"], body["pool"]["manual_target"], body["pool"]["desired"]) == ("manual", 4, 4)
    assert fleet.hosts["r620-1"].pools["transcription"].running == 4
    assert len(body["request_id"]) == 32


async def test_scale_down_names_the_workers_that_stop() -> None:
    _, body = await answered(gateway_scene.fleet(), "POST", "/monitoring/workers/scale?target_workers=1")

    assert body["stopping_workers"] == ["transcription_2@r620-1", "transcription_3@r620-1"]


async def test_a_target_holds_for_so_long_and_auto_ends_it() -> None:
    fleet = gateway_scene.fleet()

    _, held = await answered(fleet, "POST", "/monitoring/workers/scale?target_workers=2&hold_seconds=90.5")
    _, auto = await answered(fleet, "POST", "/monitoring/workers/scale?mode=auto")

    assert held["pool"]["hold_remaining_seconds"] == 90.5
    assert (auto["pool"]["mode"], auto["pool"]["manual_target"]) == ("auto", None)


async def test_the_same_request_id_applies_once() -> None:
    fleet = gateway_scene.fleet()
    url = "/monitoring/workers/scale?target_workers=4&request_id=nightly-1"

    first = await answered(fleet, "POST", url)
    again = await answered(fleet, "POST", url)

    assert first == again
    assert first[1]["request_id"] == "nightly-1"
    assert len(fleet.hosts["r620-1"].applied) == 1


async def test_a_target_beyond_memory_is_409_with_the_numbers_and_changes_nothing() -> None:
    fleet = gateway_scene.two()

    status, body = await answered(
        fleet, "POST", "/monitoring/workers/scale?target_workers=6&node=r620-2&pool=transcription"
    )

    assert status == 409
    assert body["error"]["reason"] == "FAILED_PRECONDITION"
    assert body["error"]["message"] == "6 workers need 16 GB more, there are 2 GB"
    assert body["error"]["metadata"] == {"needed_bytes": str(16 * 2**30), "room_bytes": str(2 * 2**30)}
    assert fleet.hosts["r620-2"].pools["transcription"].running == 2


@pytest.mark.parametrize("target", [0, 7, 999])
async def test_a_target_outside_min_and_max_is_400_and_names_them(target: int) -> None:
    fleet = gateway_scene.fleet()

    status, body = await answered(fleet, "POST", f"/monitoring/workers/scale?target_workers={target}")

    assert status == 400
    assert body["error"]["field"] == "target_workers"
    assert "1 to 6 (MIN_WORKERS to MAX_WORKERS)" in body["error"]["message"]
    assert fleet.hosts["r620-1"].applied == []


@pytest.mark.parametrize(
    ("query", "field", "words"),
    [
        ("", "target_workers", "is missing"),
        ("target_workers=", "target_workers", "is empty"),
        ("target_workers=four", "target_workers", "'four' is not a whole number"),
        ("target_workers=4.0", "target_workers", "not a whole number"),
        ("target_workers=-1", "target_workers", "-1 is not 0 to 1000"),
        ("target_workers=99999999999999999999", "target_workers", "not a whole number"),
        ("target_workers=４", "target_workers", "not a whole number"),
        ("target_workers=4&target_workers=5", "target_workers", "given twice"),
        ("target_worker=4", "target_worker", "did you mean target_workers?"),
        ("target_workers=4&node=../etc", "node", "is not a name"),
        ("target_workers=4&pool=A/B", "pool", "is not a name"),
        ("target_workers=4&pool=", "pool", "is empty"),
        ("target_workers=4&mode=automatic", "mode", "neither auto nor manual"),
        ("target_workers=4&mode=auto", "mode", "takes no target_workers"),
        ("target_workers=4&hold_seconds=0", "hold_seconds", "above 0"),
        ("target_workers=4&hold_seconds=nan", "hold_seconds", "above 0"),
        ("target_workers=4&hold_seconds=inf", "hold_seconds", "above 0"),
        ("target_workers=4&hold_seconds=soon", "hold_seconds", "above 0"),
        ("mode=auto&hold_seconds=5", "hold_seconds", "no end to hold for"),
        (f"target_workers=4&request_id={'x' * 65}", "request_id", "1 to 64 printable"),
        ("target_workers=4&request_id=a%20b", "request_id", "1 to 64 printable"),
        ("target_workers=4&request_id=a%00b", "request_id", "1 to 64 printable"),
    ],
)
async def test_a_wrong_parameter_of_scale_is_400_by_its_name_and_asks_nobody(
    query: str, field: str, words: str
) -> None:
    fleet = gateway_scene.fleet()

    status, body = await answered(fleet, "POST", f"/monitoring/workers/scale?{query}")

    assert status == 400
    assert (body["error"]["reason"], body["error"]["field"]) == ("INVALID_ARGUMENT", field)
    assert words in body["error"]["message"]
    assert fleet.calls == []


async def test_where_there_are_several_nodes_or_pools_the_one_must_be_named() -> None:
    fleet = gateway_scene.two()

    no_node = await answered(fleet, "POST", "/monitoring/workers/scale?target_workers=1")
    no_pool = await answered(fleet, "POST", "/monitoring/workers/scale?target_workers=1&node=r620-2")

    assert (no_node[0], no_node[1]["error"]["field"]) == (400, "node")
    assert "r620-1, r620-2" in no_node[1]["error"]["message"]
    assert (no_pool[0], no_pool[1]["error"]["field"]) == (400, "pool")
    assert "summarization, transcription" in no_pool[1]["error"]["message"]


@pytest.mark.parametrize(
    "url",
    [
        "/monitoring/status?node=r620-9",
        "/monitoring/memory?node=r620-9",
        "/monitoring/workers?node=r620-9",
        "/monitoring/workers?pool=none",
        "/scaling_status?budget=none",
    ],
)
async def test_what_does_not_exist_is_404(url: str) -> None:
    status, body = await answered(gateway_scene.fleet(), "GET", url)

    assert (status, body["error"]["reason"]) == (404, "NOT_FOUND")


async def test_sizing_is_paused_and_taken_up_again_on_every_node() -> None:
    fleet = gateway_scene.two()

    _, paused = await answered(fleet, "POST", "/monitoring/monitoring/stop")
    _, status = await answered(fleet, "GET", "/monitoring/status")
    _, started = await answered(fleet, "POST", "/monitoring/monitoring/start?node=r620-2&pool=summarization")

    assert [(node["node"], len(node["pools"])) for node in paused["nodes"]] == [("r620-1", 1), ("r620-2", 2)]
    assert {pool["mode"] for node in paused["nodes"] for pool in node["pools"]} == {"paused"}
    assert status["totals"]["pools_paused"] == 3
    assert [pool["mode"] for pool in started["nodes"][0]["pools"]] == ["auto"]
    assert started["not_reached"] == []


async def test_pausing_all_tells_which_nodes_have_not_heard_of_it() -> None:
    fleet = gateway_scene.two()
    fleet.states["r620-1"] = node_pb2.NODE_STATE_LOST

    status, body = await answered(fleet, "POST", "/monitoring/monitoring/stop")

    assert status == 200
    assert ([node["node"] for node in body["nodes"]], body["not_reached"]) == (["r620-2"], ["r620-1"])


async def test_pausing_a_pool_everywhere_passes_over_nodes_without_it() -> None:
    fleet = gateway_scene.two()

    status, body = await answered(fleet, "POST", "/monitoring/monitoring/stop?pool=summarization")
    none, refused = await answered(fleet, "POST", "/monitoring/monitoring/stop?pool=none")

    assert (status, [node["node"] for node in body["nodes"]]) == (200, ["r620-2"])
    assert (none, refused["error"]["reason"]) == (404, "NOT_FOUND")
    assert refused["error"]["metadata"] == {"refused_by": "r620-1,r620-2", "done_by": ""}


async def test_pausing_where_no_node_is_connected_is_503() -> None:
    fleet = gateway_scene.fleet()
    fleet.states["r620-1"] = node_pb2.NODE_STATE_LOST

    status, body = await answered(fleet, "POST", "/monitoring/monitoring/stop")

    assert status == 503
    assert "r620-1" in body["error"]["message"]


async def test_scaling_status_has_exactly_the_fields_that_programs_know() -> None:
    status, body = await answered(gateway_scene.fleet(), "GET", "/scaling_status?worker_id=w2")

    assert status == 200
    assert body == {
        "worker_id": "w2",
        "total_workers": 2,
        "active_workers": 1,
        "active_worker_ids": ["w1"],
        "is_scaling_enabled": True,
        "base_allocation": {
            "max_concurrent_requests": None,
            "rpm_limit": 400.0,
            "tpm_limit": None,
            "num_workers": None,
            "images": 5.0,
        },
        "current_allocation": {
            "max_concurrent_requests": None,
            "rpm_limit": 800.0,
            "tpm_limit": None,
            "num_workers": None,
            "images": 10.0,
        },
        "utilization_ratio": {"concurrent": None, "rpm": 2.0, "tpm": None, "workers": None, "images": 2.0},
    }


async def test_scaling_status_of_several_budgets_names_the_choice() -> None:
    fleet = gateway_scene.fleet()
    fleet.budgets = ["a", "b"]

    status, body = await answered(fleet, "GET", "/scaling_status")
    fleet.budgets = []
    none, _ = await answered(fleet, "GET", "/scaling_status")

    assert (status, body["error"]["field"], body["error"]["metadata"]) == (400, "budget", {"choices": "a,b"})
    assert none == 404


@pytest.mark.parametrize("url", READS)
async def test_an_allocator_that_is_away_is_503_with_a_time_to_try_again(url: str) -> None:
    fleet = gateway_scene.fleet()
    fleet.failure = errors.Unavailable("no leader answered", retry_after_seconds=2.5)

    async with gateway_scene.client(fleet) as calls:
        response = await calls.get(url)

    assert (response.status_code, response.headers["retry-after"]) == (503, "3")
    assert response.json()["error"]["message"] == "no leader answered"


@pytest.mark.parametrize(
    ("failure", "status", "retry_after"),
    [
        (errors.NotLeader(""), 503, "1"),
        (errors.PostgresUnavailable(), 503, "1"),
        (errors.StaleEpoch(), 503, "1"),
        (errors.ResourceExhausted("full", retry_after_seconds=7), 429, "7"),
        (errors.FailedPrecondition("draining"), 409, None),
        (errors.DeadlineExceeded(), 504, None),
        (errors.PermissionDenied(), 403, None),
        (errors.Unimplemented(), 501, None),
        (errors.LeaseholdError("odd"), 500, None),
    ],
)
async def test_each_kind_of_error_has_its_status(
    failure: errors.LeaseholdError, status: int, retry_after: str | None
) -> None:
    fleet = gateway_scene.fleet()
    fleet.failure = failure

    async with gateway_scene.client(fleet) as calls:
        response = await calls.post("/monitoring/workers/scale?target_workers=2")

    assert response.status_code == status
    assert response.headers.get("retry-after") == retry_after
    assert response.json()["error"]["reason"] == failure.reason


async def test_a_mistake_of_the_gateway_itself_is_500_without_its_inside() -> None:
    fleet = gateway_scene.fleet()
    fleet.failure = ValueError("a secret")  # type: ignore[assignment]

    status, body = await answered(fleet, "GET", "/monitoring/status")

    assert (status, body["error"]["reason"]) == (500, "INTERNAL")
    assert "secret" not in body["error"]["message"]


async def test_a_request_that_takes_too_long_is_504() -> None:
    fleet = gateway_scene.fleet()
    fleet.gate = asyncio.Event()

    async with gateway_scene.client(fleet, timeout_seconds=0.05) as calls:
        response = await calls.get("/monitoring/status")

    assert (response.status_code, response.json()["error"]["reason"]) == (504, "DEADLINE_EXCEEDED")


async def test_the_gateway_is_healthy_whatever_the_allocators_are() -> None:
    fleet = gateway_scene.fleet()
    fleet.failure = errors.Unavailable("away")

    status, body = await answered(fleet, "GET", "/healthz")

    assert (status, body["status"]) == (200, "ok")
    assert fleet.calls == []


async def test_the_page_of_the_document_names_every_route_and_loads_nothing() -> None:
    async with gateway_scene.client(gateway_scene.fleet()) as calls:
        response = await calls.get("/docs")

    assert response.status_code == 200
    assert "default-src 'none'" in response.headers["content-security-policy"]
    for operation in openapi.OPERATIONS:
        assert f"{operation.method.upper()} {operation.path}</h2>" in response.text
    for mark in ("<script", "src=", "http://", "https://", "@import", "url("):
        assert mark not in response.text


# The document


async def test_the_document_lists_exactly_the_routes_that_are_served() -> None:
    async with gateway_scene.client(gateway_scene.fleet()) as calls:
        document = (await calls.get("/openapi.json")).json()
        listed = {(path, verb) for path, verbs in document["paths"].items() for verb in verbs}
        served = set()
        for path in document["paths"]:
            for verb in ("get", "post", "put", "patch", "delete", "options", "trace"):
                response = await calls.request(verb.upper(), path)
                if response.status_code not in (404, 405):
                    served.add((path, verb))

    assert document["openapi"] == "3.1.0"
    assert listed == served
    assert {path for path, _ in listed} == {*READS, *CHANGES, "/metrics", "/healthz", "/openapi.json", "/docs"}


URLS = {
    ("/monitoring/status", "get"): "/monitoring/status",
    ("/monitoring/memory", "get"): "/monitoring/memory",
    ("/monitoring/workers", "get"): "/monitoring/workers",
    ("/monitoring/workers/scale", "post"): "/monitoring/workers/scale?target_workers=4&node=r620-1",
    ("/monitoring/monitoring/start", "post"): "/monitoring/monitoring/start",
    ("/monitoring/monitoring/stop", "post"): "/monitoring/monitoring/stop",
    ("/scaling_status", "get"): "/scaling_status",
    ("/metrics", "get"): "/metrics",
    ("/healthz", "get"): "/healthz",
    ("/openapi.json", "get"): "/openapi.json",
    ("/docs", "get"): "/docs",
}


async def test_each_answer_is_as_the_document_describes_it_and_so_is_each_refusal() -> None:
    fleet = gateway_scene.two()
    async with gateway_scene.client(fleet) as calls:
        document = (await calls.get("/openapi.json")).json()
        for path, verbs in document["paths"].items():
            for verb, operation in verbs.items():
                good = await calls.request(verb.upper(), URLS[path, verb])
                assert good.status_code == 200, good.text
                (media_type,) = operation["responses"]["200"]["content"]
                assert good.headers["content-type"].startswith(media_type)
                if media_type == "application/json":
                    schema = operation["responses"]["200"]["content"][media_type]["schema"]
                    assert gateway_scene.faults(good.json(), schema, document) == [], path
                if operation.get("parameters"):
                    bad = await calls.request(verb.upper(), f"{path}?nonsense=1")
                    assert bad.status_code == 400
                    schema = operation["responses"]["400"]["content"]["application/json"]["schema"]
                    assert gateway_scene.faults(bad.json(), schema, document) == [], path


async def test_the_reader_of_schemas_is_strict() -> None:
    async with gateway_scene.client(gateway_scene.two()) as calls:
        document = (await calls.get("/openapi.json")).json()
        body = (await calls.get("/monitoring/status")).json()
    schema = {"$ref": "#/components/schemas/StatusAnswer"}

    def told(**changes: Any) -> list[str]:
        return gateway_scene.faults({**body, **changes}, schema, document)

    assert told() == []
    assert told(extra=1) == ["$: extra is not in the schema"]
    assert told(is_mass_loss=0) == ["$.is_mass_loss: 0 is no boolean"]
    assert told(totals={**body["totals"], "nodes": "2"}) == ["$.totals.nodes: '2' is no integer"]
    assert told(nodes=[{**body["nodes"][0], "state": "asleep"}]) != []


async def test_every_object_of_the_document_is_closed_and_every_parameter_told() -> None:
    document = openapi.document()

    for name, schema in document["components"]["schemas"].items():
        if schema.get("type") == "object":
            assert schema["additionalProperties"] is False, name
            assert set(schema["required"]) == set(schema["properties"]), name
            assert schema["description"], name
    for verbs in document["paths"].values():
        for operation in verbs.values():
            for parameter in operation.get("parameters", []):
                assert parameter["description"]
                assert parameter["in"] == "query"
