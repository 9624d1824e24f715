"""`leasehold job`: submit jobs, see why they wait, follow and end them; queues are in `job_queue`, batches in
`job_batch`.

gRPC and the messages are imported by the commands that call, so that help and completion stay quick.
"""

from typing import Annotated, Any

import typer
from leasehold.cli import job_batch, job_queue, options, output
from leasehold.core import errors

EXIT_FAILED, EXIT_NOT_PLACED = 1, 2
#: Of a page of the list.
PAGE_SIZE = 500

#: As main.EXIT_CODES, for what waits for a job.
EXIT_CODES = (
    "Exit codes: 0 done (of a job that is waited for: completed); 1 refused or failed, the message says why; "
    "2 not placed: the job ended without ever having a node (or a wrong command line, which prints its usage); "
    "3 no allocator reached, trying again may help; 130 interrupted, the job goes on."
)

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(job_queue.app, name="queue", help="Queues and their quotas.", epilog=EXIT_CODES)

TABLE, NAME = output.Format.TABLE, output.Format.NAME

Job = Annotated[str, typer.Argument(metavar="JOB", help="The job's id")]
Cpus = Annotated[int, typer.Option("--cpus", metavar="CPUS", help="Whole processors", min=1)]
Memory = Annotated[
    str, typer.Option("--memory", metavar="SIZE", help="Such as 4GB or 512MB; a GB is 2**30 bytes")
]
Pairs = list[str] | None
Param = Annotated[
    Pairs, typer.Option("-p", "--param", metavar="KEY=VALUE", help="Of the template; may be repeated")
]
Selector = Annotated[
    Pairs, typer.Option("-l", "--selector", metavar="KEY=VALUE", help="Label that the node must have")
]
MaxRun = Annotated[
    str | None,
    typer.Option("--max-run", metavar="DURATION", help="Ended after so long, such as 90s or 10m"),
]
MaxAttempts = Annotated[
    int, typer.Option("--max-attempts", help="Attempts that may fail by its own fault", min=1, max=100)
]
OnLost = Annotated[
    str,
    typer.Option("--on-lost", help="Tried again when its host is lost: never, after_proof or after_fence"),
]
WaitForCapacity = Annotated[
    bool, typer.Option("--wait-for-capacity", help="Stay in line though no node could ever hold it")
]
RequestId = Annotated[
    str, typer.Option("--request-id", metavar="ID", help="A repeat within a day is the same job")
]
PlaceWithin = Annotated[
    str | None,
    typer.Option("--place-within", metavar="DURATION", help="Cancel it if it has no node by then: exit 2"),
]
Template = Annotated[str, typer.Argument(metavar="TEMPLATE", help="Command template that the hosts declare")]


def pairs(given: Pairs, option: str) -> dict[str, str]:
    """Texts as KEY=VALUE. Raises `InvalidArgument`."""
    found: dict[str, str] = {}
    for text in given or ():
        key, separator, value = text.partition("=")
        if not (key and separator) or key in found:
            wrong = "is given twice" if key in found else "is not KEY=VALUE"
            raise errors.InvalidArgument(f"{option}: {text[:60]!r} {wrong}", field=option)
        found[key] = value
    return found


