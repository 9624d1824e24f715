"""What a person sees while the workers' scenes run: a live picture on a terminal, else lines."""

import collections
from types import TracebackType
from typing import Protocol, Self

from leasehold.api.node.v1 import node_pb2, pool_pb2, worker_pb2
from leasehold.core.node import model
from leasehold.demo import pool_audit, pool_plan, pool_stack
from rich import box, console, live, table, text

BAR_WIDTH = 10
MESSAGES = 8
LINE_EVERY_SECONDS = 5.0


class View(Protocol):
    """A context manager that shows lines and the present state."""

    def say(self, seconds: float, line: str) -> None:
        """Something happened."""

    def draw(self, seconds: float, status: node_pb2.NodeStatus | None, verdict: pool_audit.Verdict) -> None:
        """How it stands."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def on(screen: console.Console) -> View:
    """The view that suits `screen`."""
    return LiveView(screen) if screen.is_terminal else LineView(screen)


class LineView:
    """A line for each event, and one on the state now and then."""

    def __init__(self, screen: console.Console) -> None:
        self._screen = screen
        self._next_seconds = LINE_EVERY_SECONDS

    def say(self, seconds: float, line: str) -> None:
        """Print it."""
        self._screen.print(f"{seconds:6.1f} s  {line}", highlight=False, markup=False, soft_wrap=True)

    def draw(self, seconds: float, status: node_pb2.NodeStatus | None, verdict: pool_audit.Verdict) -> None:
        """Print a line each 5 s."""
        if seconds >= self._next_seconds:
            self._next_seconds += LINE_EVERY_SECONDS
            self.say(seconds, _line(status, verdict))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class LiveView:
    """One picture that is drawn over and over."""

    def __init__(self, screen: console.Console) -> None:
        self._live = live.Live(console=screen, auto_refresh=False)
        self._lines: collections.deque[str] = collections.deque(maxlen=MESSAGES)
        self._title = ""

    def say(self, seconds: float, line: str) -> None:
        """Keep it for the next picture."""
        if line.startswith("---"):
            self._title = line.strip("- ")
        self._lines.append(f"{seconds:6.1f} s  {line}")

    def draw(self, seconds: float, status: node_pb2.NodeStatus | None, verdict: pool_audit.Verdict) -> None:
        """Draw the picture."""
        heading = text.Text.assemble((self._title, "bold"), f"   {seconds:.0f} s")
        lines = [text.Text(line, style="dim", overflow="ellipsis", no_wrap=True) for line in self._lines]
        gap = text.Text()
        picture = console.Group(
            heading, gap, _workers(status), gap, text.Text(_line(status, verdict)), gap, *lines
        )
        self._live.update(picture, refresh=True)

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)


def _line(status: node_pb2.NodeStatus | None, verdict: pool_audit.Verdict) -> str:
    done = f"done {verdict.completed_once}/{verdict.submitted}"
    pools = [pool for pool in status.pools if pool.name == pool_plan.POOL] if status is not None else []
    if status is None or not pools:
        return f"no agent; {done}"
    held = sum(worker.held_bytes for worker in pool_stack.alive(pools[0]))
    total = status.memory.total_bytes
    return (
        f"workers {pools[0].running}/{pools[0].optimal} (optimal), held {held / model.MIB:.0f} of "
        f"{total / model.MIB:.0f} MB, waiting {_waiting(pools[0].depth)}; {done}"
    )


def _waiting(depth: pool_pb2.QueueDepth) -> str:
    return str(depth.ready) if depth.HasField("ready") else "not known"


def _workers(status: node_pb2.NodeStatus | None) -> table.Table:
    drawn = table.Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("worker", "PID", "", "memory", "task"):
        drawn.add_column(column, no_wrap=True)
    pools = [pool for pool in status.pools if pool.name == pool_plan.POOL] if status is not None else []
    for pool in pools:
        for worker in pool_stack.alive(pool):
            state = worker_pb2.WorkerState.Name(worker.state).removeprefix("WORKER_STATE_").lower()
            adopted = ", adopted" if worker.is_adopted else ""
            drawn.add_row(
                worker.name,
                str(worker.process.pid or ""),
                f"{state}{adopted}",
                _bar(worker.held_bytes, worker.limit_bytes),
                worker.task_id,
            )
    return drawn


def _bar(amount: int, whole: int) -> str:
    filled = round(min(amount / whole, 1.0) * BAR_WIDTH) if whole else 0
    return f"{'█' * filled}{'░' * (BAR_WIDTH - filled)} {amount / model.MIB:.0f} MB"
