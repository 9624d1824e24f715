"""`leasehold node`: what hosts have, why, and taking them out of service.

gRPC and the messages are imported by the commands that call, so that help and completion stay quick.
"""

from typing import Annotated, Any

import typer
from leasehold.cli import options, output

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

TABLE, NAME = output.Format.TABLE, output.Format.NAME


@app.command(name="list")
def list_nodes(
    addr: options.Addr = None,
    timeout: options.Timeout = options.TIMEOUT_SECONDS,
    form: options.Output = TABLE,
) -> None:
    """List the nodes, by name."""
    documents, is_mass_loss = _documents(addr, timeout, "")
    if form is NAME:
        output.lines([each["name"] for each in documents])
    elif form is not TABLE:
        output.data(documents, form)
    elif documents:
        from leasehold.cli import node_tables

        node_tables.nodes(documents)
        node_tables.warn(documents, is_mass_loss=is_mass_loss)
    else:
        output.say("there are no nodes; `leasehold agent` on a host makes it one")


@app.command()
def status(
    node: options.AnyNode = "",
    addr: options.Addr = None,
    timeout: options.Timeout = options.TIMEOUT_SECONDS,
    form: options.Output = TABLE,
) -> None:
    """Print nodes at a glance: memory, load, workers healthy, pending and failed, and why there are so many."""
    documents, is_mass_loss = _documents(addr, timeout, node)
    if form is NAME:
        output.lines([each["name"] for each in documents])
    elif form is not TABLE:
        output.data(documents[0] if node else documents, form)
    elif documents:
        from leasehold.cli import node_tables

        node_tables.glance(documents)
        node_tables.warn(documents, is_mass_loss=is_mass_loss)
    else:
        output.say("there are no nodes; `leasehold agent` on a host makes it one")


def _documents(addr: str | None, timeout: float, given: str) -> tuple[list[Any], bool]:
    """Every node, or the one of the name, as programs get it."""
    from leasehold.cli import connection, names
    from leasehold.rpc import node_documents

    names.checked_node(given)
    with connection.connect(addr, timeout) as allocator:
        if given:
            return [node_documents.node(_get(allocator, names.node(allocator, given)))], False
        found, is_mass_loss = names.nodes(allocator)
    return [node_documents.node(each) for each in found], is_mass_loss


def _get(allocator: Any, name: str) -> Any:
    from leasehold.api.node.v1 import node_service_pb2 as wire

    return allocator.call("GetNode", wire.GetNodeRequest(name=name)).node


@app.command()
def explain(
    node: options.OnlyNode = "",
    pool: options.PoolFilter = "",
    decisions: Annotated[
        int, typer.Option("-n", "--decisions", help="So many of the last decisions", min=1, max=200)
    ] = 20,
    addr: options.Addr = None,
    timeout: options.Timeout = options.TIMEOUT_SECONDS,
    form: options.Output = TABLE,
) -> None:
    """Say why each pool of a node has the workers that it has, with the numbers, and what was decided last."""
    from leasehold.api.node.v1 import order_pb2
    from leasehold.cli import connection, names, node_tables, orders
    from leasehold.rpc import node_documents

    names.checked_node(node)
    names.checked_pool(pool)
    documents = []
    with connection.connect(addr, timeout) as allocator:
        name = names.node(allocator, node)
        found = _get(allocator, name)
        for each in [pool] if pool else [each.name for each in found.status.pools]:
            order = order_pb2.Order(explain=order_pb2.ExplainOrder(pool=each, decisions_max=decisions))
            _, result = orders.give(allocator, found.name, order, timeout_seconds=timeout, order_id="")
            documents.append(node_documents.explanation(result.explanation, node=found.name))
    if form is NAME:
        output.lines([each["pool"]["name"] for each in documents])
    elif form is not TABLE:
        output.data(documents, form)
    elif documents:
        node_tables.explanations(documents)
    else:
        output.say(f"{found.name} has no pools, or has not told of them yet")


@app.command()
def drain(
    node: options.Node,
    cancel: Annotated[bool, typer.Option("--cancel", help="Take work up again")] = False,
    addr: options.Addr = None,
    timeout: options.Timeout = options.TIMEOUT_SECONDS,
    form: options.Output = TABLE,
) -> None:
    """Stop every worker of a node by its stop contract and start no more, until --cancel.

    The command does not wait for the workers to end; `leasehold node status` shows them.
    """
    from leasehold.api.node.v1 import order_pb2
    from leasehold.cli import connection, names, node_tables, orders
    from leasehold.rpc import node_documents

    names.checked_node(node)
    with connection.connect(addr, timeout) as allocator:
        order = order_pb2.Order(drain=order_pb2.DrainOrder(is_draining=not cancel))
        name, result = orders.give(allocator, names.node(allocator, node), order, timeout_seconds=timeout)
    documents = [node_documents.pool(each, node=name) for each in result.pools]
    if form is NAME:
        output.lines([name])
    elif form is not TABLE:
        output.data({"node": name, "is_draining": not cancel, "pools": documents}, form)
    else:
        output.lines([f"node {name} {'takes work again' if cancel else 'drains'}"])
        node_tables.pools(documents)


@app.command()
def utilization(
    node: options.AnyNode = "",
    addr: options.Addr = None,
    timeout: options.Timeout = options.TIMEOUT_SECONDS,
    form: options.Output = TABLE,
) -> None:
    """Print what jobs have been allocated of each node: allocated / total * 100."""
    from leasehold.api.job.v1 import job_service_pb2 as wire
    from leasehold.cli import connection, job_tables, names
    from leasehold.rpc import job_documents

    names.checked_node(node)
    with connection.connect(addr, timeout) as allocator:
        request = wire.GetUtilizationRequest(node=names.node(allocator, node))
        document = job_documents.utilization(allocator.call("GetUtilization", request))
    if form is NAME:
        output.lines([each["node"] for each in document["nodes"]])
    elif form is not TABLE:
        output.data(document, form)
    else:
        job_tables.utilization(document)


@app.command()
def delete(
    node: options.Node, addr: options.Addr = None, timeout: options.Timeout = options.TIMEOUT_SECONDS
) -> None:
    """Forget a node that is lost or gone."""
    from leasehold.api.node.v1 import node_service_pb2 as wire
    from leasehold.cli import connection, names

    names.checked_node(node)
    with connection.connect(addr, timeout) as allocator:
        name = names.node(allocator, node)
        allocator.call("DeleteNode", wire.DeleteNodeRequest(name=name))
    output.lines([f"node {name} deleted"])


@app.command()
def plan(
    file: Annotated[str, typer.Option("-f", "--file", help="JSON document, - for standard input")] = "-",
    form: options.Output = output.Format.JSON,
) -> None:
    """Rehearse the sizing of a pool: memory and workers in, the optimal number and reasons out. Needs no host.

    Only the available memory is required: {"formula": "managed", "available_gb": 32.1, "reserve_gb": 4,
    "worker_limit_gb": 6, "threshold_gb": 12, "min": 2, "max": 8, "workers": [{"held_gb": 3.5, "state":
    "running"}]}. A GB is 2**30 bytes.
    """
    from leasehold.cli import documents
    from leasehold.core.node import plan as plans

    answer = plans.run(documents.read_plan(file))
    if form is NAME:
        output.lines([str(answer["optimal"])])
    elif form is TABLE:
        output.lines([f"optimal  {answer['optimal']}", *(f"  {reason}" for reason in answer["reasons"])])
    else:
        output.data(answer, form)