@app.command(epilog=EXIT_CODES)
def submit(
    template: Template,
    cpus: Cpus,
    memory: Memory,
    param: Param = None,
    name: Annotated[str, typer.Option("--name", help="For people")] = "",
    queue: Annotated[
        str, typer.Option("--queue", metavar="QUEUE", help="Whose quota it counts to")
    ] = "default",
    priority: Annotated[int, typer.Option("--priority", help="The higher first", min=-1000, max=1000)] = 0,
    selector: Selector = None,
    max_run: MaxRun = None,
    max_attempts: MaxAttempts = 1,
    on_lost: OnLost = "after_proof",
    spreading: Annotated[str, typer.Option("--spreading", help="Choice among nodes: pack or spread")] = "pack",
    wait_for_capacity: WaitForCapacity = False,
    request_id: RequestId = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell what would happen; keep nothing")] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait for its end")] = False,
    place_within: PlaceWithin = None,
    addr: options.Addr = None,
    timeout: options.Timeout = options.TIMEOUT_SECONDS,
    form: options.Output = TABLE,
) -> None:
    """Submit a job, and show what happens to it until it has ended.

    Its place in line and what blocks it, where it starts, how it ends, and the end of its log if it fails.
    """
    from leasehold.cli import connection, job_watch
    from leasehold.client import job_specs

    spec = job_specs.job_spec(
        template,
        cpus=cpus,
        memory=memory,
        parameters=pairs(param, "--param"),
        name=name,
        queue=queue,
        priority=priority,
        node_selector=pairs(selector, "--selector"),
        max_run_seconds=_seconds(max_run, "--max-run"),
        max_attempts=max_attempts,
        on_lost=on_lost,
        spreading=spreading,
        wait_for_capacity=wait_for_capacity,
    )
    place_seconds = _seconds(place_within, "--place-within")
    with connection.connect(addr, timeout) as allocator:
        if dry_run:
            _show_explanation(_submitted(allocator, spec, "", is_dry_run=True), form, None)
            return
        job = _submitted(allocator, spec, request_id)
        if detach:
            _show_job(job, form, f"job {job['job_id']} submitted")
            return
        if form is NAME:
            output.lines([job["job_id"]])
        tell = _tell(form)
        tell(f"{job['job_id']} submitted")
        watch = job_watch.Watch(allocator, job["job_id"], tell=tell, place_seconds=place_seconds)
        job = _watched(watch, job["job_id"])
    if form not in (TABLE, NAME):
        output.data(job, form)
    _leave(job_watch.exit_code(job))


def _leave(code: int) -> None:
    if code:
        raise typer.Exit(code)


def _tell(form: output.Format) -> Any:
    """Where what happens is told: data goes to standard output alone."""
    return (lambda text: output.lines([output.printable(text)])) if form is TABLE else output.say


def _seconds(given: str | None, option: str) -> float | None:
    from leasehold.client import job_specs

    return None if given is None else job_specs.duration_seconds(given, field=option)


def _submitted(allocator: Any, spec: Any, request_id: str, *, is_dry_run: bool = False) -> Any:
    """The job's document; of a dry run the explanation's."""
    import uuid

    from leasehold.api.job.v1 import job_service_pb2 as wire
    from leasehold.rpc import job_codec, job_documents

    request = wire.SubmitJobRequest(
        spec=job_codec.encode_spec(spec), request_id=request_id or uuid.uuid4().hex, is_dry_run=is_dry_run
    )
    answer = allocator.call("SubmitJob", request)
    return job_documents.explanation(answer.explanation) if is_dry_run else job_documents.job(answer.job)


def _watched(watch: Any, job_id: str) -> Any:
    try:
        return watch.run()
    except errors.NotPlaced as error:
        output.fail(error)
        raise typer.Exit(EXIT_NOT_PLACED) from None
    except KeyboardInterrupt:
        output.say(f"leasehold: job {job_id} goes on; `leasehold job cancel {job_id}` ends it")
        raise


def _show_job(job: Any, form: output.Format, text: str) -> None:
    if form is NAME:
        output.lines([job["job_id"]])
    elif form is not TABLE:
        output.data(job, form)
    else:
        output.lines([text])


def _show_explanation(document: Any, form: output.Format, job_id: str | None) -> None:
    from leasehold.cli import job_tables

    if form is NAME:
        output.lines([job_id or document["node"] or ""])
    elif form is not TABLE:
        output.data(document, form)
    else:
        job_tables.explanation(document)


app.command(epilog=EXIT_CODES)(job_batch.batch)


@app.command(name="list")
def list_jobs(
    state: Annotated[
        list[str] | None,
        typer.Option("--state", help="pending, running, completed, failed or cancelled; may be repeated"),
    ] = None,
    queue: Annotated[str, typer.Option("--queue", metavar="QUEUE", help="Of this queue only")] = "",
    node: options.NodeFilter = "",
    limit: Annotated[int, typer.Option("-n", "--limit", help="At most so many", min=1, max=1_000_000)] = 100,
    addr: options.Addr = None,
    timeout: options.Timeout = options.TIMEOUT_SECONDS,
    form: options.Output = TABLE,
) -> None:
    """List jobs, newest first."""
    from leasehold.api.job.v1 import job_service_pb2 as wire
    from leasehold.cli import connection, job_tables, names
    from leasehold.rpc import job_codec, job_documents

    names.checked_node(node)
    states = [job_codec.encode_state(_state(each)) for each in state or ()]
    documents: list[Any] = []
    with connection.connect(addr, timeout) as allocator:
        name, token = names.node(allocator, node), ""
        while True:
            size = min(limit - len(documents), PAGE_SIZE)
            request = wire.ListJobsRequest(
                page_size=size, page_token=token, states=states, queue=queue, node=name
            )
            page = allocator.call("ListJobs", request)
            documents += [job_documents.job(each) for each in page.jobs]
            token = page.next_page_token
            if not token or len(documents) >= limit:
                break
    if form is NAME:
        output.lines([each["job_id"] for each in documents])
    elif form is not TABLE:
        output.data(documents, form)
    elif documents:
        job_tables.jobs(documents)
        if token:
            output.say(f"there are more than these {len(documents)}; --limit shows more")
    else:
        output.say("there are no such jobs")


