"""`python -m leasehold.gateway`: the same as `leasehold gateway`, without the command line's imports."""

import argparse
import sys

from leasehold.core import errors
from leasehold.gateway import config, main


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="leasehold gateway",
        description="Serve the REST API, its document and the metrics over HTTP. A flag stands above its "
        "environment variable, which its help names. TLS towards the allocators: "
        "LEASEHOLD_TLS_CERTIFICATE_FILE, _KEY_FILE and _CA_FILE.",
    )
    for name, field in config.Settings.model_fields.items():
        shown = f"{field.description}; {config.PREFIX}{name.upper()}"
        if field.default not in (None, ""):
            shown += f" (default: {field.default})"
        parser.add_argument(config.flag(name), dest=name, default=None, metavar="VALUE", help=shown)
    return parser


def run() -> int:
    """Exit code: 0 after a drain, 1 with one line on standard error if something must be mended."""
    try:
        main.run(vars(_parser().parse_args()))
    except errors.LeaseholdError as error:
        print(f"leasehold gateway: {error.message}", file=sys.stderr)  # noqa: T201 - a command's own voice
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run())
