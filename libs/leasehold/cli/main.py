"""`leasehold`: the entry point, and what its exit codes mean.

0   done
1   refused or failed: the message says what to mend
2   the command line itself is wrong; of `job submit` and `job wait` also: the job was never placed on a node
3   no allocator could be reached, none leads now, or a part of it is away: trying again may help
130 interrupted
"""

import os
import sys
from typing import Annotated

import typer
from leasehold.cli import budget, doctor, job, node, output, workers
from leasehold.core import errors

EXIT_FAILED = 1
EXIT_UNREACHABLE = 3
EXIT_INTERRUPTED = 130

EXIT_CODES = (
    "Exit codes: 0 done; 1 refused or failed, the message says why; 2 wrong command line; "
    "3 no allocator reached, trying again may help; 130 interrupted."
)

app = typer.Typer(
    name="leasehold",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog=EXIT_CODES,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(budget.app, name="budget", help="Define, read and rehearse budgets.", epilog=EXIT_CODES)
app.add_typer(job.app, name="job", help="Jobs: submit, list, explain, cancel, logs.", epilog=job.EXIT_CODES)
app.add_typer(node.app, name="node", help="Hosts: what they have, and why.", epilog=EXIT_CODES)
app.add_typer(
    workers.app, name="workers", help="Worker processes: list, scale, start, stop, logs.", epilog=EXIT_CODES
)

app.command(epilog=EXIT_CODES)(doctor.doctor)

DataDir = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER", help="Keeps everything; else ~/.local/state/leasehold/up (see XDG_STATE_HOME)"
    ),
]


def _show_version(is_asked: bool) -> None:
    if is_asked:
        version()
        raise typer.Exit


@app.callback()
def root(
    is_version_asked: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version and exit."),
    ] = False,
) -> None:
    """Lease API budgets, hosts and model servers to ML workers."""


@app.command()
def version(
    form: Annotated[output.Format, typer.Option("-o", "--output", help="For people, or for programs")] = (
        output.Format.TABLE
    ),
) -> None:
    """Print the version."""
    import importlib.metadata

    found = importlib.metadata.version("leasehold")
    if form is output.Format.TABLE:
        output.lines([f"leasehold {found}"])
    elif form is output.Format.NAME:
        output.lines([found])
    else:
        output.data({"version": found, "python": sys.version.split()[0]}, form)


def _process(help_text: str, module: str) -> None:
    """A command that is a process of its own kind: it replaces this one, without the command line's imports."""
    name = module.rpartition(".")[2].removeprefix("node")

    @app.command(
        name,
        help=help_text,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
        add_help_option=False,
    )
    def run_process(context: typer.Context) -> None:
        os.execv(sys.executable, [sys.executable, "-m", module, *context.args])  # noqa: S606


_process("Run an allocator; --help lists its settings.", "leasehold.allocator")
_process(
    "Run this host's agent; --status and --stop ask the one that runs. --help lists its settings.",
    "leasehold.nodeagent",
)
_process("Serve the REST API and the metrics over HTTP; --help lists its settings.", "leasehold.gateway")


@app.command()
def up(
    data_dir: DataDir = None,
    port: Annotated[int, typer.Option(help="Port of the first allocator's gRPC API", min=1, max=65535)] = 7400,
    etcd_port: Annotated[int, typer.Option(help="Port of etcd's clients", min=1, max=65535)] = 7479,
    etcd_peer_port: Annotated[int, typer.Option(help="Port of etcd's peers", min=1, max=65535)] = 7480,
    postgres_port: Annotated[int, typer.Option(help="Port of Postgres", min=1, max=65535)] = 7432,
    allocators: Annotated[int, typer.Option(help="Replicas, on following ports", min=1, max=9)] = 1,
    budgets: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            envvar="LEASEHOLD_BUDGETS_FILE",
            help="YAML file of budgets, followed while it changes",
        ),
    ] = None,
    http_port: Annotated[int, typer.Option(help="Port of the gateway", min=1, max=65535)] = 8000,
    has_gateway: Annotated[bool, typer.Option("--gateway/--no-gateway", help="Serve HTTP, too")] = True,
    agent_config: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            envvar="LEASEHOLD_AGENT_CONFIG",
            help="YAML file of this host's worker pools, followed while it changes; else a tiny example",
        ),
    ] = None,
    has_agent: Annotated[bool, typer.Option("--agent/--no-agent", help="Run an agent, too")] = True,
) -> None:
    """Start etcd, Postgres, an allocator, the gateway and an agent, until Ctrl-C.

    All on this machine and on loopback; not for production. The agent's workers end with it, their tasks given
    back where their template can. Your own servers are used instead where
    LEASEHOLD_ETCD_ENDPOINTS (host:port,host:port) or LEASEHOLD_POSTGRES_DSN (a connection string) is set. A
    new folder gets an example budget, llm-api, for WORKER_COUNT workers, else 4.
    """
    from leasehold.cli import up as ups
    from leasehold.cli import up_parts

    try:
        wanted = up_parts.Wanted(
            http_port=http_port if has_gateway else None,
            agent_config=up_parts.agent_config(agent_config) if has_agent else None,
        )
        ups.up(
            ups.folder(data_dir),
            ports=ups.Ports(port, etcd_port, etcd_peer_port, postgres_port),
            replicas=allocators,
            budgets_file=budgets,
            wanted=wanted,
        )
    except errors.Unavailable as error:  # a part did not come up: that is no allocator out of reach
        output.fail(error)
        raise typer.Exit(EXIT_FAILED) from None


@app.command()
def down(data_dir: DataDir = None) -> None:
    """Stop a running `leasehold up`, or end what a killed one left."""
    from leasehold.cli import up as ups

    ups.down(ups.folder(data_dir))


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit with its code."""
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    """Run a command; its exit code."""
    try:
        app(args=arguments, prog_name="leasehold")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else EXIT_FAILED
    except errors.Unavailable as error:
        is_unreached = type(error) is errors.Unavailable
        output.fail(error, "; is one running? --addr or LEASEHOLD_ADDR tells where" if is_unreached else "")
        return EXIT_UNREACHABLE
    except errors.LeaseholdError as error:
        output.fail(error)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return 0
