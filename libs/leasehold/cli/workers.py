"""`leasehold workers`: list, scale, start and stop worker processes, and read what they write."""

import codecs
import time
from typing import Annotated, Any

import typer
from leasehold.cli import options, output

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

TABLE, NAME = output.Format.TABLE, output.Format.NAME

#: How long one question for new lines waits at the node.
LOG_WAIT_SECONDS = 5.0
LOG_PAUSE_SECONDS = 0.1
#: Of the last lines; what is before is left out.
LOG_BYTES_MAX = 2**20
HOLD_SECONDS_MAX = 30 * 86_400.0


@app.command(name="list")
def list_workers(
    node: options.NodeFilter = "",
    pool: options.PoolFilter = "",
    addr: options.Addr = None,
    timeout: options.Timeout = options.TIMEOUT_SECONDS,
    form: options.Output = TABLE,
) -> None:
    """List the workers, those that ended recently included.

    With -o name only those that have not ended.
    """
    from leasehold.cli import connection, names, node_tables
    from leasehold.core.node import model
    from leasehold.rpc import node_documents

    names.checked_node(node)
    names.checked_pool(pool)
    with connection.connect(addr, timeout) as allocator:
        name = names.node(allocator, node)
        found, _ = names.nodes(allocator)
    documents = [
        node_documents.worker(worker, node=of.name)
        for of in found
        if name in ("", of.name) and of.HasField("status")
        for each in of.status.pools
        if pool in ("", each.name)
        for worker in each.workers
    ]
    if form is NAME:
        output.lines([each["name"] for each in documents if each["state"] is not model.WorkerState.EXITED])
    elif form is not TABLE:
        output.data(documents, form)
    elif documents:
        node_tables.workers(documents)
    else:
        output.say("there are no workers")


@app.command()
def scale(
    target: Annotated[
        int | None, typer.Argument(metavar="WORKERS", help="How many, MIN to MAX", min=0, max=1000)
    ] = None,
    auto: Annotated[bool, typer.Option("--auto", help="End the target by hand: memory decides again")] = False,
    hold: Annotated[
        float | None,
        typer.Option("--hold", metavar="SECONDS", help="End it by itself after so long", max=HOLD_SECONDS_MAX),
    ] = None,
    node: options.NodeOption = "",
    pool: options.PoolOption = "",
    addr: options.Addr = None,
    timeout: options.Timeout = options.TIMEOUT_SECONDS,
    form: options.Output = TABLE,
) -> None:
    """Set a pool's number of workers by hand, or end that.

    It survives restarts of the agent. Memory safety may hold it lower, and returns to it later. Beyond memory
    now it is refused, with the numbers.
    """
    from leasehold.api.node.v1 import order_pb2
    from leasehold.rpc import wire_values

    if auto == (target is not None):
        raise typer.BadParameter("give a number of workers, or --auto", param_hint="WORKERS")
    order = order_pb2.Order(scale=order_pb2.ScaleOrder(pool=_checked_pool(pool)))
    if auto:
        order.scale.auto = True
    else:
        order.scale.workers = target or 0
    if hold is not None:
        if auto or not hold > 0:
            raise typer.BadParameter("it is above 0, and goes with a number of workers", param_hint="--hold")
        order.scale.hold.CopyFrom(wire_values.encode_seconds(hold))
    _order(order, node, addr, timeout, form)


@app.command()
def start(
    node: options.NodeOption = "",
    pool: options.PoolFilter = "",
    addr: options.Addr = None,
    timeout: options.Timeout = options.TIMEOUT_SECONDS,
    form: options.Output = TABLE,
) -> None:
    """Start the workers of pools that were stopped."""
    from leasehold.api.node.v1 import order_pb2

    order = order_pb2.Order(start_workers=order_pb2.StartWorkersOrder(pool=_checked_pool(pool)))
    _order(order, node, addr, timeout, form)


@app.command()
def stop(
    worker: options.AnyWorker = "",
    node: options.NodeOption = "",
    pool: options.PoolFilter = "",
    immediate: Annotated[
        bool, typer.Option("--immediate", help="Do not wait for running tasks: give them back to their queues")
    ] = False,
    addr: options.Addr = None,
    timeout: options.Timeout = options.TIMEOUT_SECONDS,
    form: options.Output = TABLE,
) -> None:
    """Stop the workers of a node's pools until `start`, or one worker, which is then replaced.

    Each ends by its pool's stop contract: it finishes its task first. The command does not wait for that.
    """
    from leasehold.api.node.v1 import order_pb2
    from leasehold.cli import connection, names

    if worker and pool:
        raise typer.BadParameter("a worker's name tells its pool", param_hint="--pool")
    order = order_pb2.Order(
        stop_workers=order_pb2.StopWorkersOrder(pool=_checked_pool(pool), is_immediate=immediate)
    )
    if worker:
        names.checked_node(node)
        with connection.connect(addr, timeout) as allocator:
            node, order.stop_workers.worker = names.worker(allocator, worker, node_name=node)
    _order(order, node, addr, timeout, form)