def _state(given: str) -> Any:
    from leasehold.core.job import model

    try:
        return model.JobState(given.upper())
    except ValueError:
        known = ", ".join(each.value.lower() for each in model.JobState)
        raise errors.InvalidArgument(f"--state: one of {known}, not {given[:40]!r}", field="--state") from None


@app.command()
def status(
    job: Job,
    addr: options.Addr = None,
    timeout: options.Timeout = options.TIMEOUT_SECONDS,
    form: options.Output = TABLE,
) -> None:
    """Print a job: its state, what it asks for, where it runs, how it ended."""
    from leasehold.cli import connection, job_tables

    with connection.connect(addr, timeout) as allocator:
        document = _get(allocator, job)
    if form is TABLE:
        job_tables.status(document)
    else:
        _show_job(document, form, "")


def _get(allocator: Any, job_id: str) -> Any:
    from leasehold.api.job.v1 import job_service_pb2 as wire
    from leasehold.rpc import job_documents

    request = wire.GetJobRequest(job_id=_checked(job_id))
    return job_documents.job(allocator.call("GetJob", request).job)


def _checked(job_id: str) -> str:
    from leasehold.core.job import model

    return model.checked_job_id(job_id, field_name="JOB")


@app.command()
def explain(
    job: Job,
    addr: options.Addr = None,
    timeout: options.Timeout = options.TIMEOUT_SECONDS,
    form: options.Output = TABLE,
) -> None:
    """Say what blocks a pending job, its place in line, and by when it starts."""
    from leasehold.api.job.v1 import job_service_pb2 as wire
    from leasehold.cli import connection
    from leasehold.rpc import job_documents

    request = wire.ExplainJobRequest(job_id=_checked(job))
    with connection.connect(addr, timeout) as allocator:
        answer = allocator.call("ExplainJob", request)
    _show_explanation(job_documents.explanation(answer.explanation, job), form, job)


@app.command()
def cancel(
    jobs: Annotated[list[str], typer.Argument(metavar="JOB...", help="Ids of jobs")],
    addr: options.Addr = None,
    timeout: options.Timeout = options.TIMEOUT_SECONDS,
    form: options.Output = TABLE,
) -> None:
    """Cancel jobs: in line at once; one that runs is asked to end by its stop contract.

    How it ends decides: one that succeeds before it is stopped has completed.
    """
    from leasehold.api.job.v1 import job_service_pb2 as wire
    from leasehold.cli import connection
    from leasehold.rpc import job_documents

    ids = [_checked(each) for each in jobs]
    documents = []
    with connection.connect(addr, timeout) as allocator:
        for each in ids:
            answer = allocator.call("CancelJob", wire.CancelJobRequest(job_id=each))
            documents.append(job_documents.job(answer.job))
            if form is TABLE:
                output.lines([f"job {each} {_cancelled(documents[-1])}"])
    if form is NAME:
        output.lines(ids)
    elif form is not TABLE:
        output.data(documents, form)


def _cancelled(job: Any) -> str:
    return "is asked to end" if job["state"] == "running" else f"has ended: {job['state']}"


@app.command()
def logs(
    job: Job,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until it ends, or Ctrl-C")] = False,
    lines: Annotated[
        int, typer.Option("-n", "--lines", metavar="LINES", help="The last so many", min=1, max=10_000)
    ] = 100,
    attempt: Annotated[int, typer.Option("--attempt", help="0: the last one", min=0)] = 0,
    addr: options.Addr = None,
    timeout: options.Timeout = options.TIMEOUT_SECONDS,
) -> None:
    """Print what a job's process has written to its log."""
    import codecs

    from leasehold.cli import connection, job_watch, workers

    job_id = _checked(job)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    with connection.connect(addr, timeout) as allocator:
        for data in job_watch.log(allocator, job_id, lines=lines, is_following=follow, attempt=attempt):
            workers.write_log(data, decoder)


