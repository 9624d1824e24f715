"""`leasehold job queue`: queues and their quotas."""

from typing import Annotated

import typer
from leasehold.cli import options, output

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

TABLE, NAME = output.Format.TABLE, output.Format.NAME

Queue = Annotated[str, typer.Argument(metavar="QUEUE", help="The queue's name")]


@app.command()
def put(
    queue: Queue,
    cpus: Annotated[
        int | None, typer.Option("--cpus", metavar="CPUS", help="Quota; left out: no limit", min=0)
    ] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", metavar="SIZE", help="Quota, such as 64GB; left out: no limit")
    ] = None,
    addr: options.Addr = None,
    timeout: options.Timeout = options.TIMEOUT_SECONDS,
    form: options.Output = TABLE,
) -> None:
    """Create a queue, or replace its quotas. Its jobs together never have more."""
    from leasehold.api.job.v1 import job_pb2
    from leasehold.api.job.v1 import job_service_pb2 as wire
    from leasehold.cli import connection, job_tables
    from leasehold.client import job_specs
    from leasehold.core.job import model
    from leasehold.rpc import job_documents

    size = None if memory is None else job_specs.memory_bytes(memory, field="--memory")
    name = model.checked_queue_name(queue, field_name="QUEUE")
    message = job_pb2.Queue(name=name, nominal_cpus=cpus, nominal_memory_bytes=size)
    with connection.connect(addr, timeout) as allocator:
        answer = allocator.call("PutQueue", wire.PutQueueRequest(queue=message))
    document = job_documents.quota(answer.queue)
    if form is NAME:
        output.lines([name])
    elif form is not TABLE:
        output.data(document, form)
    else:
        most = [f"{cpus} CPUs"] if cpus is not None else []
        most += [job_tables.memory(size)] if size is not None else []
        output.lines([f"queue {name}: {'at most ' + ', '.join(most) if most else 'no limit'}"])


@app.command(name="list")
def list_queues(
    addr: options.Addr = None,
    timeout: options.Timeout = options.TIMEOUT_SECONDS,
    form: options.Output = TABLE,
) -> None:
    """List the queues, what their jobs have, and how many wait."""
    from leasehold.api.job.v1 import job_service_pb2 as wire
    from leasehold.cli import connection, job_tables
    from leasehold.rpc import job_documents

    with connection.connect(addr, timeout) as allocator:
        answer = allocator.call("ListQueues", wire.ListQueuesRequest())
    documents = [job_documents.queue(each) for each in answer.queues]
    if form is NAME:
        output.lines([each["name"] for each in documents])
    elif form is not TABLE:
        output.data(documents, form)
    else:
        job_tables.queues(documents)


@app.command()
def delete(queue: Queue, addr: options.Addr = None, timeout: options.Timeout = options.TIMEOUT_SECONDS) -> None:
    """Delete a queue that has no jobs in line or running; `default` stays."""
    from leasehold.api.job.v1 import job_service_pb2 as wire
    from leasehold.cli import connection
    from leasehold.core.job import model

    name = model.checked_queue_name(queue, field_name="QUEUE")
    with connection.connect(addr, timeout) as allocator:
        allocator.call("DeleteQueue", wire.DeleteQueueRequest(name=name))
    output.lines([f"queue {name} deleted"])
