import pytest
from leasehold.core import errors
from leasehold.rpc import options


def test_a_frozen_peer_is_given_half_a_second_to_answer_a_ping() -> None:
    for given in (dict(options.server_options()), dict(options.channel_options())):
        assert given["grpc.keepalive_time_ms"] == 1_000
        assert given["grpc.http2.ping_timeout_ms"] == 500
        assert given["grpc.keepalive_timeout_ms"] == 500
        assert given["grpc.keepalive_permit_without_calls"] == 1


def test_a_server_does_not_share_its_port_and_bounds_what_one_connection_may_open() -> None:
    given = dict(options.server_options())
    assert given["grpc.so_reuseport"] == 0
    assert given["grpc.max_concurrent_streams"] == 1_024
    assert given["grpc.max_receive_message_length"] == 4 * 1024 * 1024
    assert given["grpc.max_metadata_size"] == 16 * 1024


def test_a_server_bears_the_pings_of_its_own_clients() -> None:
    transport = options.Transport(keepalive_seconds=3.0)
    server, channel = dict(options.server_options(transport)), dict(options.channel_options(transport))
    assert int(server["grpc.http2.min_ping_interval_without_data_ms"]) < int(channel["grpc.keepalive_time_ms"])


def test_a_channel_reconnects_fast_and_asks_no_proxy() -> None:
    given = dict(options.channel_options(has_own_connection=True))
    assert given["grpc.initial_reconnect_backoff_ms"] == 100
    assert given["grpc.max_reconnect_backoff_ms"] == 1_500
    assert given["grpc.enable_http_proxy"] == 0
    assert given["grpc.use_local_subchannel_pool"] == 1


@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_a_limit_of_nothing_is_refused_by_name(value: float) -> None:
    with pytest.raises(errors.InvalidArgument) as refusal:
        options.Transport(keepalive_seconds=value)
    assert refusal.value.field == "keepalive_seconds"
