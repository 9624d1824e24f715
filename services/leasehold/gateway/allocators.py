"""What the gateway asks the allocators: the leader of them, with a deadline."""

from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

from leasehold.api.budget.v1 import budget_service_pb2 as budget_wire
from leasehold.api.node.v1 import node_pb2, order_pb2
from leasehold.api.node.v1 import node_service_pb2 as wire
from leasehold.core import errors
from leasehold.rpc import leader, methods, node_codec, tls, wire_values

EVERY_NODE: Final = "*"
PAGE_SIZE: Final = 500
#: Names in an error that leaves a choice.
CHOICES_MAX: Final = 20


class Allocators:
    """Calls to whichever allocator leads. `timeout_seconds` bounds each; orders have `order_seconds` more.

    Raises what the leader answers, as core errors, and `Unavailable` where none answers in time.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        timeout_seconds: float,
        order_seconds: float = 5.0,
        tls_files: tls.TlsFiles | None = None,
    ) -> None:
        self._leader = leader.LeaderChannel(addresses, tls_files=tls_files)
        #: How long a leader is looked for.
        self.timeout_seconds = timeout_seconds
        self._order_seconds = order_seconds

    async def close(self) -> None:
        """Close all channels."""
        await self._leader.close()

    async def call(self, method: str, request: Any, *, timeout_seconds: float | None = None) -> Any:
        """Call a unary method, which must be idempotent; returns its response."""
        return await self._leader.ask(
            methods.unary(method, request), request, timeout_seconds=timeout_seconds or self.timeout_seconds
        )

    async def nodes(
        self, *, is_brief: bool = False, timeout_seconds: float | None = None
    ) -> tuple[list[node_pb2.Node], bool]:
        """Every node, by name; and whether so many were lost at once that it is rather the network."""
        nodes: list[node_pb2.Node] = []
        is_mass_loss = False
        async for page in self._pages(is_brief, timeout_seconds):
            nodes.extend(page.nodes)
            is_mass_loss = is_mass_loss or page.is_mass_loss
        return nodes, is_mass_loss

    async def _pages(
        self, is_brief: bool, timeout_seconds: float | None
    ) -> AsyncIterator[wire.ListNodesResponse]:
        token = ""
        while True:
            request = wire.ListNodesRequest(page_size=PAGE_SIZE, page_token=token, is_brief=is_brief)
            page = await self.call("ListNodes", request, timeout_seconds=timeout_seconds)
            yield page
            token = page.next_page_token
            if not token:
                return

    async def node(self, name: str) -> node_pb2.Node:
        """One node. Raises `NotFound`."""
        answer: wire.GetNodeResponse = await self.call("GetNode", wire.GetNodeRequest(name=name))
        return answer.node

    async def order(self, node: str, order: order_pb2.Order) -> list[wire.OrderNodeResponse.Answer]:
        """Hand an order to a node (empty: the only one), or to every one; their answers, by name."""
        request = wire.OrderNodeRequest(
            node=node, order=order, timeout=wire_values.encode_seconds(self._order_seconds)
        )
        seconds = self.timeout_seconds + self._order_seconds
        answer: wire.OrderNodeResponse = await self.call("OrderNode", request, timeout_seconds=seconds)
        return list(answer.answers)

    async def budget_status(self, budget: str, worker_id: str) -> budget_wire.GetBudgetStatusResponse:
        """One worker's view of a budget, which may be left out where there is one."""
        name = budget or await self._only_budget()
        request = budget_wire.GetBudgetStatusRequest(budget=name, worker_id=worker_id)
        answer: budget_wire.GetBudgetStatusResponse = await self.call("GetBudgetStatus", request)
        return answer

    async def _only_budget(self) -> str:
        request = budget_wire.ListBudgetsRequest(page_size=CHOICES_MAX)
        page: budget_wire.ListBudgetsResponse = await self.call("ListBudgets", request)
        names = [each.name for each in page.budgets]
        if not names:
            raise errors.NotFound("there is no budget")
        if len(names) > 1:
            choice = ", ".join(names) + (" and more" if page.next_page_token else "")
            raise errors.InvalidArgument(
                f"budget: there are several, name one: {choice}",
                field="budget",
                metadata={"choices": ",".join(names)},
            )
        return names[0]


def refusal_of(result: order_pb2.OrderResult) -> errors.LeaseholdError | None:
    """Why a node refused its order; None: it did not."""
    return node_codec.decode_error(result.error) if result.HasField("error") else None
