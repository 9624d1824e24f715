"""`leasehold doctor`: are the books right, now?"""

import typer
from leasehold.cli import options, output

EXIT_FAILED = 1
TIMEOUT_SECONDS = 35.0

TABLE, NAME = output.Format.TABLE, output.Format.NAME


def doctor(
    addr: options.Addr = None, timeout: options.Timeout = TIMEOUT_SECONDS, form: options.Output = TABLE
) -> None:
    """Audit the allocations of jobs, and print what differs. Exit 1 if anything is wrong for certain.

    Ledger, counters and totals are compared in one snapshot of Postgres, what runs with the agents' word.
    DEFINITE: wrong; IN_FLIGHT: may be a change on its way; UNKNOWN: cannot be told now, look again.
    """
    from leasehold.api.job.v1 import job_service_pb2 as wire
    from leasehold.cli import connection, job_tables
    from leasehold.rpc import job_documents

    with connection.connect(addr, timeout) as allocator:
        document = job_documents.audit(allocator.call("AuditAllocations", wire.AuditAllocationsRequest()))
    if form is NAME:
        output.lines([each["subject"] for each in document["findings"]])
    elif form is not TABLE:
        output.data(document, form)
    else:
        job_tables.audit(document)
    if any(each["verdict"] == "DEFINITE" for each in document["findings"]):
        raise typer.Exit(EXIT_FAILED)
