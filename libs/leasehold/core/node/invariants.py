"""What is true of a pool's machine after every event; tests run it after every step."""

import math

from leasehold.core.node import model, worker_machine
from leasehold.core.node.model import WorkerState


def violations(machine: worker_machine.PoolMachine, now: float) -> list[str]:
    """Everything that is wrong, each with its numbers; empty: nothing."""
    views = machine.workers(now)
    alive = [view for view in views if view.state in model.ALIVE_STATES]
    live = [view for view in alive if view.state in model.LIVE_STATES]
    replaced = [view for view in alive if view.state not in model.LIVE_STATES and view.is_replaced]
    going = [view for view in alive if view.state not in model.LIVE_STATES and not view.is_replaced]
    found: list[str] = []

    def require(is_true: bool, told: str) -> None:
        if not is_true:
            found.append(told)

    names = [view.name for view in alive]
    require(len(set(names)) == len(names), f"two workers live under one name: {names}")
    require(len({view.start_number for view in views}) == len(views), "two workers have one start number")
    for view in views:
        told = f"{view.name} in {view.state}: "
        is_at_kill = view.stop_step == "KILL"
        require((view.exit is not None) == (view.state is WorkerState.EXITED), told + "an exit only at the end")
        require(view.state is not WorkerState.RUNNING or view.process is not None, told + "it has no process")
        require(view.state is not WorkerState.STARTING or view.process is None, told + "it has started")
        require((view.state is WorkerState.KILLING) == is_at_kill, told + f"its stop is at {view.stop_step!r}")
        require(
            (view.state is WorkerState.STOPPING) == (bool(view.stop_step) and not is_at_kill),
            told + f"its stop is at {view.stop_step!r}",
        )
        require(not view.is_replaced or view.state not in model.LIVE_STATES, told + "it is live and replaced")
    if machine.desired is not None:
        held = len(live) + len(replaced)
        told = f"{machine.desired} wanted, {len(live)} live, {len(replaced)} replaced, {len(going)} going"
        require(held <= machine.desired or bool(going or replaced), f"nobody is asked to go: {told}")
        is_waiting = held < machine.desired and not machine.blocked_reason
        require(not is_waiting or machine.next_deadline() < math.inf, f"nobody will start one: {told}")
    for view in alive:
        is_ending = view.state in (WorkerState.STOPPING, WorkerState.KILLING)
        is_bounded = machine.next_deadline() < math.inf
        require(not is_ending or is_bounded, f"{view.name} may stop for ever")
    return found
