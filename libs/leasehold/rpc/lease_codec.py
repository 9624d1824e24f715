"""Leases between proto and core: `messages` both ways.

Decoding checks everything that a stranger could have got wrong and raises `InvalidArgument` naming the field,
relative to its message (``holdings.held.rpm_limit``). Which dimensions a budget has is for its owner to check.
"""

import functools
from collections.abc import Mapping
from typing import Final

from leasehold.api.budget.v1 import budget_service_pb2, lease_pb2
from leasehold.core import errors
from leasehold.core.budget import messages, model, quantity
from leasehold.rpc import budget_codec, common_codec, wire_values

#: Steps of one dimension's `Cooling`, and entries of `LeaseReport.throttles`.
COOLING_PARTS_MAX = 24
THROTTLES_MAX = 100

_UNITS_MAX: Final = quantity.UNITS_MAX
_SECONDS_MAX: Final = wire_values.DURATION_SECONDS_MAX

_ENDS: Final[Mapping[int, messages.LeaseEnd]] = {
    lease_pb2.LEASE_END_RELEASED: messages.LeaseEnd.RELEASED,
    lease_pb2.LEASE_END_EXPIRED: messages.LeaseEnd.EXPIRED,
    lease_pb2.LEASE_END_SUPERSEDED: messages.LeaseEnd.SUPERSEDED,
    lease_pb2.LEASE_END_BUDGET_DELETED: messages.LeaseEnd.BUDGET_DELETED,
}
_END_NUMBERS: Final = {end: number for number, end in _ENDS.items()}


@functools.lru_cache(maxsize=65_536)
def _check_names(budget: str, holder: str, incarnation: str) -> None:
    # A holder says the same three names in every report: looked at once.
    model.checked_budget_name(budget, field_name="budget")
    model.checked_holder_name(holder)
    model.checked_incarnation(incarnation)


# Reports and releases: what holders say


def decode_report(message: lease_pb2.LeaseReport) -> messages.Report:
    """The report. Raises `InvalidArgument`."""
    budget, holder, incarnation = message.budget, message.holder, message.incarnation
    _check_names(budget, holder, incarnation)
    sequence = message.sequence
    if not sequence:
        raise errors.InvalidArgument("sequence: the first report is number 1", field="sequence")
    return messages.Report(
        budget=budget,
        holder=holder,
        incarnation=incarnation,
        sequence=sequence,
        lease_id=message.lease_id,
        is_rejoin=message.is_rejoin,
        grant_version=message.grant_version,
        is_active=message.is_active,
        current_load=_checked_load(message.current_load),
        active_tasks=message.active_tasks,
        demand=wire_values.decode_amounts(message.demand, "demand"),
        waiting_cost=wire_values.decode_amounts(message.waiting_cost, "waiting_cost"),
        holdings=decode_holdings(message.holdings) if message.HasField("holdings") else None,
        throttles=_decode_throttles(message) if message.throttles else (),
        process=common_codec.decode_process(message.process) if message.HasField("process") else None,
        boottime_nanos=message.boottime_nanos,
    )


def _checked_load(load: float) -> float:
    if not -1e300 < load < 1e300:
        raise errors.InvalidArgument(f"current_load: {load} is not a finite number", field="current_load")
    return load


def _decode_throttles(message: lease_pb2.LeaseReport) -> tuple[messages.Throttle, ...]:
    if len(message.throttles) > THROTTLES_MAX:
        raise errors.InvalidArgument(f"throttles: at most {THROTTLES_MAX} in a report", field="throttles")
    return tuple(
        messages.Throttle(
            throttle.dimension, wire_values.decode_seconds(throttle.retry_after, "throttles.retry_after")
        )
        for throttle in message.throttles
    )


def encode_report(report: messages.Report) -> lease_pb2.LeaseReport:
    """The message."""
    message = lease_pb2.LeaseReport(
        budget=report.budget,
        holder=report.holder,
        incarnation=report.incarnation,
        sequence=report.sequence,
        lease_id=report.lease_id,
        is_rejoin=report.is_rejoin,
        grant_version=report.grant_version,
        is_active=report.is_active,
        current_load=report.current_load,
        active_tasks=report.active_tasks,
        demand=wire_values.encode_amounts(report.demand),
        waiting_cost=wire_values.encode_amounts(report.waiting_cost),
        holdings=None if report.holdings is None else encode_holdings(report.holdings),
        process=None if report.process is None else common_codec.encode_process(report.process),
        boottime_nanos=report.boottime_nanos,
    )
    for throttle in report.throttles:
        message.throttles.add(
            dimension=throttle.dimension, retry_after=wire_values.encode_seconds(throttle.retry_after_seconds)
        )
    return message


