"""The exposition: one HELP and TYPE a family, a fleet's gauges, and an allocator that is away."""

import re

import fake_fleet
import gateway_scene
from leasehold.api.node.v1 import node_pb2
from leasehold.core import errors
from leasehold.gateway import metrics
from leasehold.observe import metrics as observed


async def exposed(fleet: fake_fleet.FakeFleet) -> str:
    async with gateway_scene.client(fleet) as calls:
        await calls.get("/monitoring/status")
        response = await calls.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"] == observed.CONTENT_TYPE
    return response.text


def families(text: str) -> dict[str, int]:
    """How often each family is declared; fails where a sample stands under another family's heading."""
    told: dict[str, int] = {}
    current = ""
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            current = line.split()[2]
            told[current] = told.get(current, 0) + 1
        elif not line.startswith("#"):
            assert re.fullmatch(rf"{re.escape(current)}(_bucket|_sum|_count)?(\{{.*\}})? \S+", line), line
    return told


async def test_the_gateways_own_the_fleets_and_the_leaders_are_one_exposition() -> None:
    text = await exposed(gateway_scene.two())

    told = families(text)
    assert set(told.values()) == {1}
    assert {"leasehold_allocator_up", "leasehold_gateway_request_seconds", "leasehold_calls_total"} <= set(told)
    assert "leasehold_allocator_up 1\n" in text
    assert 'leasehold_node_state{node="r620-1",state="ready"} 1\n' in text
    assert 'leasehold_node_state{node="r620-1",state="lost"} 0\n' in text
    assert f'leasehold_node_memory_total_bytes{{node="r620-2"}} {64 * 2**30}\n' in text
    assert 'leasehold_pool_workers{node="r620-2",pool="transcription",state="running"} 2\n' in text
    assert 'leasehold_pool_mode{node="r620-1",pool="transcription",mode="auto"} 1\n' in text
    assert 'leasehold_pool_queue_ready{node="r620-1",pool="transcription"} 7\n' in text
    assert (
        'leasehold_worker_held_bytes{node="r620-1",pool="transcription",worker="transcription_1@r620-1"} '
        f"{2**29}\n" in text
    )


async def test_what_is_not_known_is_no_sample_never_0() -> None:
    fleet = gateway_scene.fleet()
    fleet.hosts["r620-1"].pools["transcription"].depth.ClearField("ready")

    text = await exposed(fleet)

    assert "leasehold_pool_queue_ready" not in text
    assert "leasehold_pool_queue_unacknowledged" not in text
    assert "leasehold_node_memory_pressure_full_percent" not in text


async def test_an_allocator_that_is_away_is_a_gauge_and_no_failure() -> None:
    fleet = gateway_scene.fleet()
    fleet.failure = errors.Unavailable("no leader answered")

    text = await exposed(fleet)

    assert "leasehold_allocator_up 0\n" in text
    assert "leasehold_node_state" not in text
    assert 'leasehold_gateway_requests_total{route="/monitoring/status",method="GET",status="503"} 1\n' in text


async def test_a_leader_that_tells_no_metrics_is_up_all_the_same() -> None:
    fleet = gateway_scene.fleet()

    def older(request: object) -> object:
        raise errors.Unimplemented

    fleet._ExposeMetrics = older  # type: ignore[method-assign,assignment]

    text = await exposed(fleet)

    assert "leasehold_allocator_up 1\n" in text
    assert "leasehold_calls_total" not in text


async def test_a_lost_nodes_last_report_is_not_told_as_what_it_has() -> None:
    fleet = gateway_scene.two()
    fleet.states["r620-1"] = node_pb2.NODE_STATE_LOST

    text = await exposed(fleet)

    assert 'leasehold_node_state{node="r620-1",state="lost"} 1\n' in text
    assert 'leasehold_node_report_age_seconds{node="r620-1"} 0.8\n' in text
    assert 'leasehold_pool_workers{node="r620-1"' not in text
    assert 'leasehold_pool_workers{node="r620-2"' in text


async def test_no_node_of_a_large_fleet_is_lost_in_the_exposition() -> None:
    hosts = [fake_fleet.FakeHost(f"n{number:04}") for number in range(1_000)]
    for host in hosts:
        host.add_pool("a", 3)

    text = await exposed(fake_fleet.FakeFleet(*hosts))

    assert text.count("leasehold_node_state{") == 4_000
    assert text.count("leasehold_worker_held_bytes{") == 3_000
    assert "_other" not in text


def test_families_of_several_texts_are_told_once_and_a_series_that_recurs_is_the_firsts() -> None:
    first = "# HELP a_total A\n# TYPE a_total counter\na_total 1\n"
    second = '# HELP a_total Other\n# TYPE a_total counter\na_total 9\na_total{x="} 1"} 2\n'

    assert metrics.merged([first, second]) == (
        '# HELP a_total A\n# TYPE a_total counter\na_total 1\na_total{x="} 1"} 2\n'
    )


def test_a_histograms_lines_stay_together_and_in_order() -> None:
    registry = observed.Registry()
    registry.histogram("h_seconds", "H", bounds=(0.1, 1.0)).labels().observe(0.5)
    registry.counter("h_seconds_count_total", "Not of it").labels().add()

    text = metrics.merged([registry.expose(), registry.expose()])

    assert text == registry.expose()


def test_lines_that_are_none_are_left_out() -> None:
    assert metrics.merged(["", "\n", "# a comment\n", "7up 3\n", "no_value\n", "good 1\n"]) == "good 1\n"
