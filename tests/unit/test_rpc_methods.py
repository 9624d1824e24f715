"""Methods by their name and request, and addresses in a list."""

import grpc
import pytest
from leasehold.api.budget.v1 import budget_service_pb2 as budget_wire
from leasehold.api.node.v1 import agent_service_pb2, node_service_pb2
from leasehold.core import errors
from leasehold.rpc import addresses, methods


def test_a_request_tells_which_service_its_method_is_of() -> None:
    found = methods.method_of("ListNodes", node_service_pb2.ListNodesRequest())
    agents = methods.method_of("ExecuteOrder", agent_service_pb2.ExecuteOrderRequest())

    assert found.containing_service.full_name == "leasehold.api.node.v1.NodeService"
    assert agents.containing_service.full_name == "leasehold.api.node.v1.AgentService"


@pytest.mark.parametrize("name", ["ListNode", "PutBudget", ""])
def test_a_method_that_does_not_take_the_request_is_refused(name: str) -> None:
    with pytest.raises(errors.Unimplemented, match=r"leasehold\.api\.budget\.v1\.ListBudgetsRequest"):
        methods.unary(name, budget_wire.ListBudgetsRequest())


async def test_a_method_of_a_channel_speaks_its_own_types() -> None:
    channel = grpc.aio.insecure_channel("127.0.0.1:9")
    try:
        call = methods.unary("ListBudgets", budget_wire.ListBudgetsRequest())(channel)
        assert isinstance(call, grpc.aio.UnaryUnaryMultiCallable)
        stream = methods.stream("WatchNodes", node_service_pb2.WatchNodesRequest())(channel)
        assert isinstance(stream, grpc.aio.UnaryStreamMultiCallable)
    finally:
        await channel.close()


def test_addresses_of_a_list_are_parsed_once_each() -> None:
    assert addresses.parse_list(" a:1, [::1]:2,a:1 ,", setting="--addr") == ("a:1", "[::1]:2")


@pytest.mark.parametrize("text", ["", " , ", "a:1,b"])
def test_a_list_without_an_address_is_refused_by_its_setting(text: str) -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        addresses.parse_list(text, setting="--addr")
    assert caught.value.field == "--addr"
