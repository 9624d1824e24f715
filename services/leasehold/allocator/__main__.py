"""`python -m leasehold.allocator`: the same as `leasehold allocator`, without the command line's imports."""

import argparse
import sys

from leasehold.allocator import config, main
from leasehold.core import errors


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="leasehold allocator",
        description="Run one replica of the allocator. A flag stands above its environment variable, "
        "LEASEHOLD_ and its name in capitals; LEASEHOLD_POSTGRES_DSN or --postgres-dsn-file tells of Postgres.",
    )
    for name, field in config.Settings.model_fields.items():
        if name == "postgres_dsn":
            # It carries a password, and argv is for everyone to read.
            continue
        flag = f"--{name.replace('_', '-')}"
        shown = field.description or ""
        if field.annotation is bool:
            parser.add_argument(flag, dest=name, action="store_const", const=True, default=None, help=shown)
            continue
        if field.default not in (None, ""):
            shown += f" (default: {field.default})"
        parser.add_argument(flag, dest=name, default=None, metavar="VALUE", help=shown)
    return parser


def run() -> int:
    """Exit code: 0 after a drain, 1 with one line on standard error if something must be mended."""
    try:
        main.run(vars(_parser().parse_args()))
    except errors.LeaseholdError as error:
        print(f"leasehold allocator: {error.message}", file=sys.stderr)  # noqa: T201 - a command's own voice
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run())
