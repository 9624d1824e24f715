"""Names as people type them: a node without its domain, a worker without its node, where one can be meant."""

from collections.abc import Iterator, Sequence
from typing import Any

from leasehold.core import errors
from leasehold.core.node import model

NODES_PAGE_SIZE = 500
#: Names in an error that leaves a choice.
CHOICES_MAX = 20


def nodes(allocator: Any, *, is_brief: bool = False) -> tuple[list[Any], bool]:
    """Every node as a message of the API, by name; and whether so many were lost at once."""
    found: list[Any] = []
    is_mass_loss = False
    for page in _pages(allocator, is_brief):
        found.extend(page.nodes)
        is_mass_loss = is_mass_loss or page.is_mass_loss
    return found, is_mass_loss


def _pages(allocator: Any, is_brief: bool) -> Iterator[Any]:
    from leasehold.api.node.v1 import node_service_pb2 as wire

    token = ""
    while True:
        request = wire.ListNodesRequest(page_size=NODES_PAGE_SIZE, page_token=token, is_brief=is_brief)
        page = allocator.call("ListNodes", request)
        yield page
        token = page.next_page_token
        if not token:
            return


def checked_node(given: str) -> str:
    """A node's name, or empty. Raises `InvalidArgument`."""
    return model.checked_node_name(given) if given else ""


def checked_pool(given: str) -> str:
    """A pool's name, or empty. Raises `InvalidArgument`."""
    return model.checked_pool_name(given) if given else ""


def node(allocator: Any, given: str) -> str:
    """The full name of a node: as given, or the only one that has it before a dot. Empty stays empty.

    Raises `InvalidArgument` where several have it, `NotFound` where none has.
    """
    if not given:
        return ""
    known = [each.name for each in nodes(allocator, is_brief=True)[0]]
    if given in known:
        return given
    return _only("node", given, [name for name in known if name.startswith(f"{given}.")], known)


def worker(allocator: Any, given: str, *, node_name: str) -> tuple[str, str]:
    """Node and full name of a worker, of which the part before the @ is enough where one has it.

    Raises `InvalidArgument` where several have it, `NotFound` where none has.
    """
    if "@" in given:
        name = model.checked_worker_name(given)
        return node(allocator, node_name) or name.partition("@")[2], name
    # The part before the @ is as a worker's name is, on whichever node.
    model.checked_worker_name(f"{given}@node")
    only = node(allocator, node_name)
    if only:
        return only, f"{given}@{only}"
    known = [
        each.name
        for of in nodes(allocator)[0]
        if of.HasField("status")
        for pool in of.status.pools
        for each in pool.workers
    ]
    name = _only("worker", given, [name for name in known if name.partition("@")[0] == given], known)
    return name.partition("@")[2], name


def _only(what: str, given: str, found: Sequence[str], known: Sequence[str]) -> str:
    if len(found) > 1:
        raise errors.InvalidArgument(f"{what}: {given} may be {_list(found)}", field=what)
    if not found:
        raise errors.NotFound(f"there is no {what} {given}; there are {_list(known) or 'none'}")
    return found[0]


def _list(names: Sequence[str]) -> str:
    more = len(names) - CHOICES_MAX
    return ", ".join(names[:CHOICES_MAX]) + (f" and {more} more" if more > 0 else "")
