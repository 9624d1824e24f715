"""The plan: limits that bind about equally for any trace, and scenes that leave shares time to settle."""

import statistics

import pytest
from leasehold.core import errors
from leasehold.demo import plan
from leasehold.sim import traces

REQUESTS = traces.generate(rows=600, seed=11)


def made(seconds: float = 165.0, window_seconds: float = 20.0) -> plan.Plan:
    return plan.make(REQUESTS, seconds=seconds, window_seconds=window_seconds)


@pytest.mark.parametrize(
    ("generated", "bound"), [(0, 64), (1, 64), (64, 64), (65, 128), (512, 512), (513, 1024)]
)
def test_answer_bound_is_the_least_power_of_two_that_is_enough(generated: int, bound: int) -> None:
    assert plan.answer_bound(generated) == bound


def test_all_three_limits_allow_about_the_same_number_of_mean_requests() -> None:
    wanted = made()

    per_second_by_requests = wanted.limits.requests / 21
    mean_answer = statistics.mean(wanted.speed.seconds(r.generated_tokens) for r in REQUESTS)
    per_second_by_concurrency = wanted.limits.concurrency / mean_answer
    per_second_by_tokens = wanted.limits.tokens / 21 / statistics.mean(r.total_tokens for r in REQUESTS)
    assert wanted.limits.requests == 264
    assert per_second_by_concurrency == pytest.approx(per_second_by_requests, rel=0.01)
    assert 1.0 < per_second_by_tokens / per_second_by_requests < 1.1


def test_each_worker_alone_offers_more_than_the_whole_budget() -> None:
    wanted = made()
    rate = len(REQUESTS) / REQUESTS[-1].offset_seconds

    assert rate / 4 * wanted.replay_factor == pytest.approx(1.15 * wanted.limits.requests / 21)


def test_static_share_is_a_quarter_of_each_limit_over_a_window_longer_by_the_jitter() -> None:
    wanted = made()
    share = wanted.static_share

    assert share.requests * 4 == wanted.limits.requests
    assert share.tokens * 4 == wanted.limits.tokens
    assert share.concurrency * 4 == wanted.limits.concurrency
    assert share.window_seconds == 21.0


def test_every_request_fits_a_quarter_of_the_tokens() -> None:
    huge = [*REQUESTS, traces.Request(REQUESTS[-1].offset_seconds, 400_000, 1000)]

    wanted = plan.make(huge, seconds=165.0, window_seconds=20.0)

    assert wanted.static_share.tokens >= 401_024


def test_scenes_follow_each_other_and_changes_have_a_window_to_settle() -> None:
    script = made().script

    assert [scene.name for scene in script.scenes] == [
        "one worker alone",
        "several workers",
        "one goes idle past its timeout",
        "one is killed with SIGKILL",
    ]
    assert [scene.end_seconds for scene in script.scenes[:-1]] == [s.start_seconds for s in script.scenes[1:]]
    assert script.end_seconds == 165.0
    assert script.idle_from_seconds - max(script.starts_seconds.values()) > 21 * 1.25
    assert script.end_seconds - script.kill_seconds > 21 * 1.25
    assert script.idle_until_seconds < script.kill_seconds
    assert script.scene_at(-1.0).name == "one worker alone"
    assert script.scene_at(1e9).name == "one is killed with SIGKILL"


@pytest.mark.parametrize(
    ("seconds", "window_seconds", "field"),
    [
        (165.0, 4.9, "window_seconds"),
        (165.0, float("nan"), "window_seconds"),
        (151.0, 20.0, "seconds"),
        (3601.0, 20.0, "seconds"),
        (float("nan"), 20.0, "seconds"),
    ],
)
def test_length_out_of_range_is_refused_by_field(seconds: float, window_seconds: float, field: str) -> None:
    with pytest.raises(errors.InvalidArgument) as refused:
        made(seconds, window_seconds)
    assert refused.value.field == field


def test_trace_shorter_than_the_workers_are_many_is_refused() -> None:
    with pytest.raises(errors.InvalidArgument, match="3 requests, at least 4"):
        plan.make(REQUESTS[:3], seconds=165.0, window_seconds=20.0)


def test_trace_of_one_instant_is_replayed() -> None:
    same = [traces.Request(0.0, 10, 10)] * 8

    assert plan.make(same, seconds=165.0, window_seconds=20.0).replay_factor > 0
