"""Settings of the allocator: what is refused before any server is asked, and by which name."""

from pathlib import Path
from typing import Any

import pytest
from leasehold.allocator import config
from leasehold.core import errors

DSN = {"postgres_dsn": "postgresql://127.0.0.1/leasehold"}

CASES: dict[str, tuple[dict[str, Any], str, str]] = {
    "an open address without TLS": ({"listen": "192.0.2.1:7400"}, "tls_ca_file", "--tls-ca-file"),
    "an open name without TLS": ({"listen": "example.org:7400"}, "tls_ca_file", "--tls-ca-file"),
    "no port": ({"listen": "7400"}, "--listen", "host:port"),
    "a path with no address to tell": ({"listen": "unix:/tmp/socket"}, "advertise", "--advertise"),
    "an address to tell that is none": ({"advertise": "x"}, "--advertise", "host:port"),
    "half a certificate": ({"tls_key_file": "/none.pem"}, "tls_certificate_file", "tls_key_file"),
    "a missing certificate": (
        {"tls_certificate_file": "/none.pem", "tls_key_file": "/none.pem"},
        "tls_certificate_file",
        "/none.pem",
    ),
    "a missing authority of etcd": ({"etcd_ca_file": "/none.pem"}, "ca_file", "/none.pem"),
    "a user without a password": ({"etcd_user": "u"}, "etcd_password_file", "etcd_password_file"),
    "a missing DSN file": ({"postgres_dsn_file": "/none"}, "postgres_dsn_file", "/none"),
    "a number that is none": (
        {"election_ttl_seconds": "soon"},
        "election_ttl_seconds",
        "LEASEHOLD_ELECTION_TTL_SECONDS or --election-ttl-seconds",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_refused_by_name(case: str) -> None:
    flags, field, words = CASES[case]
    with pytest.raises(errors.InvalidArgument) as caught:
        config.load({**DSN, **flags}).check()
    assert caught.value.field == field
    assert words in caught.value.message


def test_without_postgres_the_settings_that_lack_are_named() -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        config.load({}).check()
    assert "LEASEHOLD_POSTGRES_DSN" in caught.value.message


def test_the_defaults_pass_and_a_flag_stands_above_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LEASEHOLD_ELECTION_TTL_SECONDS", "7")
    monkeypatch.setenv("LEASEHOLD_POSTGRES_DSN", "postgresql://127.0.0.1/environment")
    path = tmp_path / "dsn"
    path.write_text("postgresql://127.0.0.1/file\n")
    settings = config.load({"postgres_dsn_file": str(path)})
    settings.check()
    assert settings.election_ttl_seconds == 7
    assert config.load({"election_ttl_seconds": "9"}).election_ttl_seconds == 9
    assert settings.dsn() == "postgresql://127.0.0.1/file"
    assert "environment" not in repr(settings)