def decode_release(message: budget_service_pb2.LeaseRelease) -> messages.Release:
    """The release. Raises `InvalidArgument`."""
    _check_names(message.budget, message.holder, message.incarnation)
    return messages.Release(
        budget=message.budget,
        holder=message.holder,
        incarnation=message.incarnation,
        lease_id=message.lease_id,
        holdings=decode_holdings(message.holdings) if message.HasField("holdings") else None,
    )


def encode_release(release: messages.Release) -> budget_service_pb2.LeaseRelease:
    """The message."""
    return budget_service_pb2.LeaseRelease(
        budget=release.budget,
        holder=release.holder,
        incarnation=release.incarnation,
        lease_id=release.lease_id,
        holdings=None if release.holdings is None else encode_holdings(release.holdings),
    )


def decode_holdings(message: lease_pb2.Holdings) -> messages.Holdings:
    """What a holder has. Raises `InvalidArgument`."""
    amounts, total = wire_values.decode_amounts, wire_values.TOTAL_UNITS_MAX
    held = amounts(message.held, "holdings.held")
    return messages.Holdings(
        held=held,
        cooling=_decode_cooling(message, held) if message.cooling else (),
        refundable=amounts(message.refundable, "holdings.refundable"),
        largest_cost=amounts(message.largest_cost, "holdings.largest_cost"),
        admitted_total=amounts(message.admitted_total, "holdings.admitted_total", total),
        overdraft_total=amounts(message.overdraft_total, "holdings.overdraft_total", total),
        respend_seconds=_checked_respend(message.respend_seconds),
    )


def _checked_respend(seconds: float) -> float:
    if not 0.0 <= seconds <= _SECONDS_MAX:
        field = "holdings.respend_seconds"
        raise errors.InvalidArgument(f"{field}: {seconds} is no time that a lease can last", field=field)
    return seconds


def _decode_cooling(message: lease_pb2.Holdings, held: Mapping[str, int]) -> tuple[messages.Cooling, ...]:
    decoded: dict[str, messages.Cooling] = {}
    for cooling in message.cooling:
        dimension = cooling.dimension
        # A slice of a repeated field is copied at once, what iterates it gets one value at a time.
        units, seconds = cooling.amounts[:], cooling.remaining_seconds[:]
        is_whole = len(units) == len(seconds) <= COOLING_PARTS_MAX and dimension not in decoded
        # A NaN, which min and max may pass over, makes the sum one.
        is_sound = not units or (
            min(units) >= 0.0
            and max(units) <= _UNITS_MAX
            and min(seconds, default=0.0) >= 0.0
            and max(seconds, default=0.0) <= _SECONDS_MAX
            and sum(units) + sum(seconds) >= 0.0
        )
        if not (is_whole and is_sound and dimension in held):
            raise _wrong_cooling(dimension, held, is_whole=is_whole)
        amounts = tuple([int(u * 1e6 + 0.5) for u in units])
        decoded[dimension] = messages.Cooling(dimension, amounts, tuple(seconds))
    return tuple(decoded.values())


def _wrong_cooling(dimension: str, held: Mapping[str, int], *, is_whole: bool) -> errors.InvalidArgument:
    field = f"holdings.cooling.{dimension[:63]}"
    if dimension not in held:
        return errors.InvalidArgument(f"{field}: is not in holdings.held", field=field)
    if not is_whole:
        return errors.InvalidArgument(
            f"{field}: is once, with as many amounts as remaining_seconds, at most {COOLING_PARTS_MAX}",
            field=field,
        )
    return errors.InvalidArgument(f"{field}: an amount or a remaining time is out of range", field=field)


def encode_holdings(holdings: messages.Holdings) -> lease_pb2.Holdings:
    """The message."""
    amounts = wire_values.encode_amounts
    message = lease_pb2.Holdings(
        held=amounts(holdings.held),
        refundable=amounts(holdings.refundable),
        largest_cost=amounts(holdings.largest_cost),
        admitted_total=amounts(holdings.admitted_total),
        overdraft_total=amounts(holdings.overdraft_total),
        respend_seconds=holdings.respend_seconds,
    )
    for cooling in holdings.cooling:
        message.cooling.add(
            dimension=cooling.dimension,
            amounts=[amount / quantity.MICRO for amount in cooling.amounts],
            remaining_seconds=cooling.remaining_seconds,
        )
    return message


# Grants and refusals: what the allocator says


