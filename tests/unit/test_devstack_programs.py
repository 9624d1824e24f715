"""Finding the programs: which etcd is fit, where fetched ones are kept, which PostgreSQL matches the data."""

import threading
from pathlib import Path

import pytest
from leasehold.core import errors
from leasehold.devstack import cache, etcd_binary, postgres, postgres_binary


def make_etcd(folder: Path, version: str) -> Path:
    """A program that says it is etcd of this version."""
    folder.mkdir(parents=True)
    path = folder / "etcd"
    path.write_text(f"#!/bin/sh\necho 'etcd Version: {version}'\necho 'Git SHA: none'\n")
    path.chmod(0o755)
    return path


def find(environ: dict[str, str]) -> tuple[Path, list[str]]:
    said: list[str] = []
    return etcd_binary.find(announce=said.append, cancel=threading.Event(), environ=environ), said


def test_etcd_bin_goes_before_path(tmp_path: Path) -> None:
    chosen = make_etcd(tmp_path / "chosen", "3.5.30")
    on_path = make_etcd(tmp_path / "path", "3.5.21")

    assert find({"ETCD_BIN": str(chosen), "PATH": str(on_path.parent)}) == (chosen, [])


def test_an_unfit_etcd_bin_is_an_error_and_nothing_else_is_taken(tmp_path: Path) -> None:
    chosen = make_etcd(tmp_path / "chosen", "3.5.3")
    on_path = make_etcd(tmp_path / "path", "3.5.21")

    with pytest.raises(errors.FailedPrecondition, match=r"ETCD_BIN=.*3\.5\.3 can lose acknowledged writes"):
        find({"ETCD_BIN": str(chosen), "PATH": str(on_path.parent)})


@pytest.mark.parametrize("script", ["#!/bin/sh\necho hello\n", "#!/bin/sh\nexit 3\n", None])
def test_an_etcd_bin_that_is_no_etcd_is_an_error(tmp_path: Path, script: str | None) -> None:
    program = tmp_path / "etcd"
    if script is not None:
        program.write_text(script)
        program.chmod(0o755)

    with pytest.raises(errors.FailedPrecondition, match="ETCD_BIN"):
        find({"ETCD_BIN": str(program)})


def test_an_unfit_etcd_on_path_is_passed_over_aloud_and_the_cached_one_taken(tmp_path: Path) -> None:
    on_path = make_etcd(tmp_path / "path", "3.5.3")
    cached = make_etcd(tmp_path / "cache/etcd/deb-etcd-server_3.4.23_amd64", "3.4.23")

    found, said = find({"PATH": str(on_path.parent), "LEASEHOLD_CACHE_DIR": str(tmp_path / "cache")})

    assert found == cached
    assert [str(on_path) in line and "lose acknowledged writes" in line for line in said] == [True]


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"LEASEHOLD_CACHE_DIR": "/c", "XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/c"),
        ({"XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/x/leasehold"),
        ({"HOME": "/h"}, "/h/.cache/leasehold"),
    ],
)
def test_the_cache_folder_follows_the_environment(environ: dict[str, str], expected: str) -> None:
    assert cache.cache_dir(environ) == Path(expected)


def test_the_newest_postgres_of_the_wheel_is_found_with_initdb_beside_it() -> None:
    folder = postgres_binary.find()

    assert (folder / "initdb").is_file()
    assert postgres_binary.find(required_major=18) == folder


def test_data_of_a_postgres_that_is_not_here_are_refused_by_version() -> None:
    with pytest.raises(errors.FailedPrecondition, match="made by PostgreSQL 11"):
        postgres_binary.find(required_major=11)


def test_a_dsn_is_shown_without_its_secrets() -> None:
    assert postgres.host_and_port("postgresql://user:secret@db.example:6432/budget") == "db.example:6432"
    assert postgres.host_and_port("host=db.example password=secret") == "db.example:5432"


def test_what_is_no_dsn_is_refused() -> None:
    with pytest.raises(errors.InvalidArgument) as refusal:
        postgres.host_and_port("no dsn at all")

    assert refusal.value.field == "LEASEHOLD_POSTGRES_DSN"
