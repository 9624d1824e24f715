"""What all clients of a process share: one I/O thread, one session for each allocator, one engine a budget.

A blocked event loop or thread of the user never delays a renewal, because none of them carries it.

Fork. The child gets everything here as it was at the fork, without the threads. It starts fenced: before any
code of the user runs in it, `after_fork_in_child` gives each engine another incarnation under another name, its
own lock and an empty stock. gRPC cannot be used there once it was loaded (see `grpc_link`), so such a child
speaks through a relay process; a child of a parent that had not connected yet speaks for itself.
"""

import asyncio
import atexit
import concurrent.futures
import contextlib
import gc
import os
import sys
import threading
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

from leasehold.client import engine as engines
from leasehold.client import environment, relay_link
from leasehold.client import link as links
from leasehold.client import session as sessions
from leasehold.core import errors
from leasehold.core.budget import model
from leasehold.observe import logs

_log = logs.get_logger(__name__)

T = TypeVar("T")

#: Bounds what giving leases back may take at exit.
CLOSE_SECONDS: Final = 1.0

_FORK_VARIABLE: Final = "GRPC_ENABLE_FORK_SUPPORT"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a client's allocators are, and how they are reached."""

    addresses: tuple[str, ...]
    tls_files: relay_link.TlsPaths | None = None


@dataclass(frozen=True, slots=True)
class _Key:
    endpoint: Endpoint
    budget: str
    #: None: the worker is named after its PID.
    worker_id: str | None


class IoThread:
    """A daemon thread with an event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="leasehold-io", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.get_loop().run_forever()

    def call_soon(self, callback: Any, *arguments: Any) -> None:
        """Run `callback` on the loop; nothing happens once it has stopped."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback, *arguments)

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Run a coroutine on the loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def stop(self, timeout_seconds: float) -> None:
        """End the loop and the thread."""
        self.call_soon(self._loop.stop)
        self._thread.join(timeout_seconds)


class Closing(Protocol):
    """What has connections on the I/O thread."""

    async def close(self) -> None:
        """Close them."""
        ...


