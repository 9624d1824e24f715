"""What is looked at before a pool's first worker: each failure comes with advice.

Files and rights, then the broker, the database, and the template's own checks (a lint of the application). A
pool that fails is not started, status tells why, and the checks are repeated until they pass.
"""

import asyncio
import os
import pathlib
import re
import shutil
import struct
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from leasehold.core import errors
from leasehold.nodeagent import broker_check, templates
from leasehold.observe import redaction

CONNECT_SECONDS: Final = 3.0
_OUTPUT_BYTES_MAX: Final = 16_384
_SHOWN_MAX: Final = 400
_POSTGRES: Final = ("postgresql", "postgres")
_PORTS: Final = {"postgresql": 5432, "postgres": 5432, "mysql": 3306, "mariadb": 3306, "mongodb": 27017}
_KEYWORD: Final = re.compile(r"(\w+)\s*=\s*('(?:[^'\\]|\\.)*'|\S+)")
#: SSLRequest: every Postgres answers it with one letter, before any login.
_SSL_REQUEST: Final = struct.pack("!ii", 8, 80877103)


@dataclass(frozen=True, slots=True)
class Failure:
    """What is wrong, and what to do about it."""

    problem: str
    advice: str

    def __str__(self) -> str:
        return f"{self.problem}; {self.advice}" if self.advice else self.problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A pool as the checks see it."""

    argv: Sequence[str]
    env: Mapping[str, str]
    cwd: pathlib.Path
    logs: pathlib.Path
    #: With their places filled in.
    checks: Sequence[templates.Check]


@dataclass(frozen=True, slots=True)
class Outcome:
    """`failures` keep the pool from starting; `warnings` do not."""

    failures: tuple[Failure, ...] = ()
    warnings: tuple[Failure, ...] = ()


async def check(subject: Subject) -> Outcome:
    """Look at everything. Raises nothing but cancellation."""
    failures = _rights(subject)
    warnings: list[Failure] = []
    if failures:
        # Nothing else can be told apart from these.
        return Outcome(tuple(failures))
    for each in subject.checks:
        found = await _one(each, subject)
        if found is not None:
            (warnings if each.is_warning else failures).append(found)
    return Outcome(tuple(failures), tuple(warnings))


async def _one(each: templates.Check, subject: Subject) -> Failure | None:
    if each.kind == "broker":
        broker = await broker_check.check(
            subject.env.get(each.url_variable), url_variable=each.url_variable, timeout_seconds=CONNECT_SECONDS
        )
        return None if broker is None else Failure(broker.problem, broker.advice)
    if each.kind == "database":
        url = subject.env.get(each.url_variable)
        return await check_database(url, each.url_variable) if url else None
    return await _command(each, subject)


def _rights(subject: Subject) -> list[Failure]:
    found: list[Failure] = []
    if not subject.cwd.is_dir():
        found.append(Failure(f"the folder {subject.cwd} does not exist", "make it, or correct `directory`"))
    elif not os.access(subject.cwd, os.R_OK | os.X_OK):
        found.append(Failure(f"the folder {subject.cwd} cannot be entered", "give the agent's user the right"))
    program = subject.argv[0]
    path = subject.env.get("PATH", os.defpath)
    if "/" in program:
        place = pathlib.Path(subject.cwd, program)
        if not place.exists():
            found.append(Failure(f"{program} does not exist", "install it, or correct the pool's parameters"))
        elif not os.access(place, os.X_OK) or place.is_dir():
            found.append(Failure(f"{program} cannot be executed by this user", f"chmod +x {program}"))
    elif shutil.which(program, path=path) is None:
        found.append(Failure(f"{program} is not found in PATH, {path}", "install it, or name its whole path"))
    if not os.access(subject.logs, os.W_OK | os.X_OK):
        found.append(
            Failure(f"logs cannot be written to {subject.logs}", "give the folder to the agent's user")
        )
    return found


async def _command(each: templates.Check, subject: Subject) -> Failure | None:
    """Run a check of its own; exit code 0 is well."""
    shown = " ".join(each.argv[-2:])
    try:
        process = await asyncio.create_subprocess_exec(
            *each.argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=dict(subject.env),
            cwd=subject.cwd,
            start_new_session=True,
        )
    except OSError as error:
        return Failure(f"{shown}: {error.strerror}", each.advice)
    try:
        async with asyncio.timeout(each.timeout_seconds):
            assert process.stdout is not None
            output = await process.stdout.read(_OUTPUT_BYTES_MAX)
            while await process.stdout.read(_OUTPUT_BYTES_MAX):
                pass  # what is too much is passed over, so that it can end
            code = await process.wait()
    except TimeoutError:
        return Failure(f"{shown}: no end within {each.timeout_seconds:g} s", each.advice)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if code == 0:
        return None
    said = " ".join(redaction.redact_text(output.decode(errors="replace")).split())
    if len(said) > _SHOWN_MAX:
        said = said[: _SHOWN_MAX // 2] + " … " + said[-_SHOWN_MAX // 2 :]
    return Failure(f"{shown}: exit code {code}: {said}" if said else f"{shown}: exit code {code}", each.advice)


async def check_database(url: str, variable: str) -> Failure | None:
    """Whether a database answers where a URL or a libpq connection string says. No login is tried."""
    try:
        scheme, host, port, path = _place(url)
    except ValueError:
        return Failure(
            f"{variable} is not the address of a database", f"correct {variable}, as postgresql://host/name"
        )
    if scheme == "sqlite":
        return _sqlite(path, variable)
    if not host:
        return None
    where = path or f"{host}:{port}"
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            if path:
                reader, writer = await asyncio.open_unix_connection(path)
            else:
                reader, writer = await asyncio.open_connection(host, port)
            try:
                if scheme in _POSTGRES:
                    writer.write(_SSL_REQUEST)
                    answer = await reader.read(1)
                    if answer not in (b"S", b"N"):
                        return Failure(f"what listens at {where} is no Postgres", f"correct {variable}")
            finally:
                writer.close()
    except TimeoutError:
        return Failure(
            f"the database at {where} did not answer within {CONNECT_SECONDS:g} s",
            "look at the firewall, and at its load",
        )
    except ConnectionRefusedError:
        return Failure(f"no database listens at {where}", f"start it, or correct host and port in {variable}")
    except OSError as error:
        return Failure(f"the database at {where}: {error.strerror or error}", f"correct {variable}")
    return None


def _place(url: str) -> tuple[str, str, int, str]:
    """Scheme, host, port, and the path of a Unix socket (or of SQLite's file). Raises `ValueError`."""
    if "://" not in url:
        parts = {key: value.strip("'") for key, value in _KEYWORD.findall(url)}
        if not parts:
            raise ValueError
        host, port = parts.get("hostaddr") or parts.get("host", "localhost"), int(parts.get("port", 5432))
        return "postgresql", host, port, f"{host}/.s.PGSQL.{port}" if host.startswith("/") else ""
    split = urllib.parse.urlsplit(url)
    # SQLAlchemy names a driver, Celery a kind of backend: db+postgresql+psycopg://
    scheme = next((part for part in split.scheme.split("+") if part in (*_PORTS, "sqlite")), "")
    if scheme == "sqlite":
        return scheme, "", 0, urllib.parse.unquote(split.path.removeprefix("/"))
    if not scheme:
        raise ValueError
    query = dict(urllib.parse.parse_qsl(split.query))
    host, port = query.get("host") or split.hostname or "localhost", split.port or _PORTS[scheme]
    return scheme, host, port, f"{host}/.s.PGSQL.{port}" if host.startswith("/") else ""


def _sqlite(path: str, variable: str) -> Failure | None:
    if not path or path == ":memory:":
        return None
    folder = pathlib.Path(path).absolute().parent
    if os.access(folder, os.W_OK | os.X_OK):
        return None
    return Failure(f"the database's folder {folder} cannot be written", f"correct {variable}, or its mode")


def told(outcome: Outcome) -> str:
    """The failures, in one line."""
    return "; ".join(str(failure) for failure in outcome.failures)


def worker_environment(base: Mapping[str, str], passed: Sequence[str]) -> dict[str, str]:
    """`base` with each NAME of `passed` taken from the file that NAME_FILE names, where NAME is not set.

    Raises `InvalidArgument` naming the variable if its file cannot be read.
    """
    env = dict(base)
    for name in passed:
        file = env.get(f"{name}_FILE")
        if name in env or not file:
            continue
        try:
            env[name] = pathlib.Path(file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise errors.InvalidArgument(f"{name}_FILE: {file}: {error}", field=f"{name}_FILE") from error
    return env
