"""What is true of a registry after every event; tests run it after every step."""

from leasehold.core.node import registry, registry_model, watch_list
from leasehold.core.node.registry_model import NodeState


def check(known: registry.NodeRegistry, pace: registry_model.Pace | None = None) -> None:
    """Assert the invariants of a registry, whose effects were taken or not."""
    sessions: dict[int, str] = {}
    reporting = 0
    for name, node in known.nodes.items():
        assert node.record.name == name
        assert node.is_alive == (node.deadline != float("inf")), f"{name} is {node.state} until {node.deadline}"
        if node.is_alive:
            assert known.next_deadline() <= node.deadline, f"{name} could be lost unseen"
            assert node.queued_at <= node.deadline, f"{name} is looked at too late"
        if node.session is not None:
            assert node.session not in sessions, f"{name} and {sessions[node.session]} share a session"
            sessions[node.session] = name
            assert known.name_of(node.session) == name
            place = watch_list.place_of_agent(node.record.registration)
            assert node.session in known.watched.sessions_at(place), f"{name} would not be asked to watch"
        reporting += node.state is not NodeState.GONE
    assert known.terms == (pace or registry_model.Pace()).terms(reporting)