class Runtime:
    """Engines and sessions of this process, counted by their users. Safe to use from any thread."""

    def __init__(self) -> None:
        # Held over every change, and by a fork: the child never sees half of one.
        self.lock = threading.RLock()
        self._engines: dict[_Key, engines.Engine] = {}
        self._users: dict[_Key, int] = {}
        self._sessions: dict[Endpoint, sessions.Session] = {}
        self._io: IoThread | None = None
        self._is_forked = False
        self._must_relay = False
        self._is_fork_safe = True
        self._is_collecting = True
        self._inherited: list[object] = []
        self._closings: set[Closing] = set()

    def engine(self, endpoint: Endpoint, budget: str, worker_id: str | None) -> engines.Engine:
        """The engine of this worker's part of `budget`, shared by all who ask; `give_up` when done."""
        model.checked_budget_name(budget, field_name="budget")
        key = _Key(endpoint, budget, worker_id)
        with self.lock:
            engine = self._engines.get(key)
            if engine is None:
                engine = engines.Engine(budget=budget, name=self._name(worker_id), start=self.start)
                self._engines[key] = engine
            self._users[key] = self._users.get(key, 0) + 1
            return engine

    def start(self, engine: engines.Engine) -> None:
        """Connect, and join as soon as there is a connection. A second time does nothing."""
        with self.lock:
            if engine.poke is not None or engine.is_closed:
                return
            key = next(key for key, each in self._engines.items() if each is engine)
            if self._io is None:
                self._io = IoThread()
                self._close_with_process()
            io = self._io
            if engine.holder.process is None:
                engine.holder.process = engines.own_process()
            session = self._sessions.get(key.endpoint)
            if session is None:
                session = sessions.Session(key.endpoint.addresses, self._link(key.endpoint))
                self._sessions[key.endpoint] = session
            engine.poke = _Poke(io, session)
            io.call_soon(session.add, engine)

    def give_up(self, engine: engines.Engine) -> concurrent.futures.Future[None] | None:
        """One user fewer; with the last one the lease is given back. Wait for the future, if there is one."""
        with self.lock:
            key = next((key for key, each in self._engines.items() if each is engine), None)
            if key is None:
                return None
            self._users[key] -= 1
            if self._users[key]:
                return None
            del self._engines[key], self._users[key]
            if engine.poke is None or self._io is None:
                engine.close()
                return None
            session = self._sessions[key.endpoint]
            is_last = not any(
                each.poke is not None and other.endpoint == key.endpoint
                for other, each in self._engines.items()
            )
            if is_last:
                del self._sessions[key.endpoint]
            return self._io.submit(_close(session, engine, is_last=is_last))

    def close(self) -> None:
        """At exit of the process: give every lease back, in a bounded time."""
        with self.lock:
            io, started = self._io, [each for each in self._engines.values() if each.poke is not None]
            pending = [future for engine in started for future in self._give_up_wholly(engine)]
            if io is not None:
                pending += [io.submit(each.close()) for each in self._closings]
            self._closings = set()
            self._io = None
        concurrent.futures.wait(pending, CLOSE_SECONDS)
        if io is not None:
            io.stop(CLOSE_SECONDS / 2)

    def _close_with_process(self) -> None:
        # Processes of multiprocessing end past atexit, but not past its own finalizers.
        process, util = (sys.modules.get(f"multiprocessing.{name}") for name in ("process", "util"))
        if process is not None and util is not None and process.parent_process() is not None:
            util.Finalize(None, self.close, exitpriority=0)

    def _give_up_wholly(self, engine: engines.Engine) -> list[concurrent.futures.Future[None]]:
        key = next(key for key, each in self._engines.items() if each is engine)
        self._users[key] = 1
        future = self.give_up(engine)
        return [] if future is None else [future]

    def _name(self, worker_id: str | None) -> str:
        return environment.holder_name(worker_id, pid=os.getpid(), is_forked=self._is_forked)

    def _link(self, endpoint: Endpoint) -> links.Link:
        if self._must_relay:
            return relay_link.RelayLink(endpoint.tls_files)
        # Not at the top: until a connection is wanted, a process may fork without harm. Loaded in the calling
        # thread, under the lock that a fork takes: no child finds it half loaded.
        self._is_fork_safe = "grpc" not in sys.modules or os.environ.get(_FORK_VARIABLE) == "0"
        with _without_fork_support():
            from leasehold.client import grpc_link
        return grpc_link.GrpcLink(endpoint.tls_files)  # type: ignore[arg-type]  # TlsPaths is what is seen of it

    # Calls of other services

    def io(self, closing: "Closing") -> IoThread:
        """The I/O thread, for calls of gRPC on it; `closing` is closed there before it ends, unless `left`.

        Raises `FailedPrecondition` in the child of a fork whose parent had loaded gRPC.
        """
        with self.lock:
            if self._must_relay:
                raise errors.FailedPrecondition(
                    "jobs cannot be used in the child of a fork whose parent had loaded gRPC: use them "
                    "first in the child, or start it by `spawn`"
                )
            if self._io is None:
                self._io = IoThread()
                self._close_with_process()
            self._is_fork_safe = "grpc" not in sys.modules or os.environ.get(_FORK_VARIABLE) == "0"
            with _without_fork_support():
                import grpc  # noqa: F401  see `_link`
            self._closings.add(closing)
            return self._io

    def left(self, closing: "Closing") -> None:
        """It has closed itself."""
        with self.lock:
            self._closings.discard(closing)

    # Fork

    def before_fork(self) -> None:
        """Wait until no thread is half-way through a change; no garbage is collected until the fork is over."""
        self.lock.acquire()
        if not self._is_fork_safe:
            self._is_fork_safe = True  # said once
            _log.warning("fork_unsafe", remedy=f"set {_FORK_VARIABLE}=0: gRPC was loaded without it before")
        self._is_collecting = gc.isenabled()
        gc.disable()

    def after_fork_in_parent(self) -> None:
        """Go on."""
        if self._is_collecting:
            gc.enable()
        self.lock.release()

    def after_fork_in_child(self) -> None:
        """Begin a life of its own; see the module."""
        self.lock = threading.RLock()
        self._must_relay = self._must_relay or self._io is not None or "grpc" in sys.modules
        if self._must_relay:
            # Never used here, and never freed: to free gRPC's objects without its threads can crash. Those of
            # which only a thread knew that is no more would be garbage, so what there is now is exempt.
            self._inherited += [self._io, self._sessions, self._closings]
            gc.freeze()
        if self._is_collecting:
            gc.enable()
        self._io, self._sessions, self._closings = None, {}, set()
        self._is_forked = True
        for key, engine in self._engines.items():
            engine.begin_anew(self._name(key.worker_id), None)


@contextlib.contextmanager
def _without_fork_support() -> Iterator[None]:
    """Load gRPC without its own handling of forks, unless the environment asks for that.

    It would start its threads anew in the child, upon the parent's connections, behind the back of a Python
    layer that is dead there: one child in five was seen to crash. A program that has loaded gRPC before it uses
    this library, and forks after, sets GRPC_ENABLE_FORK_SUPPORT=0 itself.
    """
    if _FORK_VARIABLE in os.environ:
        yield
        return
    os.environ[_FORK_VARIABLE] = "0"
    try:
        yield
    finally:
        # It has been read; programs that this one starts have a choice of their own.
        del os.environ[_FORK_VARIABLE]


class _Poke:
    """Wakes a session's pump from any thread."""

    __slots__ = ("_io", "_session")

    def __init__(self, io: IoThread, session: sessions.Session) -> None:
        self._io = io
        self._session = session

    def __call__(self) -> None:
        self._io.call_soon(self._session.poke)


async def _close(session: sessions.Session, engine: engines.Engine, *, is_last: bool) -> None:
    await session.remove(engine, timeout_seconds=CLOSE_SECONDS)
    if is_last:
        await session.close(timeout_seconds=CLOSE_SECONDS)


PROCESS: Final = Runtime()
os.register_at_fork(
    before=PROCESS.before_fork,
    after_in_parent=PROCESS.after_fork_in_parent,
    after_in_child=PROCESS.after_fork_in_child,
)
atexit.register(PROCESS.close)
