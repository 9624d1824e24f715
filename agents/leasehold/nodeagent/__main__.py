"""`python -m leasehold.nodeagent`: the same as `leasehold agent`, without the command line's imports."""

import argparse
import asyncio
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import TextIO

# Before gRPC is loaded: its handlers for forks are of no use here, since the agent never forks itself.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

from leasehold.core import errors
from leasehold.core.node import settings
from leasehold.nodeagent import names

_EXIT_FAILED = 1
_EXIT_UNREACHABLE = 3

_SHUT_DOWN = ("drain", "immediate", "leave")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="leasehold agent",
        description="Run the agent of this host: worker pools sized by memory. A setting is taken from the "
        "preset, then the YAML file, .env, .env.$ENV, the environment, and flags, the later one winning. "
        "SIGTERM drains, SIGINT stops at once and gives tasks back, SIGUSR1 ends the agent and leaves its "
        "workers to the next one, SIGHUP reads the configuration again.",
    )
    for name, (flag, told) in names.AGENT.items():
        parser.add_argument(f"--{flag}", dest=name, metavar="VALUE", help=f"{told} ({name})")
    sizing = parser.add_argument_group("sizing", "for all pools that say nothing else of themselves")
    for name in settings.NAMES:
        sizing.add_argument(f"--{name.lower().replace('_', '-')}", dest=name, metavar="VALUE", help=name)
    what = parser.add_argument_group("instead of running an agent").add_mutually_exclusive_group()
    what.add_argument("--status", action="store_true", help="tell the status of this host's agent")
    what.add_argument(
        "--stop",
        nargs="?",
        const="drain",
        choices=_SHUT_DOWN,
        help="end this host's agent as by SIGTERM (drain), SIGINT (immediate) or SIGUSR1 (leave)",
    )
    what.add_argument(
        "--end-leftovers", metavar="STATE_DIR", help="end every worker that an agent left in this state folder"
    )
    parser.add_argument("--json", action="store_true", help="with --status: for programs")
    parser.add_argument(
        "--ephemeral",
        action="store_true",
        help="SIGTERM stops at once, as SIGINT does: nothing is to outlive it",
    )
    return parser


def run(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 refused (one line tells why), 3 no agent answers."""
    chosen = vars(_parser().parse_args(arguments))
    flags = {name: chosen[name] for name in (*names.AGENT, *settings.NAMES)}
    try:
        if chosen["status"]:
            _status(flags, is_json=chosen["json"])
        elif chosen["stop"]:
            _stop(flags, chosen["stop"])
        elif chosen["end_leftovers"]:
            _end_leftovers(flags, chosen["end_leftovers"])
        else:
            from leasehold.nodeagent import main

            main.run(flags, is_ephemeral=chosen["ephemeral"])
    except errors.Unavailable as error:
        _say(f"leasehold agent: {error.message}", sys.stderr)
        return _EXIT_UNREACHABLE
    except errors.LeaseholdError as error:
        _say(f"leasehold agent: {error.message}", sys.stderr)
        return _EXIT_FAILED
    return 0


def _status(flags: dict[str, str | None], *, is_json: bool) -> None:
    from leasehold.nodeagent import local

    answer = local.status(_socket(flags))
    if is_json:
        from google.protobuf import json_format

        _say(json_format.MessageToJson(answer, preserving_proto_field_name=True))
    else:
        _say("\n".join(local.lines(answer)))


def _stop(flags: dict[str, str | None], how: str) -> None:
    from leasehold.api.node.v1 import agent_service_pb2 as wire
    from leasehold.nodeagent import local

    mode = {
        "drain": wire.SHUT_DOWN_MODE_DRAIN,
        "immediate": wire.SHUT_DOWN_MODE_IMMEDIATE,
        "leave": wire.SHUT_DOWN_MODE_LEAVE_WORKERS,
    }[how]
    seconds = local.stop(_socket(flags), mode)
    _say(f"the agent has ended, {seconds:.1f} s")


def _socket(flags: dict[str, str | None]) -> pathlib.Path:
    from leasehold.nodeagent import config
    from leasehold.runtime import agent_paths

    if flags["LEASEHOLD_SOCKET"] or flags["LEASEHOLD_STATE_DIR"]:
        return agent_paths.socket_path(flags["LEASEHOLD_SOCKET"], flags["LEASEHOLD_STATE_DIR"])
    return config.load(flags).socket


def _end_leftovers(flags: dict[str, str | None], state_dir: str) -> None:
    from leasehold.nodeagent import config, leftovers
    from leasehold.observe import logs

    logs.configure("auto", "warning", service="agent")
    flags = {**flags, "LEASEHOLD_STATE_DIR": state_dir, "LEASEHOLD_AGENT_CONFIG": None}
    ended = asyncio.run(leftovers.end(config.without_pools(flags)))
    _say(f"ended {len(ended)} workers: {', '.join(ended)}" if ended else "there was nothing to end")


def _say(text: str, stream: TextIO | None = None) -> None:
    print(text, file=stream or sys.stdout)


if __name__ == "__main__":
    sys.exit(run())
