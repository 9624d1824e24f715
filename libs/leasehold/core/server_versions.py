"""Which etcd and which PostgreSQL keep what Leasehold relies on."""

import re

#: Major, minor, patch.
Version = tuple[int, int, int]

POSTGRES_MAJOR_MIN = 15

_ETCD_VERSION = re.compile(r"v?(\d+)\.(\d+)\.(\d+)")


def etcd_version(text: str) -> Version | None:
    """The version in what etcd says of itself, ``3.5.16`` or ``3.6.0-rc.1``; None if there is none."""
    match = _ETCD_VERSION.match(text)
    if match is None:
        return None
    major, minor, patch = map(int, match.groups())
    return major, minor, patch


def objection_to_etcd(version: Version) -> str | None:
    """Why an etcd of this version must not be used; None if it may be.

    3.5.0 to 3.5.5 can lose acknowledged writes when they are killed; older ones than 3.4.22 carry data
    corruption bugs that were fixed there.
    """
    told = ".".join(map(str, version))
    if (3, 5, 0) <= version <= (3, 5, 5):
        return f"etcd {told} can lose acknowledged writes when it is killed; use 3.5.6 or later"
    if version < (3, 4, 22):
        return f"etcd {told} is too old; use 3.4.22 or later of 3.4, or 3.5.6 or later"
    return None


def objection_to_postgres(version_number: int) -> str | None:
    """Why a PostgreSQL must not be used; None if it may be.

    `version_number` is its ``server_version_num``: 150004 is 15.4.
    """
    major = version_number // 10_000
    if major < POSTGRES_MAJOR_MIN:
        return f"PostgreSQL {major} is too old; use {POSTGRES_MAJOR_MIN} or later"
    return None
