"""`leasehold`: the entry point, and what its exit codes mean.

0   done
1   refused or failed: the message says what to mend
2   the command line itself is wrong
3   no allocator could be reached, or none leads now: trying again may help
130 interrupted
"""

import os
import sys
from typing import Annotated

import typer
from leasehold.cli import budget, output
from leasehold.core import errors

EXIT_FAILED = 1
EXIT_UNREACHABLE = 3
EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="leasehold",
    help="Lease API budgets, hosts and model servers to ML workers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Exit codes: 0 done, 1 failed, 2 wrong command line, 3 no allocator reached, 130 interrupted.",
)
app.add_typer(budget.app, name="budget", help="Define, read and rehearse budgets.")


@app.command()
def version(
    form: Annotated[output.Format, typer.Option("-o", "--output", help="table or json")] = output.Format.TABLE,
) -> None:
    """Print the version."""
    import importlib.metadata

    found = importlib.metadata.version("leasehold")
    if form is output.Format.TABLE:
        print(f"leasehold {found}")
    else:
        output.data({"version": found, "python": sys.version.split()[0]}, form)


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
    add_help_option=False,
)
def allocator(context: typer.Context) -> None:
    """Run an allocator; `leasehold allocator --help` lists its settings."""
    # A process of its own kind: it replaces this one, without the command line's imports.
    os.execv(sys.executable, [sys.executable, "-m", "leasehold.allocator", *context.args])  # noqa: S606


@app.command()
def up(
    data_dir: Annotated[str | None, typer.Option(help="Folder that keeps everything")] = None,
    port: Annotated[int, typer.Option(help="Port of the first allocator's gRPC API")] = 7400,
    etcd_port: Annotated[int, typer.Option(help="Port of etcd's clients")] = 7479,
    etcd_peer_port: Annotated[int, typer.Option(help="Port of etcd's peers")] = 7480,
    postgres_port: Annotated[int, typer.Option(help="Port of Postgres")] = 7432,
    allocators: Annotated[int, typer.Option(help="Replicas, on following ports", min=1, max=9)] = 1,
    budgets: Annotated[str | None, typer.Option(help="YAML file of budgets, followed while it changes")] = None,
) -> None:
    """Start etcd, Postgres and an allocator on this machine, until Ctrl-C. Not for production."""
    from leasehold.cli import up as ups

    ups.up(
        ups.folder(data_dir),
        ports=ups.Ports(port, etcd_port, etcd_peer_port, postgres_port),
        replicas=allocators,
        budgets_file=budgets,
    )


@app.command()
def down(
    data_dir: Annotated[str | None, typer.Option(help="Folder that was given to `leasehold up`")] = None,
) -> None:
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
        output.say(f"leasehold: {error.message}")
        if not isinstance(error, errors.NotLeader):
            output.say("leasehold: is an allocator running? --addr or LEASEHOLD_ADDR tells where")
        return EXIT_UNREACHABLE
    except errors.LeaseholdError as error:
        output.say(f"leasehold: {error.message}")
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader has enough (`leasehold ... | head`).
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return 0
    return 0
