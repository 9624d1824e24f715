"""What a simulated world is made of, by fault family. Each scenario is a function of the seed."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from leasehold.core.budget import model, quantity
from leasehold.sim import actors_holder, network

MICRO = quantity.MICRO


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """Mean seconds between two faults of each kind; 0: none of it."""

    crash: float = 0.0
    freeze: float = 0.0
    broken_stream: float = 0.0
    #: The holder does not hear of it for longer than its lease may last.
    hidden_break: float = 0.0
    partition: float = 0.0
    leader_crash: float = 0.0
    leader_freeze: float = 0.0
    leader_cut_off: float = 0.0
    fork: float = 0.0
    suspend: float = 0.0
    wipe: float = 0.0
    limit_change: float = 0.0
    new_dimension: float = 0.0
    recreation: float = 0.0
    #: Of calls and of safe capacities.
    term_change: float = 0.0
    #: A dimension is taken out, and comes back soon.
    removal: float = 0.0
    throttle: float = 0.0
    idle: float = 0.0
    leave: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One kind of run. Times in seconds."""

    name: str
    spec: model.BudgetSpec
    holders: int = 4
    replicas: int = 2
    unary_holders: int = 0
    seconds: float = 40.0
    #: Faults happen up to here; the rest shows that the world recovers.
    faults_until: float = 22.0
    faults: Faults = Faults()
    conditions: network.Conditions = field(default_factory=network.Conditions)
    lost_answer_probability: float = 0.0
    elector_ttl_seconds: float = 0.8
    keepalive_seconds: float = 1.0
    start_spread_seconds: float = 1.0
    #: Deaths of processes near the allocator are certified (of all processes, with `certifies_all`).
    certifies: bool = True
    certifies_all: bool = False
    load: actors_holder.Load = field(default_factory=actors_holder.Load)
    loads: Mapping[str, actors_holder.Load] = field(default_factory=dict)

    def load_of(self, name: str) -> actors_holder.Load:
        """What the users of a holder do."""
        return self.loads.get(name, self.load)


def dimension(name: str, limit: int, window_seconds: float = 60.0) -> model.Dimension:
    """A dimension of the standard kind; `limit` in units."""
    return model.Dimension(
        name=name, kind=model.STANDARD_KINDS[name], limit=limit * MICRO, window_seconds=window_seconds
    )


def quick_spec(rng: random.Random) -> model.BudgetSpec:
    """A budget whose times are a tenth of the usual, so that a short run sees many windows."""
    window = rng.choice((4.0, 6.0))
    policy = rng.choice((model.Policy.ACTIVE_SHARE, model.Policy.ACTIVE_SHARE, model.Policy.MAX_MIN))
    return model.BudgetSpec(
        name="llm",
        dimensions=(
            dimension("max_concurrent_requests", rng.choice((5, 8, 12))),
            dimension("rpm_limit", rng.choice((40, 80)), window),
            dimension("tpm_limit", rng.choice((2500, 5000)), window),
        ),
        policy=policy,
        expected_workers=4,
        activity_timeout_seconds=1.5,
        ttl_seconds=2.0,
        refresh_seconds=0.4,
        arrival_jitter_seconds=0.25,
        max_call_seconds=rng.choice((1.0, 2.0)),
        orphan_seconds=rng.choice((None, 0.5)),
        safe_ttl_seconds=1.5,
        max_tokens_per_request=rng.choice((0, 200 * MICRO)),
    )


STALLS = network.Conditions(
    stall_probability=0.01, stall_seconds_max=3.0, loss_probability=0.1, duplication_probability=0.1
)

