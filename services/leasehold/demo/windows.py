"""Limits over true sliding windows: an exact log of instants, no buckets.

An amount counted at instant t is in use in the window (now - W, now] while now < t + W: at t + W exactly it no
longer counts. Time is an input, in nanoseconds of one clock that never goes back.
"""

import collections
import enum
from dataclasses import dataclass

from leasehold.core import errors

NANOS_PER_SECOND = 1_000_000_000


class Limit(enum.StrEnum):
    """The three limits of a provider."""

    REQUESTS = "requests"
    TOKENS = "tokens"
    CONCURRENCY = "concurrency"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of one account. Raises `InvalidArgument` unless all are above 0."""

    #: Requests in any window.
    requests: int
    #: Tokens in any window.
    tokens: int
    #: Requests being answered at one time.
    concurrency: int
    window_seconds: float

    def __post_init__(self) -> None:
        for name in ("requests", "tokens", "concurrency", "window_seconds"):
            if not getattr(self, name) > 0:
                raise errors.InvalidArgument(f"{name}: {getattr(self, name)} is not above 0", field=name)

    @property
    def window_ns(self) -> int:
        """The window in nanoseconds."""
        return round(self.window_seconds * NANOS_PER_SECOND)


@dataclass(slots=True)
class Charge:
    """An amount counted in a window."""

    at_ns: int
    amount: int
    is_counted: bool = True


class SlidingWindow:
    """One limit on the sum of the amounts of the last `window_ns` nanoseconds."""

    def __init__(self, limit: int, window_ns: int) -> None:
        self.limit = limit
        self._window_ns = window_ns
        self._charges: collections.deque[Charge] = collections.deque()
        self._sum = 0

    def used(self, now_ns: int) -> int:
        """The sum over (now - W, now]. May be above the limit after a correction upwards."""
        while self._charges and self._charges[0].at_ns + self._window_ns <= now_ns:
            charge = self._charges.popleft()
            charge.is_counted = False
            self._sum -= charge.amount
        return self._sum

    def add(self, now_ns: int, amount: int) -> Charge:
        """Counts `amount` from now on, whether or not there is room."""
        charge = Charge(now_ns, amount)
        self._charges.append(charge)
        self._sum += amount
        return charge

    def correct(self, charge: Charge, amount: int) -> None:
        """Counts `amount` instead, at the instant of the charge; one that has left the window stays out."""
        if charge.is_counted:
            self._sum += amount - charge.amount
        charge.amount = amount

    def wait_ns(self, now_ns: int, amount: int) -> int | None:
        """Nanoseconds until there is room for `amount` if nothing else comes: 0 now, None never."""
        if amount > self.limit:
            return None
        surplus = self.used(now_ns) + amount - self.limit
        if surplus <= 0:
            return 0
        for charge in self._charges:
            surplus -= charge.amount
            if surplus <= 0:
                return charge.at_ns + self._window_ns - now_ns
        raise AssertionError("the charges of a window add up to its sum")

    def empty_in_ns(self, now_ns: int) -> int:
        """Nanoseconds until all that is counted now has left the window."""
        self.used(now_ns)
        return self._charges[-1].at_ns + self._window_ns - now_ns if self._charges else 0


@dataclass(eq=False, slots=True)
class Admission:
    """A request that was let in; hand it back to `Quota.end`."""

    charge: Charge
    is_running: bool = True


@dataclass(frozen=True, slots=True)
class Refusal:
    """A request that was not let in; nothing was counted."""

    limit: Limit
    #: When there may be room; None if never, because it asks for more than the limit, and also where no
    #: time can be told, because a running request must end first.
    retry_after_ns: int | None
    is_possible: bool


@dataclass(frozen=True, slots=True)
class Use:
    """What is counted at one instant."""

    requests: int
    tokens: int
    concurrency: int


class Quota:
    """The three limits together: a request is counted under all of them or under none."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._requests = SlidingWindow(limits.requests, limits.window_ns)
        self._tokens = SlidingWindow(limits.tokens, limits.window_ns)
        self._running = 0

    def try_admit(self, now_ns: int, tokens: int) -> Admission | Refusal:
        """Counts one request that reserves `tokens`, or tells the limit that has no room for it."""
        tokens_wait_ns = self._tokens.wait_ns(now_ns, tokens)
        if tokens_wait_ns is None:
            return Refusal(Limit.TOKENS, None, is_possible=False)
        requests_wait_ns = self._requests.wait_ns(now_ns, 1) or 0
        if max(tokens_wait_ns, requests_wait_ns) > 0:
            limit = Limit.TOKENS if tokens_wait_ns >= requests_wait_ns else Limit.REQUESTS
            return Refusal(limit, max(tokens_wait_ns, requests_wait_ns), is_possible=True)
        if not self.has_slot:
            return Refusal(Limit.CONCURRENCY, None, is_possible=True)
        self._running += 1
        self._requests.add(now_ns, 1)
        return Admission(self._tokens.add(now_ns, tokens))

    @property
    def has_slot(self) -> bool:
        """Whether fewer requests run than may."""
        return self._running < self.limits.concurrency

    def end(self, admission: Admission, *, tokens: int | None = None) -> bool:
        """Frees the slot and corrects the tokens to `tokens`, if told; False if it had ended before."""
        if not admission.is_running:
            return False
        admission.is_running = False
        self._running -= 1
        if tokens is not None:
            self._tokens.correct(admission.charge, tokens)
        return True

    def use(self, now_ns: int) -> Use:
        """What is counted now."""
        return Use(self._requests.used(now_ns), self._tokens.used(now_ns), self._running)

    def empty_in_ns(self, now_ns: int) -> tuple[int, int]:
        """Nanoseconds until no request, and until no token, of those counted now is counted."""
        return self._requests.empty_in_ns(now_ns), self._tokens.empty_in_ns(now_ns)
