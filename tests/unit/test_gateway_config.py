"""Settings of the gateway: what is refused before anything listens, and by which name."""

from pathlib import Path
from typing import Any

import pytest
from leasehold.core import errors
from leasehold.gateway import config

CASES: dict[str, tuple[dict[str, Any], str, str]] = {
    "an open address without TLS": (
        {"gateway_listen": "192.0.2.1:8000"},
        "gateway_tls_ca_file",
        "LEASEHOLD_GATEWAY_LISTEN",
    ),
    "an open address whose clients show nothing": (
        {
            "gateway_listen": "192.0.2.1:8000",
            "gateway_tls_certificate_file": "/none.pem",
            "gateway_tls_key_file": "/none.pem",
        },
        "gateway_tls_ca_file",
        "--tls-ca-file",
    ),
    "every interface without TLS": (
        {"gateway_listen": "0.0.0.0:8000"},
        "gateway_tls_ca_file",
        "--tls-certificate-file",
    ),
    "an open name without TLS": ({"gateway_listen": "example.org:8000"}, "gateway_tls_ca_file", "mutual TLS"),
    "no port": ({"gateway_listen": "8000"}, "--listen", "host:port"),
    "a Unix socket": ({"gateway_listen": "unix:/tmp/socket"}, "--listen", "Unix socket"),
    "an allocator that is none": ({"addr": "nowhere"}, "LEASEHOLD_ADDR or --addr", "host:port"),
    "no allocator": ({"addr": " , "}, "LEASEHOLD_ADDR or --addr", "no address"),
    "half a certificate": ({"gateway_tls_key_file": "/none.pem"}, "gateway_tls_certificate_file", "needs"),
    "a missing certificate": (
        {"gateway_tls_certificate_file": "/none.pem", "gateway_tls_key_file": "/none.pem"},
        "gateway_tls_certificate_file",
        "/none.pem",
    ),
    "a pattern for hosts": ({"gateway_allowed_hosts": "*.example.org"}, "gateway_allowed_hosts", "patterns"),
    "an URL for a host": ({"gateway_allowed_hosts": "http://x"}, "gateway_allowed_hosts", "no name of a host"),
    "a timeout of nothing": (
        {"gateway_request_timeout_seconds": "0"},
        "gateway_request_timeout_seconds",
        "--request-timeout-seconds (LEASEHOLD_GATEWAY_REQUEST_TIMEOUT_SECONDS)",
    ),
    "a timeout that is no number": (
        {"gateway_request_timeout_seconds": "nan"},
        "gateway_request_timeout_seconds",
        "--request-timeout-seconds",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_refused_by_name(case: str) -> None:
    flags, field, words = CASES[case]
    with pytest.raises(errors.InvalidArgument) as caught:
        config.load(flags).check()
    assert caught.value.field == field
    assert words in caught.value.message


def test_the_defaults_pass_and_a_flag_stands_above_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    config.load({}).check()
    assert config.load({}).gateway_listen == "127.0.0.1:8000"
    monkeypatch.setenv("LEASEHOLD_GATEWAY_LISTEN", "127.0.0.1:8001")
    monkeypatch.setenv("LEASEHOLD_ADDR", "a:1,b:2")
    settings = config.load({"gateway_listen": None})
    assert settings.gateway_listen == "127.0.0.1:8001"
    assert settings.allocators() == ("a:1", "b:2")
    assert config.load({"gateway_listen": "127.0.0.1:8002"}).gateway_listen == "127.0.0.1:8002"


def test_loopbacks_names_the_own_and_those_that_are_set_are_allowed() -> None:
    settings = config.load({"gateway_allowed_hosts": " Gateway.example.org, [2001:db8::1]"})

    assert settings.allowed_hosts == {
        "localhost",
        "127.0.0.1",
        "::1",
        "gateway.example.org",
        "2001:db8::1",
    }
    assert "192.0.2.1" in config.load({"gateway_listen": "192.0.2.1:8000"}).allowed_hosts
    assert "0.0.0.0" not in config.load({"gateway_listen": "0.0.0.0:8000"}).allowed_hosts


def test_a_key_that_everybody_can_read_is_refused(tmp_path: Path) -> None:
    key = tmp_path / "key.pem"
    key.write_text("none")
    key.chmod(0o644)

    with pytest.raises(errors.InvalidArgument) as caught:
        config.load({"gateway_tls_certificate_file": str(key), "gateway_tls_key_file": str(key)}).check()
    assert caught.value.field == "gateway_tls_key_file"
