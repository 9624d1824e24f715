"""The ledger of the demo's pool: a process of its own that owns a file, and writes down what tasks tell it.

``python -m leasehold.demo.pool_ledger serve --socket PATH --log FILE`` serves a Unix socket: a line of JSON
in, ``ok`` out once the line is with the operating system. To each it adds the PID of its writer, as the
kernel knows it, so a ledger shows if anybody wrote who has no business there. ``... audit FILE`` prints the
verdict of `leasehold.demo.pool_audit`; exit code 1 if it is bad.
"""

import argparse
import asyncio
import json
import pathlib
import socket
import struct
import sys
from collections.abc import Sequence
from typing import Any, Final

from leasehold.demo import children, journal, pool_audit

ANSWER_SECONDS: Final = 10.0
_LINE_BYTES_MAX: Final = 65_536
_EVENTS: Final = ("submitted", "started", "completed")
#: struct ucred: PID, user, group.
_CREDENTIALS: Final = struct.Struct("3i")


def write(socket_path: str, event: str, key: str, **fields: Any) -> None:
    """Write one event, and return when it is in the ledger. Raises `OSError` if it may not be."""
    line = json.dumps({"event": event, "key": key, **fields}).encode() + b"\n"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(ANSWER_SECONDS)
        connection.connect(socket_path)
        connection.sendall(line)
        if connection.makefile("rb").readline() != b"ok\n":
            raise ConnectionError(f"the ledger did not take {event} {key}")


class Ledger:
    """Takes events from whoever connects."""

    def __init__(self, log: journal.Journal) -> None:
        self._log = log

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Everything that one connection says."""
        try:
            connection = writer.get_extra_info("socket")
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            pid, _, _ = _CREDENTIALS.unpack(credentials)
            while line := await reader.readline():
                writer.write(b"ok\n" if self._is_written(line, pid) else b"refused\n")
                await writer.drain()
        except (OSError, ValueError):
            pass  # a writer that was killed in the middle of a line has written nothing
        finally:
            writer.close()

    def _is_written(self, line: bytes, pid: int) -> bool:
        if not line.endswith(b"\n"):
            return False
        try:
            fields = json.loads(line)
            event, key = fields.pop("event"), fields.pop("key")
        except (ValueError, TypeError, KeyError, AttributeError):
            return False
        if event not in _EVENTS or not isinstance(key, str) or fields.keys() & {"pid", "mono_ns"}:
            return False
        self._log.write(event, key=key, pid=pid, **fields)
        return True


async def _serve(options: argparse.Namespace) -> None:
    with journal.Journal(options.log) as log:
        server = await asyncio.start_unix_server(Ledger(log).take, options.socket, limit=_LINE_BYTES_MAX)
        stop = children.stop_event(options.lifeline_fd)
        sys.stdout.write(f"{options.socket}\n")
        sys.stdout.flush()
        await stop.wait()
        server.close()


def _audit(options: argparse.Namespace) -> int:
    verdict = pool_audit.judge(journal.read(options.log), forbidden_pids=options.agent_pid)
    sys.stdout.writelines(f"{line}\n" for line in verdict.lines())
    return 0 if verdict.is_good else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m leasehold.demo.pool_ledger", description="Keep a ledger.")
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="take events until SIGTERM, SIGINT or the end of the lifeline")
    serve.add_argument("--socket", required=True)
    serve.add_argument("--log", type=pathlib.Path, required=True)
    serve.add_argument("--lifeline-fd", type=int)
    audit = commands.add_parser("audit", help="print the verdict on a ledger")
    audit.add_argument("log", type=pathlib.Path)
    audit.add_argument("--agent-pid", type=int, action="append", default=[], help="who must not have written")
    options = parser.parse_args(arguments)
    if options.command == "audit":
        return _audit(options)
    try:
        asyncio.run(_serve(options))
    except OSError as error:
        sys.stderr.write(f"cannot serve: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
