"""Leases and budgets survive the wire unchanged, and what a stranger gets wrong is refused by name."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from leasehold.api.budget.v1 import budget_pb2, lease_pb2
from leasehold.core import epoch as epochs
from leasehold.core import errors, processes
from leasehold.core.budget import messages, model, quantity
from leasehold.rpc import budget_codec, lease_codec, wire_values

DIMENSIONS = ("max_concurrent_requests", "rpm_limit", "tpm_limit", "num_workers", "images_per_minute")

micros = st.integers(0, int(quantity.UNITS_MAX) * quantity.MICRO)
amounts = st.dictionaries(st.sampled_from(DIMENSIONS), micros)
uint64 = st.integers(0, 2**64 - 1)
uint32 = st.integers(0, 2**32 - 1)
int63 = st.integers(0, 2**63 - 1)
seconds = st.integers(0, 86_400_000_000).map(lambda microseconds: microseconds / 1e6)
names = st.sampled_from(("a", "llm-api", "worker_1234", "x" * 128))
incarnations = st.sampled_from(("01234567", "0123456789abcdef" * 4))
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)

process_keys = st.builds(
    processes.ProcessKey,
    st.sampled_from(("8d1ee8d0-5b3c-4b5e-9a53-2a1e0f6c7b11", "b")),
    uint64,
    st.integers(1, 2**22),
    uint64,
)


@st.composite
def _cooling(draw: st.DrawFn, held: dict[str, int]) -> tuple[messages.Cooling, ...]:
    told = draw(st.lists(st.sampled_from(sorted(held)), unique=True)) if held else []
    steps = st.lists(st.tuples(micros, seconds), max_size=lease_codec.COOLING_PARTS_MAX)
    drawn = [(dimension, draw(steps)) for dimension in told]
    return tuple(
        messages.Cooling(dimension, tuple(a for a, _ in parts), tuple(s for _, s in parts))
        for dimension, parts in drawn
    )


@st.composite
def _holdings(draw: st.DrawFn) -> messages.Holdings:
    held = draw(amounts)
    return messages.Holdings(
        held=held,
        cooling=draw(_cooling(held)),
        refundable=draw(amounts),
        largest_cost=draw(amounts),
        admitted_total=draw(amounts),
        overdraft_total=draw(amounts),
        respend_seconds=draw(seconds),
    )


reports = st.builds(
    messages.Report,
    budget=names,
    holder=names,
    incarnation=incarnations,
    sequence=st.integers(1, 2**64 - 1),
    lease_id=uint64,
    is_rejoin=st.booleans(),
    grant_version=uint64,
    is_active=st.booleans(),
    current_load=st.floats(-1e9, 1e9),
    active_tasks=uint32,
    demand=amounts,
    waiting_cost=amounts,
    holdings=st.none() | _holdings(),
    throttles=st.lists(
        st.builds(messages.Throttle, st.sampled_from(("", *DIMENSIONS)), seconds), max_size=5
    ).map(tuple),
    process=st.none() | process_keys,
    boottime_nanos=uint64,
)
releases = st.builds(
    messages.Release,
    budget=names,
    holder=names,
    incarnation=incarnations,
    lease_id=uint64,
    holdings=st.none() | _holdings(),
)


@st.composite
def _dimensions(draw: st.DrawFn) -> model.Dimension:
    kind = draw(st.sampled_from(model.DimensionKind))
    name = draw(st.sampled_from(DIMENSIONS))
    if kind is model.DimensionKind.RATE:
        window_seconds = draw(st.integers(1, 864_000).map(lambda tenths: tenths / 10))
        return model.Dimension(name=name, kind=kind, limit=draw(micros), window_seconds=window_seconds)
    return model.Dimension(name=name, kind=kind, limit=draw(st.integers(0, 10**9)) * quantity.MICRO)


terms = st.builds(
    messages.Terms,
    dimensions=st.lists(_dimensions(), max_size=5).map(tuple),
    arrival_jitter_seconds=seconds,
    max_call_seconds=seconds,
    activity_timeout_seconds=seconds,
    safe_ttl_seconds=seconds,
    max_tokens_per_request=micros,
    charged_at=st.sampled_from(model.ChargedAt),
    safe_capacity=amounts,
)
grants = st.builds(
    messages.Grant,
    budget=names,
    holder=names,
    incarnation=incarnations,
    lease_id=uint64,
    epoch=st.builds(epochs.Epoch, int63, int63, uint64),
    version=uint64,
    answered_sequence=uint64,
    ttl_seconds=seconds,
    refresh_seconds=seconds,
    amounts=amounts,
    terms=st.none() | terms,
    end=st.none() | st.sampled_from(messages.LeaseEnd),
    total_workers=uint32,
    active_workers=uint32,
    reason=texts,
)
refusals = st.builds(
    messages.Refusal,
    budget=names,
    holder=names,
    incarnation=incarnations,
    sequence=uint64,
    reason=texts,
    message=texts,
    field=texts,
)


@given(reports)
def test_a_report_survives_the_wire(report: messages.Report) -> None:
    assert lease_codec.decode_report(lease_codec.encode_report(report)) == report


@given(releases)
def test_a_release_survives_the_wire(release: messages.Release) -> None:
    assert lease_codec.decode_release(lease_codec.encode_release(release)) == release


@given(grants)
def test_a_grant_survives_the_wire(grant: messages.Grant) -> None:
    assert lease_codec.decode_grant(lease_codec.encode_grant(grant)) == grant


@given(refusals)
def test_a_refusal_survives_the_wire(refusal: messages.Refusal) -> None:
    assert lease_codec.decode_refusal(lease_codec.encode_refusal(refusal)) == refusal


@settings(max_examples=50)
@given(
    st.lists(_dimensions(), min_size=1, max_size=5, unique_by=lambda dimension: dimension.name).map(tuple),
    st.sampled_from(model.Policy),
    st.sampled_from(model.ChargedAt),
    st.booleans(),
    st.none() | st.floats(0, 1000).map(lambda value: round(value, 3)),
)
def test_a_budget_survives_the_wire(
    dimensions: tuple[model.Dimension, ...],
    policy: model.Policy,
    charged_at: model.ChargedAt,
    is_scaling_enabled: bool,
    orphan_seconds: float | None,
) -> None:
    spec = model.BudgetSpec(
        name="llm-api",
        dimensions=dimensions,
        policy=policy,
        holder_classes=(
            model.HolderClass(
                pattern="batch-*", weight=0.5, priority=-3, safe_capacity={dimensions[0].name: quantity.MICRO}
            ),
        ),
        expected_workers=7,
        scaling_enabled=is_scaling_enabled,
        ttl_seconds=20.0,
        refresh_seconds=5.5,
        orphan_seconds=orphan_seconds,
        charged_at=charged_at,
    )

    assert budget_codec.decode_budget(budget_codec.encode_budget(spec, version=4)) == spec


@given(seconds)
def test_a_decimal_of_seconds_comes_back_as_the_same_float(value: float) -> None:
    assert wire_values.decode_seconds(wire_values.encode_seconds(value), "x") == value


def _budget(**fields: Any) -> budget_pb2.Budget:
    return budget_pb2.Budget(**fields)


def test_what_a_budget_leaves_out_takes_the_defaults() -> None:
    message = _budget(
        name="llm-api",
        dimensions=[
            budget_pb2.Dimension(name="rpm_limit", limit=800),
            budget_pb2.Dimension(name="max_concurrent_requests", limit=40),
            budget_pb2.Dimension(name="images", limit=3, kind=budget_pb2.DIMENSION_KIND_RATE),
        ],
        window={"seconds": 30},
        holder_classes=[budget_pb2.HolderClass(pattern="x")],
    )

    spec = budget_codec.decode_budget(message)

    assert spec == model.BudgetSpec(
        name="llm-api",
        dimensions=(
            model.Dimension(
                name="rpm_limit", kind=model.DimensionKind.RATE, limit=800_000_000, window_seconds=30.0
            ),
            model.Dimension(
                name="max_concurrent_requests", kind=model.DimensionKind.CONCURRENCY, limit=40_000_000
            ),
            model.Dimension(name="images", kind=model.DimensionKind.RATE, limit=3_000_000, window_seconds=30.0),
        ),
        window_seconds=30.0,
        holder_classes=(model.HolderClass(pattern="x"),),
    )


def test_scaling_is_off_only_where_it_is_said() -> None:
    dimensions = [budget_pb2.Dimension(name="rpm_limit", limit=1)]

    unsaid = budget_codec.decode_budget(_budget(name="b", dimensions=dimensions))
    off = budget_codec.decode_budget(_budget(name="b", dimensions=dimensions, scaling_enabled=False))

    assert (unsaid.scaling_enabled, off.scaling_enabled) == (True, False)


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        (_budget(name="a/b"), "name"),
        (_budget(name="x" * 300), "name"),
        (_budget(name="b"), "dimensions"),
        (_budget(name="b", dimensions=[{"name": "images", "limit": 1}]), "dimensions.images.kind"),
        (
            _budget(name="b", dimensions=[{"name": "rpm_limit", "limit": -1}]),
            "dimensions.rpm_limit.limit",
        ),
        (
            _budget(name="b", dimensions=[{"name": "rpm_limit", "limit": math.nan}]),
            "dimensions.rpm_limit.limit",
        ),
        (
            _budget(name="b", dimensions=[{"name": "num_workers", "limit": 1, "window": {"seconds": 1}}]),
            "dimensions.num_workers.window_seconds",
        ),
        (
            _budget(name="b", dimensions=[{"name": "rpm_limit", "limit": 1}], refresh_interval={"seconds": 9}),
            "refresh_seconds",
        ),
        (_budget(name="b", dimensions=[{"name": "rpm_limit", "limit": 1}], policy=99), "policy"),
        (
            _budget(name="b", dimensions=[{"name": "rpm_limit", "limit": 1}], charged_at=9),
            "charged_at",
        ),
    ],
)
def test_a_wrong_budget_is_refused_by_the_name_of_its_field(wrong: budget_pb2.Budget, field: str) -> None:
    with pytest.raises(errors.InvalidArgument) as raised:
        budget_codec.decode_budget(wrong)

    assert raised.value.field == field


def _report(**changes: Any) -> lease_pb2.LeaseReport:
    given: dict[str, Any] = {
        "budget": "llm-api",
        "holder": "worker_1",
        "incarnation": "0123456789abcdef",
        "sequence": 1,
    }
    return lease_pb2.LeaseReport(**(given | changes))


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        (_report(budget="a\nb"), "budget"),
        (_report(holder="x" * 300), "holder"),
        (_report(incarnation="short"), "incarnation"),
        (_report(sequence=0), "sequence"),
        (_report(demand={"rpm_limit": -1.0}), "demand.rpm_limit"),
        (_report(demand={"rpm_limit": math.inf}), "demand.rpm_limit"),
        (_report(demand={f"d{number}": 1.0 for number in range(17)}), "demand"),
        (_report(waiting_cost={"rpm_limit": 2e9}), "waiting_cost.rpm_limit"),
        (_report(current_load=math.nan), "current_load"),
        (_report(holdings={"held": {"rpm_limit": math.nan}}), "holdings.held.rpm_limit"),
        (
            _report(
                holdings={"cooling": [{"dimension": "rpm_limit", "amounts": [1], "remaining_seconds": [1]}]}
            ),
            "holdings.cooling.rpm_limit",
        ),
        (
            _report(
                holdings={
                    "held": {"rpm_limit": 5},
                    "cooling": [{"dimension": "rpm_limit", "amounts": [1], "remaining_seconds": [10**9]}],
                }
            ),
            "holdings.cooling.rpm_limit",
        ),
        (
            _report(
                holdings={
                    "held": {"rpm_limit": 5},
                    "cooling": [{"dimension": "rpm_limit", "amounts": [1, 2], "remaining_seconds": [1]}],
                }
            ),
            "holdings.cooling.rpm_limit",
        ),
        (
            _report(
                holdings={
                    "held": {"rpm_limit": 5},
                    "cooling": [{"dimension": "rpm_limit", "amounts": [math.nan], "remaining_seconds": [1]}],
                }
            ),
            "holdings.cooling.rpm_limit",
        ),
        (
            _report(
                holdings={
                    "held": {"rpm_limit": 5},
                    "cooling": [
                        {"dimension": "rpm_limit", "amounts": [1, 2], "remaining_seconds": [1, math.nan]}
                    ],
                }
            ),
            "holdings.cooling.rpm_limit",
        ),
        (_report(holdings={"respend_seconds": -1.0}), "holdings.respend_seconds"),
        (_report(holdings={"respend_seconds": math.nan}), "holdings.respend_seconds"),
        (_report(holdings={"respend_seconds": math.inf}), "holdings.respend_seconds"),
        (_report(throttles=[{"retry_after": {"seconds": -1}}]), "throttles.retry_after"),
        (_report(process={"boot_id": "b", "pid": 0}), "process.pid"),
        (_report(process={"boot_id": "a\0b", "pid": 1}), "process.boot_id"),
    ],
)
def test_a_wrong_report_is_refused_by_the_name_of_its_field(wrong: lease_pb2.LeaseReport, field: str) -> None:
    with pytest.raises(errors.InvalidArgument) as raised:
        lease_codec.decode_report(wrong)

    assert raised.value.field == field


@given(st.binary(max_size=200))
def test_noise_is_refused_or_read_but_never_breaks_the_decoder(noise: bytes) -> None:
    message = _report()
    try:
        message.MergeFromString(noise)
    except Exception:  # not a message at all: gRPC refuses it before the codec
        return
    try:
        lease_codec.decode_report(message)
    except errors.InvalidArgument as error:
        assert error.field