def decode_grant(message: lease_pb2.LeaseGrant) -> messages.Grant:
    """The grant. Raises `InvalidArgument`."""
    return messages.Grant(
        budget=message.budget,
        holder=message.holder,
        incarnation=message.incarnation,
        lease_id=message.lease_id,
        epoch=common_codec.decode_epoch(message.epoch),
        version=message.version,
        answered_sequence=message.answered_sequence,
        ttl_seconds=wire_values.decode_seconds(message.ttl, "ttl"),
        refresh_seconds=wire_values.decode_seconds(message.refresh_interval, "refresh_interval"),
        amounts=wire_values.decode_amounts(message.amounts, "amounts"),
        terms=decode_terms(message.terms) if message.HasField("terms") else None,
        end=_decode_end(message.end) if message.end else None,
        total_workers=message.total_workers,
        active_workers=message.active_workers,
        reason=message.reason,
    )


def _decode_end(number: int) -> messages.LeaseEnd:
    end = _ENDS.get(number)
    if end is None:
        raise errors.InvalidArgument(f"end: {number} is not known", field="end")
    return end


def encode_grant(grant: messages.Grant) -> lease_pb2.LeaseGrant:
    """The message."""
    message = lease_pb2.LeaseGrant(
        budget=grant.budget,
        holder=grant.holder,
        incarnation=grant.incarnation,
        lease_id=grant.lease_id,
        epoch=common_codec.shared_epoch(grant.epoch),
        version=grant.version,
        answered_sequence=grant.answered_sequence,
        amounts=wire_values.encode_amounts(grant.amounts),
        total_workers=grant.total_workers,
        active_workers=grant.active_workers,
        reason=grant.reason,
    )
    if grant.ttl_seconds:
        message.ttl.CopyFrom(wire_values.shared_duration(grant.ttl_seconds))
    if grant.refresh_seconds:
        message.refresh_interval.CopyFrom(wire_values.shared_duration(grant.refresh_seconds))
    if grant.terms is not None:
        message.terms.CopyFrom(encode_terms(grant.terms))
    if grant.end is not None:
        message.end = _END_NUMBERS[grant.end]  # type: ignore[assignment]  # the table's keys are these values
    return message


def decode_terms(message: lease_pb2.LeaseTerms) -> messages.Terms:
    """The terms. Raises `InvalidArgument`."""
    return messages.Terms(
        dimensions=budget_codec.decode_dimensions(message.dimensions, 60.0),
        arrival_jitter_seconds=wire_values.decode_seconds(message.arrival_jitter, "terms.arrival_jitter"),
        max_call_seconds=wire_values.decode_seconds(message.max_call, "terms.max_call"),
        activity_timeout_seconds=wire_values.decode_seconds(message.activity_timeout, "terms.activity_timeout"),
        safe_ttl_seconds=wire_values.decode_seconds(message.safe_ttl, "terms.safe_ttl"),
        max_tokens_per_request=wire_values.decode_units(
            message.max_tokens_per_request, "terms.max_tokens_per_request"
        ),
        charged_at=budget_codec.decode_charged_at(message.charged_at),
        safe_capacity=wire_values.decode_amounts(message.safe_capacity, "terms.safe_capacity"),
    )


def encode_terms(terms: messages.Terms) -> lease_pb2.LeaseTerms:
    """The message."""
    return lease_pb2.LeaseTerms(
        dimensions=[budget_codec.encode_dimension(dimension) for dimension in terms.dimensions],
        arrival_jitter=wire_values.encode_seconds(terms.arrival_jitter_seconds),
        max_call=wire_values.encode_seconds(terms.max_call_seconds),
        activity_timeout=wire_values.encode_seconds(terms.activity_timeout_seconds),
        safe_ttl=wire_values.encode_seconds(terms.safe_ttl_seconds),
        max_tokens_per_request=terms.max_tokens_per_request / quantity.MICRO,
        charged_at=budget_codec.encode_charged_at(terms.charged_at),
        safe_capacity=wire_values.encode_amounts(terms.safe_capacity),
    )


def decode_refusal(message: budget_service_pb2.LeaseRefusal) -> messages.Refusal:
    """The refusal."""
    return messages.Refusal(
        budget=message.budget,
        holder=message.holder,
        incarnation=message.incarnation,
        sequence=message.sequence,
        reason=message.reason,
        message=message.message,
        field=message.field,
    )


def encode_refusal(refusal: messages.Refusal) -> budget_service_pb2.LeaseRefusal:
    """The message."""
    return budget_service_pb2.LeaseRefusal(
        budget=refusal.budget,
        holder=refusal.holder,
        incarnation=refusal.incarnation,
        sequence=refusal.sequence,
        reason=refusal.reason,
        message=refusal.message,
        field=refusal.field,
    )
