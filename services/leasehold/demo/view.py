"""What a person sees while the demo runs: a live picture on a terminal, else a line for each change."""

import time
from types import TracebackType
from typing import Protocol, Self

from leasehold.demo import board, plan, windows
from rich import box, console, live, table, text

BAR_WIDTH = 6
LINE_EVERY_SECONDS = 10.0


class View(Protocol):
    """Shows the board; a context manager."""

    def show(self, state: board.Board, messages: list[str]) -> None:
        """The board has been updated; `messages` are new."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def on(screen: console.Console) -> View:
    """The view that suits `screen`."""
    return LiveView(screen) if screen.is_terminal else LineView(screen)


class LineView:
    """A line for each change, and one on the use of the limits now and then."""

    def __init__(self, screen: console.Console) -> None:
        self._screen = screen
        self._scene: plan.Scene | None = None
        self._next_line_seconds = LINE_EVERY_SECONDS

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def show(self, state: board.Board, messages: list[str]) -> None:
        """Prints what is new."""
        scene = state.script.scene_at(state.elapsed_seconds)
        if scene is not self._scene:
            self._scene = scene
            self._print(state, f"--- {scene.name} ---")
        for message in messages:
            self._print(state, message)
        if state.elapsed_seconds >= self._next_line_seconds:
            self._next_line_seconds += LINE_EVERY_SECONDS
            self._print(state, _use_line(state))

    def _print(self, state: board.Board, line: str) -> None:
        self._screen.print(
            f"{state.elapsed_seconds:6.1f} s  {line}", highlight=False, markup=False, soft_wrap=True
        )


def _use_line(state: board.Board) -> str:
    now_ns = time.monotonic_ns()
    uses = ", ".join(
        f"{limit} {getattr(state.leased.use(now_ns), limit):,}/{getattr(state.leased.limits, limit):,}"
        for limit in windows.Limit
    )
    return f"in use: {uses}; done: {state.leased.done} leased, {state.static.done} static"


class LiveView:
    """One picture that is drawn over and over."""

    def __init__(self, screen: console.Console) -> None:
        self._live = live.Live(console=screen, auto_refresh=False)

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def show(self, state: board.Board, messages: list[str]) -> None:
        """Draws the board."""
        self._live.update(picture(state), refresh=True)


def picture(state: board.Board) -> console.Group:
    """The board as something to draw."""
    scene = state.script.scene_at(state.elapsed_seconds)
    left_seconds = max(0.0, state.script.end_seconds - state.elapsed_seconds)
    heading = text.Text.assemble(
        (f"{scene.name}", "bold"), f"   {state.elapsed_seconds:.0f} s, {left_seconds:.0f} s to go"
    )
    gap = text.Text()
    return console.Group(heading, gap, _workers(state), gap, _uses(state), gap, *_messages(state))


def _workers(state: board.Board) -> table.Table:
    fleet = state.leased
    drawn = table.Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("worker", "", "concurrent", "requests", "tokens"):
        drawn.add_column(column, no_wrap=True)
    for column in ("running", "done", "static"):
        drawn.add_column(column, justify="right", no_wrap=True)
    for name, row in fleet.rows.items():
        shares = (
            _bar(row.share.get(limit, 0.0), getattr(fleet.limits, limit))
            for limit in (windows.Limit.CONCURRENCY, windows.Limit.REQUESTS, windows.Limit.TOKENS)
        )
        counts = (row.in_flight, row.done, state.static.rows[name].done)
        drawn.add_row(name, row.state, *shares, *map(str, counts))
    return drawn


def _uses(state: board.Board) -> table.Table:
    now_ns = time.monotonic_ns()
    drawn = table.Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    drawn.add_column("in use", no_wrap=True)
    for fleet in (state.leased, state.static):
        drawn.add_column(fleet.title, no_wrap=True)
    drawn.add_column("limit", justify="right", no_wrap=True)
    window = f" / {state.leased.limits.window_seconds:g} s"
    for limit in windows.Limit:
        wholes = [getattr(fleet.limits, limit) for fleet in (state.leased, state.static)]
        uses = [getattr(fleet.use(now_ns), limit) for fleet in (state.leased, state.static)]
        bars = map(_bar, uses, wholes)
        drawn.add_row(limit + ("" if limit is windows.Limit.CONCURRENCY else window), *bars, f"{wholes[0]:,}")
    drawn.add_row("answered 429", str(state.leased.rejected), str(state.static.rejected))
    return drawn


def _messages(state: board.Board) -> list[text.Text]:
    return [text.Text(message, style="dim", overflow="ellipsis", no_wrap=True) for message in state.messages]


def _bar(amount: float, whole: float) -> str:
    """`amount` of `whole` as a bar and as a number."""
    filled = round(min(amount / whole, 1.0) * BAR_WIDTH)
    number = f"{amount:.0f}" if amount < 10_000 else f"{amount / 1000:.0f}k"
    return f"{'█' * filled}{'░' * (BAR_WIDTH - filled)} {number:>4}"