@app.command()
def pause(
    node: options.NodeOption = "",
    pool: options.PoolFilter = "",
    addr: options.Addr = None,
    timeout: options.Timeout = options.TIMEOUT_SECONDS,
    form: options.Output = TABLE,
) -> None:
    """Pause the sizing of pools until `resume`: their workers stay as many as they are.

    It survives restarts of the agent. Restarts after crashes, limits and the hard floor of memory go on.
    """
    _monitoring(node, pool, addr, timeout, form, is_running=False)


@app.command()
def resume(
    node: options.NodeOption = "",
    pool: options.PoolFilter = "",
    addr: options.Addr = None,
    timeout: options.Timeout = options.TIMEOUT_SECONDS,
    form: options.Output = TABLE,
) -> None:
    """Let memory decide again about pools that were paused, or set by hand."""
    _monitoring(node, pool, addr, timeout, form, is_running=True)


def _monitoring(
    node: str, pool: str, addr: str | None, timeout: float, form: output.Format, *, is_running: bool
) -> None:
    from leasehold.api.node.v1 import order_pb2

    order = order_pb2.Order(
        monitoring=order_pb2.MonitoringOrder(pool=_checked_pool(pool), is_running=is_running)
    )
    _order(order, node, addr, timeout, form)


def _checked_pool(pool: str) -> str:
    from leasehold.cli import names

    return names.checked_pool(pool)


def _order(order: Any, node: str, addr: str | None, timeout: float, form: output.Format) -> None:
    """Hand an order to a node, and print the pools and the stopping workers of its answer."""
    from leasehold.cli import connection, names, node_tables, orders
    from leasehold.rpc import node_documents

    names.checked_node(node)
    with connection.connect(addr, timeout) as allocator:
        name, result = orders.give(allocator, names.node(allocator, node), order, timeout_seconds=timeout)
    pools = [node_documents.pool(each, node=name) for each in result.pools]
    stopping = [each.name for each in result.workers]
    if form is NAME:
        output.lines([each["name"] for each in pools])
    elif form is not TABLE:
        output.data({"node": name, "pools": pools, "stopping_workers": stopping}, form)
    else:
        node_tables.pools(pools)
        output.lines([f"stopping {each}" for each in stopping])


@app.command()
def logs(
    worker: options.Worker,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until it ends, or Ctrl-C")] = False,
    lines: Annotated[
        int, typer.Option("-n", "--lines", metavar="LINES", help="The last so many", min=1, max=10_000)
    ] = 100,
    node: options.NodeFilter = "",
    addr: options.Addr = None,
    timeout: options.Timeout = options.TIMEOUT_SECONDS,
) -> None:
    """Print what a worker has written to its log."""
    from leasehold.api.node.v1 import order_pb2
    from leasehold.cli import connection, names, orders
    from leasehold.rpc import wire_values

    names.checked_node(node)
    with connection.connect(addr, timeout) as allocator:
        where, name = names.worker(allocator, worker, node_name=node)
        reading = order_pb2.ReadLogOrder(worker=name, tail_lines=lines, bytes_max=LOG_BYTES_MAX)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        while True:
            order = order_pb2.Order(read_log=reading)
            seconds = timeout + LOG_WAIT_SECONDS if reading.cursor else timeout
            # Nothing is kept of it: a repeated reading may well find more.
            _, result = orders.give(allocator, where, order, timeout_seconds=seconds, order_id="")
            chunk = result.log
            if chunk.lost_bytes:
                output.say(f"leasehold: {chunk.lost_bytes} bytes were lost by a rotation")
            write_log(chunk.data, decoder)
            if chunk.is_end or not follow:
                return
            if not chunk.data:  # a node that does not wait is not asked in a tight circle
                time.sleep(LOG_PAUSE_SECONDS)
            reading = order_pb2.ReadLogOrder(worker=name, cursor=chunk.cursor)
            reading.wait.CopyFrom(wire_values.encode_seconds(LOG_WAIT_SECONDS))


def write_log(data: bytes, decoder: codecs.IncrementalDecoder) -> None:
    """Bytes of a log, as they are; on a terminal what would drive it is shown instead."""
    if not output.is_terminal():
        output.write_bytes(data)
        return
    text = decoder.decode(data)
    output.write(
        "".join(
            each if each.isprintable() or each in "\n\t" else each.encode("unicode_escape").decode("ascii")
            for each in text
        )
    )
