import pytest
from leasehold.core import errors
from leasehold.rpc import addresses


@pytest.mark.parametrize(
    ("text", "as_grpc_takes_it"),
    [
        ("127.0.0.1:7400", "127.0.0.1:7400"),
        ("localhost:0", "localhost:0"),
        ("[::1]:65535", "[::1]:65535"),
        ("node-7.example:80", "node-7.example:80"),
        ("unix:/run/leasehold/agent.sock", "unix:/run/leasehold/agent.sock"),
        ("unix:///run/leasehold/agent.sock", "unix:/run/leasehold/agent.sock"),
        ("unix:relative.sock", "unix:relative.sock"),
    ],
)
def test_an_address_is_read_and_written_back(text: str, as_grpc_takes_it: str) -> None:
    assert str(addresses.parse(text)) == as_grpc_takes_it


@pytest.mark.parametrize(
    "text",
    [
        *("", "7400", ":7400", "127.0.0.1", "127.0.0.1:", "127.0.0.1:65536", "127.0.0.1:-1", "127.0.0.1:http"),
        *(
            "::1:7400",
            "[::1]",
            "[localhost]:1",
            "[fe80::1",
            "a b:1",
            "a/b:1",
            "a\n:1",
            "127.0.0.1:٣",
            "dns:///a:1",
        ),
        *("unix:", "unix:/a\0b", "unix:/" + "a" * 107),
    ],
)
def test_what_is_no_address_is_refused_naming_the_setting(text: str) -> None:
    with pytest.raises(errors.InvalidArgument) as refusal:
        addresses.parse(text, setting="--listen")
    assert refusal.value.field == "--listen"


@pytest.mark.parametrize(
    ("text", "is_loopback"),
    [
        ("127.0.0.1:1", True),
        ("127.9.9.9:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        ("unix:/run/a.sock", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("10.0.0.1:1", False),
        ("[::ffff:10.0.0.1]:1", False),
        ("localhost.example:1", False),
        ("127.0.0.1.example:1", False),
    ],
)
def test_only_what_other_hosts_cannot_reach_counts_as_loopback(text: str, is_loopback: bool) -> None:
    assert addresses.parse(text).is_loopback is is_loopback