_FAMILIES: dict[str, tuple[Faults, dict[str, object]]] = {
    "calm": (Faults(idle=3.0), {"conditions": network.Conditions()}),
    "crashes": (Faults(crash=1.2), {}),
    "freezes": (Faults(freeze=1.5, idle=4.0), {}),
    "streams": (Faults(broken_stream=0.7, hidden_break=3.0, crash=6.0), {"lost_answer_probability": 0.02}),
    "partitions": (Faults(partition=2.0, idle=4.0), {}),
    "leaders": (
        Faults(leader_crash=4.0, leader_freeze=4.0, leader_cut_off=4.0, broken_stream=3.0, idle=4.0),
        {"replicas": 3, "lost_answer_probability": 0.03},
    ),
    "forks": (Faults(fork=1.5, crash=5.0), {}),
    "clocks": (Faults(suspend=2.0, freeze=5.0), {}),
    "wipes": (Faults(wipe=8.0, leader_crash=9.0, crash=6.0), {"seconds": 50.0}),
    "admin": (
        Faults(
            limit_change=2.0, recreation=5.0, new_dimension=9.0, leader_crash=8.0, broken_stream=4.0, idle=5.0
        ),
        {"seconds": 45.0},
    ),
    "redefinitions": (
        Faults(
            term_change=2.0,
            removal=9.0,
            leader_crash=2.5,
            crash=4.0,
            partition=3.0,
            hidden_break=4.0,
            idle=5.0,
        ),
        {"seconds": 60.0, "replicas": 3},
    ),
    "throttles": (Faults(throttle=1.0, crash=5.0), {}),
    "unary": (Faults(crash=4.0, leader_freeze=6.0, idle=4.0), {"unary_holders": 2}),
    "overdraft": (
        Faults(idle=2.0, crash=4.0),
        {"load": actors_holder.Load(users=5, above_probability=0.2)},
    ),
    "chaos": (
        Faults(
            crash=4.0,
            freeze=4.0,
            broken_stream=3.0,
            hidden_break=6.0,
            partition=6.0,
            leader_crash=10.0,
            leader_freeze=8.0,
            leader_cut_off=8.0,
            fork=6.0,
            suspend=8.0,
            limit_change=8.0,
            recreation=15.0,
            throttle=10.0,
            idle=4.0,
            leave=6.0,
        ),
        {"replicas": 3, "unary_holders": 1, "lost_answer_probability": 0.02, "holders": 5},
    ),
}


def _with_long_terms(spec: model.BudgetSpec) -> model.BudgetSpec:
    """Terms that changes only shorten."""
    safe = {"rpm_limit": 4 * MICRO, "tpm_limit": 200 * MICRO, "max_concurrent_requests": MICRO}
    classes = (model.HolderClass(pattern="w[01]", safe_capacity=safe),)
    return dataclasses.replace(
        spec,
        max_call_seconds=3.0,
        # Above it: between two calls nobody is idle.
        activity_timeout_seconds=4.0,
        safe_ttl_seconds=1.5,
        holder_classes=classes,
    )


def _family(name: str) -> Callable[[int], Scenario]:
    faults, settings = _FAMILIES[name]

    def make(seed: int) -> Scenario:
        rng = random.Random(f"{name} {seed}")  # noqa: S311 - a simulation wants repeatable numbers
        spec = quick_spec(rng)
        if name in ("crashes", "partitions", "chaos") and rng.random() < 0.3:
            safe = {"rpm_limit": 4 * MICRO, "tpm_limit": 200 * MICRO, "max_concurrent_requests": MICRO}
            spec = dataclasses.replace(
                spec, holder_classes=(model.HolderClass(pattern="w0", safe_capacity=safe),)
            )
        if rng.random() < 0.2:
            spec = dataclasses.replace(spec, charged_at=model.ChargedAt.COMPLETION)
        if name == "redefinitions":
            spec = _with_long_terms(spec)
        load = actors_holder.Load(
            users=rng.choice((1, 3, 6)), call_seconds_max=min(0.9, spec.max_call_seconds - 0.05)
        )
        if name == "redefinitions":
            load = dataclasses.replace(load, call_seconds_max=spec.max_call_seconds)
        base = Scenario(name=name, spec=spec, faults=faults, conditions=STALLS, load=load)
        return dataclasses.replace(base, **settings)  # type: ignore[arg-type]

    return make


SCENARIOS: dict[str, Callable[[int], Scenario]] = {name: _family(name) for name in _FAMILIES}
