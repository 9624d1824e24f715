"""Which servers are refused, and why."""

import pytest
from leasehold.core import server_versions


@pytest.mark.parametrize("version", [(3, 4, 22), (3, 4, 23), (3, 5, 6), (3, 5, 30), (3, 6, 0), (4, 0, 0)])
def test_a_fit_etcd_is_accepted(version: server_versions.Version) -> None:
    assert server_versions.objection_to_etcd(version) is None


@pytest.mark.parametrize("version", [(3, 5, 0), (3, 5, 1), (3, 5, 5)])
def test_an_etcd_that_loses_writes_is_refused_with_the_reason(version: server_versions.Version) -> None:
    objection = server_versions.objection_to_etcd(version)

    assert objection is not None
    assert "lose acknowledged writes" in objection
    assert "3.5.6" in objection


@pytest.mark.parametrize("version", [(3, 4, 21), (3, 3, 25), (2, 3, 8)])
def test_an_etcd_that_is_too_old_is_refused(version: server_versions.Version) -> None:
    assert "too old" in str(server_versions.objection_to_etcd(version))


@pytest.mark.parametrize(
    ("text", "version"),
    [("3.5.16", (3, 5, 16)), ("3.6.0-rc.1", (3, 6, 0)), ("v3.4.30", (3, 4, 30)), ("", None), ("3.5", None)],
)
def test_what_etcd_says_of_itself_is_read(text: str, version: server_versions.Version | None) -> None:
    assert server_versions.etcd_version(text) == version


@pytest.mark.parametrize(
    ("number", "is_fit"), [(149_999, False), (90_624, False), (150_000, True), (180_001, True)]
)
def test_postgres_is_fit_from_15_on(number: int, is_fit: bool) -> None:
    assert (server_versions.objection_to_postgres(number) is None) is is_fit
