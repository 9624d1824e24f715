"""What a budget's terms mean to its holder: costs in the terms' order, and the stocks they are taken from."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from leasehold.core import errors
from leasehold.core.budget import messages, model, quantity, stock

#: In place of a window's number: admitted on the exact path.
EXACT = -1

REQUESTS = "rpm_limit"
TOKENS = "tpm_limit"

#: Micro-units by dimension, in the budget's order.
Cost = tuple[int, ...]


@dataclass(slots=True, eq=False)
class Waiter:
    """An acquire that waits its turn. `payload` is the shell's: it wakes whoever waits."""

    cost: Cost
    payload: object = None
    admitted_at: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Shape:
    """A budget's terms and the stocks they made: fixed from one `Limiter.set_terms` to the next."""

    terms: messages.Terms
    stocks: Mapping[str, stock.CallStock | stock.RateStock]
    #: The one concurrency dimension; None where there is none, or several.
    call_name: str | None = field(init=False)

    def __post_init__(self) -> None:
        names = self._concurrency_names()
        object.__setattr__(self, "call_name", names[0] if len(names) == 1 else None)

    def short_cost(self, requests: int, tokens: int) -> Cost:
        """Micro-units of what the short path took for one permit."""
        whole = {REQUESTS: requests, TOKENS: tokens}
        return tuple(
            quantity.MICRO
            * (whole.get(name, 0) if isinstance(held, stock.RateStock) else name == self.call_name)
            for name, held in self.stocks.items()
        )

    def cost(
        self, requests: float = 1, tokens: float | None = None, others: Mapping[str, float] | None = None
    ) -> Cost:
        """Micro-units of one acquire in the budget's order.

        `requests` is charged to rpm_limit, `tokens` to tpm_limit, one unit to each concurrency dimension,
        `others` by dimension name. Raises `InvalidArgument` if a number is wrong, a dimension is unknown or
        tokens are missing, `CostAboveLimit` if it can never be admitted.
        """
        costs = dict.fromkeys(self.stocks, 0)
        for name in self._concurrency_names():
            costs[name] = quantity.MICRO
        if REQUESTS in costs:
            costs[REQUESTS] = quantity.to_micros(requests, field="requests")
        if TOKENS in costs:
            costs[TOKENS] = self._token_cost(tokens)
        elif tokens:
            raise errors.InvalidArgument("tokens: this budget has no tpm_limit", field="tokens")
        for name, amount in (others or {}).items():
            if name not in costs:
                known = ", ".join(self.stocks)
                raise errors.InvalidArgument(
                    f"{name}: this budget has no such dimension (it has {known})", field=name
                )
            costs[name] = quantity.to_micros(amount, field=name)
        for dimension in self.terms.dimensions:
            if costs[dimension.name] > dimension.limit:
                raise errors.CostAboveLimit(
                    f"{dimension.name}: {quantity.text(costs[dimension.name])} is more than the whole limit of "
                    f"{quantity.text(dimension.limit)}: it could never be admitted",
                    field=dimension.name,
                )
        return tuple(costs.values())

    def _token_cost(self, tokens: float | None) -> int:
        bound = self.terms.max_tokens_per_request
        if tokens is None:
            if not bound:
                raise errors.InvalidArgument(
                    "tokens: this budget has a tpm_limit; give the most tokens that the request can use, or "
                    "set max_tokens_per_request in the budget",
                    field="tokens",
                )
            return bound
        micros = quantity.to_micros(tokens, field="tokens")
        if bound and micros > bound:
            raise errors.InvalidArgument(
                f"tokens: {tokens:g} is above max_tokens_per_request ({quantity.text(bound)})", field="tokens"
            )
        return micros

    def _concurrency_names(self) -> list[str]:
        return [d.name for d in self.terms.dimensions if d.kind is model.DimensionKind.CONCURRENCY]


@dataclass(slots=True, eq=False)
class Opening:
    """One opening of the short path: all of it was charged in the bucket of `opened_at`.

    `requests`, `tokens` and `calls` are what was taken and has not been told as settled.
    """

    shape: Shape
    opened_at: float
    requests: int = 0
    tokens: int = 0
    calls: int = 0


def stock_of(
    dimension: model.Dimension,
    terms: messages.Terms,
    old: Shape | None,
    now: float,
    *,
    settled: int,
) -> stock.CallStock | stock.RateStock:
    """The stock of a dimension under new terms: the `old` one where kind and window are the same.

    A rate whose window or charging has changed takes over what the old one held. `settled` is what was settled
    in all, micro-units.
    """
    kept = old.stocks.get(dimension.name) if old is not None else None
    if old is not None and kept is not None and _is_same(dimension, terms, old.terms, kept):
        return kept
    if not dimension.is_rate:
        return stock.CallStock()
    fresh = stock.RateStock(
        window_seconds=dimension.window_seconds, jitter_seconds=terms.arrival_jitter_seconds, now=now
    )
    if isinstance(kept, stock.RateStock):
        fresh.take_over(kept, now)
    else:
        fresh.admitted_total = settled
    return fresh


def _is_same(
    dimension: model.Dimension,
    terms: messages.Terms,
    old_terms: messages.Terms,
    kept: stock.CallStock | stock.RateStock,
) -> bool:
    if not isinstance(kept, stock.RateStock):
        return not dimension.is_rate
    return (
        dimension.is_rate
        and dimension.window_seconds == kept.window_seconds
        and terms.arrival_jitter_seconds == old_terms.arrival_jitter_seconds
        and terms.charged_at is old_terms.charged_at
    )
