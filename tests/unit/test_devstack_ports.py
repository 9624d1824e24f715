"""Ports: which are free, who has one, which is given."""

import os
import socket
from collections.abc import Iterator

import psutil
import pytest
from leasehold.core import errors
from leasehold.devstack import ports


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server((ports.HOST, 0)) as server:
        yield server


def port_of(server: socket.socket) -> int:
    return int(server.getsockname()[1])


def test_a_taken_port_is_an_error_that_names_port_holder_and_flag(listener: socket.socket) -> None:
    with pytest.raises(errors.FailedPrecondition) as refusal:
        ports.check_free(port_of(listener), "--etcd-port")

    assert f"port {port_of(listener)} is taken" in refusal.value.message
    assert f"PID {os.getpid()} (" in refusal.value.message
    assert psutil.Process().cmdline()[-1] in refusal.value.message
    assert "--etcd-port" in refusal.value.message
    assert refusal.value.field == "--etcd-port"
    assert refusal.value.metadata == {"port": str(port_of(listener)), "pid": str(os.getpid())}


def test_a_port_taken_on_every_address_is_taken_on_loopback() -> None:
    with (
        socket.create_server(("0.0.0.0", 0)) as server,
        pytest.raises(errors.FailedPrecondition, match="is taken"),
    ):
        ports.check_free(port_of(server), "--etcd-port")


def test_a_port_bound_but_not_listened_on_is_taken_too_though_the_kernel_does_not_tell_by_whom() -> None:
    with socket.socket() as bound:
        bound.bind((ports.HOST, 0))
        with pytest.raises(errors.FailedPrecondition, match="is taken"):
            ports.check_free(port_of(bound), "--etcd-port")


def test_a_port_is_free_again_when_its_listener_has_gone(listener: socket.socket) -> None:
    port = port_of(listener)
    with socket.create_connection((ports.HOST, port)):
        accepted, _ = listener.accept()
        accepted.close()  # this side closes first and goes through TIME_WAIT
    listener.close()

    ports.check_free(port, "--etcd-port")


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_a_number_that_is_no_port_is_refused(port: int) -> None:
    with pytest.raises(errors.InvalidArgument, match="--etcd-port") as refusal:
        ports.check_free(port, "--etcd-port")

    assert refusal.value.field == "--etcd-port"


def test_given_ports_differ_are_free_and_lie_below_the_ephemeral_range() -> None:
    given = [ports.free_port() for _ in range(50)]
    with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
        first_ephemeral = int(file.read().split()[0])

    assert len(set(given)) == 50
    assert all(port < first_ephemeral for port in given)
    for port in given:
        ports.check_free(port, "--any")
