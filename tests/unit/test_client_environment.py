"""What a worker's environment says, and what of it is refused."""

import pytest
from leasehold import client
from leasehold.client import environment
from leasehold.core import errors


def test_addresses_come_from_the_call_then_the_environment_then_the_default() -> None:
    variables = {"LEASEHOLD_ADDR": "a:1, b:2,a:1"}

    assert environment.addresses(["x:1"], variables) == ("x:1",)
    assert environment.addresses("x:1,y:2", variables) == ("x:1", "y:2")
    assert environment.addresses(None, variables) == ("a:1", "b:2")
    assert environment.addresses(None, {}) == ("127.0.0.1:7400",)


@pytest.mark.parametrize(
    ("variables", "field"),
    [
        ({"LEASEHOLD_ADDR": "nonsense"}, "LEASEHOLD_ADDR"),
        ({"LEASEHOLD_ADDR": ","}, "LEASEHOLD_ADDR"),
        ({"WORKER_ID": "a/b"}, "WORKER_ID"),
        ({"WORKER_ID": "x" * 300}, "WORKER_ID"),
        ({"WORKER_COUNT": "many"}, "WORKER_COUNT"),
        ({"WORKER_COUNT": "0"}, "WORKER_COUNT"),
    ],
)
def test_a_wrong_variable_is_named_when_connecting(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], field: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(errors.InvalidArgument) as raised:
        client.connect_blocking()

    assert raised.value.field == field


def test_worker_count_is_there_for_who_defines_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKER_COUNT", "12")

    assert client.connect_blocking().worker_count == 12


def test_workers_are_named_after_their_pid_and_children_of_named_ones_add_it() -> None:
    assert environment.holder_name(None, pid=7, is_forked=False) == "worker_7"
    assert environment.holder_name(None, pid=8, is_forked=True) == "worker_8"
    assert environment.holder_name("w", pid=7, is_forked=False) == "w"
    assert environment.holder_name("w", pid=8, is_forked=True) == "w-8"
    assert len(environment.holder_name("w" * 128, pid=123456, is_forked=True)) == 128


@pytest.mark.parametrize("name", ["", "a/b", "a\nb", "x" * 300])
def test_a_wrong_budget_name_is_refused_at_once(name: str) -> None:
    with pytest.raises(errors.InvalidArgument) as raised:
        client.connect_blocking().budget(name)

    assert raised.value.field == "budget"
