import asyncio
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from leasehold.core import errors
from leasehold.nodeagent import preflight, templates


def subject(
    folder: Path, *argv: str, checks: tuple[templates.Check, ...] = (), **env: str
) -> preflight.Subject:
    return preflight.Subject(
        argv=argv or ("sh",),
        env={"PATH": "/usr/bin:/bin", **env},
        cwd=folder,
        logs=folder,
        checks=checks,
    )


def command(*argv: str, is_warning: bool = False, timeout_seconds: float = 20.0) -> templates.Check:
    return templates.Check(
        kind="command", argv=argv, is_warning=is_warning, timeout_seconds=timeout_seconds, advice="mend it"
    )


async def test_what_is_well_has_no_failure(tmp_path: Path) -> None:
    assert await preflight.check(subject(tmp_path, "sh")) == preflight.Outcome()


@pytest.mark.parametrize(
    ("program", "told"),
    [
        ("no-such-program", "no-such-program is not found in PATH"),
        ("/no/such/program", "/no/such/program does not exist"),
        ("./plain", "./plain cannot be executed by this user; chmod +x ./plain"),
        ("./folder", "./folder cannot be executed"),
    ],
)
async def test_a_program_that_cannot_be_run_is_told_with_advice(
    tmp_path: Path, program: str, told: str
) -> None:
    (tmp_path / "plain").write_text("")
    (tmp_path / "folder").mkdir()

    outcome = await preflight.check(subject(tmp_path, program))

    assert preflight.told(outcome).startswith(told)


async def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    outcome = await preflight.check(subject(tmp_path / "gone"))

    assert f"the folder {tmp_path}/gone does not exist; make it" in preflight.told(outcome)


async def test_a_check_of_its_own_fails_by_its_exit_code_and_tells_what_it_said(tmp_path: Path) -> None:
    program = str(tmp_path / "lint.py")
    Path(program).write_text(  # noqa: ASYNC240
        "import sys; print('task_acks_late is off'); print('broker redis://u:hidden@h'); sys.exit(3)"
    )
    check = command(sys.executable, program, "app")

    failed = await preflight.check(subject(tmp_path, checks=(check,)))
    warned = await preflight.check(
        subject(tmp_path, checks=(command(sys.executable, program, is_warning=True),))
    )

    assert f"{program} app: exit code 3: task_acks_late is off" in preflight.told(failed)
    assert preflight.told(failed).endswith("; mend it")
    assert "hidden" not in preflight.told(failed)
    assert (warned.failures, len(warned.warnings)) == ((), 1)


async def test_a_check_that_hangs_is_ended(tmp_path: Path) -> None:
    check = command("/bin/sleep", "60", timeout_seconds=0.2)

    outcome = await preflight.check(subject(tmp_path, checks=(check,)))

    assert "no end within 0.2 s" in preflight.told(outcome)


async def test_a_check_that_says_much_is_heard_to_its_end(tmp_path: Path) -> None:
    check = command(sys.executable, "-c", "print('x' * 1_000_000)")

    assert (await preflight.check(subject(tmp_path, checks=(check,)))).failures == ()


async def test_a_broker_that_is_not_set_is_told(tmp_path: Path) -> None:
    check = templates.Check(kind="broker", url_variable="CELERY_BROKER_URL")

    outcome = await preflight.check(subject(tmp_path, checks=(check,)))

    assert preflight.told(outcome).startswith("CELERY_BROKER_URL is not set; set CELERY_BROKER_URL")


@asynccontextmanager
async def listening(answer: bytes) -> AsyncIterator[int]:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(8)
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def test_a_database_is_known_by_its_answer() -> None:
    async with listening(b"N") as port:
        assert await preflight.check_database(f"postgresql://u:p@127.0.0.1:{port}/db", "DATABASE_URL") is None
        assert await preflight.check_database(f"host=127.0.0.1 port={port} dbname=x", "DATABASE_URL") is None
    async with listening(b"HTTP/1.1 400 Bad Request") as port:
        failure = await preflight.check_database(f"postgresql+psycopg://127.0.0.1:{port}/db", "DATABASE_URL")
        assert failure == preflight.Failure(
            f"what listens at 127.0.0.1:{port} is no Postgres", "correct DATABASE_URL"
        )


async def test_a_database_that_is_away_is_told_without_its_password(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    check = templates.Check(kind="database", url_variable="DATABASE_URL")
    url = f"db+postgresql://user:hidden@127.0.0.1:{port}/db"

    outcome = await preflight.check(subject(tmp_path, checks=(check,), DATABASE_URL=url))
    unset = await preflight.check(subject(tmp_path, checks=(check,)))

    assert preflight.told(outcome) == (
        f"no database listens at 127.0.0.1:{port}; start it, or correct host and port in DATABASE_URL"
    )
    assert unset == preflight.Outcome()


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("nonsense", "X is not the address of a database"),
        ("ftp://h/x", "X is not the address of a database"),
        ("postgresql://h:port/x", "X is not the address of a database"),
        ("sqlite:////nowhere/at/all.db", "the database's folder /nowhere/at cannot be written"),
        ("sqlite://", None),
        ("postgresql:///db?host=/nowhere", "the database at /nowhere/.s.PGSQL.5432: No such file"),
    ],
)
async def test_addresses_of_databases_are_read_as_their_users_do(url: str, told: str | None) -> None:
    failure = await preflight.check_database(url, "X")

    assert failure is None if told is None else str(failure).startswith(told)


def test_a_secret_may_be_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "url"
    file.write_text("redis://:s@h/0\n")

    env = preflight.worker_environment({"URL_FILE": str(file), "A": "1", "A_FILE": "/gone"}, ["URL", "A", "B"])

    assert (env["URL"], env["A"], "B" in env) == ("redis://:s@h/0", "1", False)
    with pytest.raises(errors.InvalidArgument, match="URL_FILE: /gone"):
        preflight.worker_environment({"URL_FILE": "/gone"}, ["URL"])