@app.command(epilog=EXIT_CODES)
def wait(
    jobs: Annotated[list[str], typer.Argument(metavar="JOB...", help="Ids of jobs")],
    max_wait: Annotated[
        str | None, typer.Option("--max-wait", metavar="DURATION", help="Give up after so long; the jobs go on")
    ] = None,
    addr: options.Addr = None,
    timeout: options.Timeout = options.TIMEOUT_SECONDS,
    form: options.Output = TABLE,
) -> None:
    """Wait until jobs have ended, and show what happens to them. 0 only if all have completed."""
    from leasehold.cli import connection, job_watch

    ids = [_checked(each) for each in jobs]
    seconds = _seconds(max_wait, "--max-wait")
    documents, codes = [], set()
    with connection.connect(addr, timeout) as allocator:
        for each in ids:
            watch = job_watch.Watch(allocator, each, tell=_tell(form), timeout_seconds=seconds)
            documents.append(_watched(watch, each))
            codes.add(job_watch.exit_code(documents[-1]))
    if form is NAME:
        output.lines(ids)
    elif form is not TABLE:
        output.data(documents, form)
    _leave(EXIT_FAILED if EXIT_FAILED in codes else max(codes))


@app.command()
def release(
    job: Job,
    force: Annotated[bool, typer.Option("--force", help="Your word that nothing of it runs any more")] = False,
    cause: Annotated[str, typer.Option("--cause", help="How that is known; it is kept in the audit")] = "",
    attempt: Annotated[int, typer.Option("--attempt", help="0: the last one", min=0)] = 0,
    addr: options.Addr = None,
    timeout: options.Timeout = options.TIMEOUT_SECONDS,
    form: options.Output = TABLE,
) -> None:
    """Release the allocation of a job whose host is gone for good, on your word (--force, with --cause).

    If the job does run still, its CPUs and memory are used twice.
    """
    from leasehold.api.job.v1 import job_service_pb2 as wire
    from leasehold.cli import connection
    from leasehold.rpc import job_documents

    if not force:
        raise errors.InvalidArgument(
            "--force: is missing; a job that can be reached is ended by `leasehold job cancel`", field="--force"
        )
    if not cause.strip():
        raise errors.InvalidArgument(
            "--cause: say how it is known that nothing of it runs any more", field="--cause"
        )
    with connection.connect(addr, timeout) as allocator:
        number = attempt or _get(allocator, job)["attempt"]
        request = wire.ForceReleaseAllocationRequest(job_id=_checked(job), attempt=number, cause=cause)
        document = job_documents.job(allocator.call("ForceReleaseAllocation", request).job)
    _show_job(document, form, f"job {job} attempt {number} is released; it is {document['state']}")


@app.command(name="acknowledge-silence")
def acknowledge_silence(
    cause: Annotated[str, typer.Option("--cause", help="How that is known; it is kept in the audit")] = "",
    addr: options.Addr = None,
    timeout: options.Timeout = options.TIMEOUT_SECONDS,
    form: options.Output = TABLE,
) -> None:
    """Give up what holders have who fell silent together, on your word that they are dead (with --cause).

    When most fall silent at once, the allocator takes it for its own network and gives nothing up; `leasehold
    node utilization` says so. If they do work still, their CPUs and memory are used twice.
    """
    from leasehold.api.job.v1 import job_service_pb2 as wire
    from leasehold.cli import connection
    from leasehold.rpc import job_documents

    if not cause.strip():
        raise errors.InvalidArgument("--cause: say how it is known that the silence is real", field="--cause")
    with connection.connect(addr, timeout) as allocator:
        answer = allocator.call("AcknowledgeSilence", wire.AcknowledgeSilenceRequest(cause=cause))
    document = job_documents.acknowledged(answer)
    if form is NAME:
        output.lines([str(document["given_up"])])
    elif form is not TABLE:
        output.data(document, form)
    elif document["was_held_back"]:
        output.lines([f"acknowledged: {document['given_up']} allocations are given up"])
    else:
        output.lines(["no reclaims were held back"])
