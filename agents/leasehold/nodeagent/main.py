"""Wiring: an agent's parts, started and ended in order."""

import asyncio
import contextlib
import os
import pathlib
import signal
import stat
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Final

from leasehold.api.node.v1 import agent_service_pb2 as wire
from leasehold.api.node.v1 import agent_service_pb2_grpc
from leasehold.core import errors
from leasehold.nodeagent import (
    agent,
    cgroups,
    endings,
    link,
    log_writer,
    memory,
    node_record,
    orders,
    reloading,
    service_manager,
    servicer,
    state,
    watchers,
)
from leasehold.nodeagent import config as configs
from leasehold.observe import logs, metrics
from leasehold.rpc import server as servers
from leasehold.runtime import interrupts, tasks

#: Calls under way get so long when the agent ends; watches are told to end.
DRAIN: Final = servers.Drain(notice_seconds=0.0, grace_seconds=1.0)

_MODES: Final = {
    wire.SHUT_DOWN_MODE_UNSPECIFIED: endings.Stage.DRAIN,
    wire.SHUT_DOWN_MODE_DRAIN: endings.Stage.DRAIN,
    wire.SHUT_DOWN_MODE_IMMEDIATE: endings.Stage.IMMEDIATE,
    wire.SHUT_DOWN_MODE_LEAVE_WORKERS: endings.Stage.LEAVE,
}

_log = logs.get_logger(__name__)


class _Process:
    """One agent, from the lock on its folder to its end."""

    def __init__(self, config: configs.Config, flags: Mapping[str, str | None], *, is_ephemeral: bool) -> None:
        self._config = config
        self._flags = flags
        self._is_ephemeral = is_ephemeral
        self._manager = service_manager.ServiceManager()
        self._folder = state.StateFolder(config.state_dir)

    async def serve(self) -> None:
        """Serve until told to end, then see the workers off as told."""
        self._folder.open()
        try:
            prepare_socket(self._config.socket)
            self._record = node_record.NodeRecord(self._folder)
            self._record.begin()
            self._host = agent.Agent(self._config, self._folder, cgroups.detect(self._config.workers_cgroup))
            self._host.ends_jobs = self._is_ephemeral
            self._ending = endings.Ending(self._host)
            # From here on a signal is obeyed, also in the midst of the start.
            with self._handled_signals():
                try:
                    await self._run()
                finally:
                    self._host.close()
        finally:
            self._folder.close()

    async def _run(self) -> None:
        host = self._host
        adopted = host.adopt()
        self._preflights = watchers.Preflights(host)
        self._preflights.hold_back()
        executor = orders.Orders(host, self._record)
        connection = link.Link(
            host, self._record, executor, self._config.addresses, tls_files=self._config.tls_files
        )
        self._server = servers.Server(
            [f"unix:{self._config.socket}"],
            drain=DRAIN,
            registry=metrics.Registry(),
            is_introspectable=True,
            listen_flag="--socket",
        )
        service = servicer.AgentServicer(
            host, executor, connection.status, self._shut_down, self._server.draining
        )
        self._server.add(agent_service_pb2_grpc.add_AgentServiceServicer_to_server, service, servicer.SERVICE)
        self._reloading = reloading.Reloading(
            host,
            lambda: configs.load(self._flags),
            on_begin=self._manager.reloading,
            on_end=lambda: self._manager.ready("the configuration was read again"),
        )

        def changed() -> None:
            service.changed()
            connection.poke()

        host.changed = changed
        host.problem_sources += [
            lambda: self._reloading.problem and f"configuration: {self._reloading.problem}",
            lambda: connection.problem and f"the allocator refuses this node: {connection.problem}",
            lambda: executor.problem and f"answers to orders are not on disk: {executor.problem}",
            lambda: self._record.problem and f"the node's record is not on disk: {self._record.problem}",
        ]
        await self._server.start()
        _log.info(
            "agent_started",
            node=self._config.node,
            pid=os.getpid(),
            socket=str(self._config.socket),
            pools=[pool.spec.name for pool in self._config.pools],
            adopted=len(adopted),
            limits=host.cgroups.kind.value,
            limits_detail=host.cgroups.detail,
        )
        async with tasks.BackgroundTasks() as background:
            background.start(host.run(), name="agent")
            background.start(self._preflights.run(), name="preflights")
            background.start(watchers.ask_depths(host), name="depths")
            background.start(connection.run(), name="link")
            background.start(self._reloading.run(), name="reloading")
            background.start(self._keep_house(executor), name="housekeeping")
            self._manager.ready(f"{len(adopted)} workers adopted")
            await self._until_told(background)
            await self._end(connection, background)

    async def _until_told(self, background: tasks.BackgroundTasks) -> None:
        told = asyncio.ensure_future(self._ending.begun.wait())
        failed = asyncio.ensure_future(background.failed.wait())
        try:
            await asyncio.wait((told, failed), return_when=asyncio.FIRST_COMPLETED)
        finally:
            told.cancel()
            failed.cancel()
        if background.failed.is_set():
            # Its workers are no less well for that: the next agent takes them over.
            self._ending.ask(endings.Stage.LEAVE, "a part of the agent failed")

    async def _end(self, connection: link.Link, background: tasks.BackgroundTasks) -> None:
        seconds = self._ending.seconds(self._ending.stage)
        self._manager.stopping(f"workers end within {seconds:.0f} s")
        self._server.set_serving(servicer.SERVICE, False)
        seeing_off = asyncio.ensure_future(self._ending.carry_out())
        failed = asyncio.ensure_future(background.failed.wait())
        try:
            await asyncio.wait((seeing_off, failed), return_when=asyncio.FIRST_COMPLETED)
            if seeing_off.done():
                seeing_off.result()
        finally:
            for task in (seeing_off, failed):
                task.cancel()
        if self._ending.stage is not endings.Stage.LEAVE:
            await connection.leave()
        await self._server.drain()
        _log.info("agent_ended", workers_left=self._host.alive_count())

    def _shut_down(self, mode: wire.ShutDownMode.ValueType) -> float:
        stage = _MODES.get(mode)
        if stage is None:
            raise errors.InvalidArgument(f"mode: there is no mode {mode}", field="mode")
        return self._ending.ask(stage, "it was ordered to")

    async def _keep_house(self, executor: orders.Orders) -> None:
        interval = agent.HOUSEKEEPING_SECONDS
        if self._manager.watchdog_seconds is not None:
            interval = min(interval, self._manager.watchdog_seconds / 2)
        while True:
            self._manager.alive()
            self._record.retry()
            executor.retry()
            await asyncio.sleep(interval)

    @contextlib.contextmanager
    def _handled_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        drain = endings.Stage.IMMEDIATE if self._is_ephemeral else endings.Stage.DRAIN
        ends = {
            signal.SIGTERM: drain,
            signal.SIGINT: endings.Stage.IMMEDIATE,
            signal.SIGUSR1: endings.Stage.LEAVE,
        }
        for number, stage in ends.items():
            loop.add_signal_handler(number, self._ending.escalate, stage, number.name)
        loop.add_signal_handler(signal.SIGHUP, self._hang_up)
        interrupts.unblock((*ends, signal.SIGHUP))
        try:
            yield
        finally:
            # To the end of the process they do nothing: a late one must not cut the last steps short.
            for each in (*ends, signal.SIGHUP):
                loop.remove_signal_handler(each)
                signal.signal(each, signal.SIG_IGN)

    def _hang_up(self) -> None:
        reload = getattr(self, "_reloading", None)
        if reload is not None:
            reload.ask()


def prepare_socket(path: pathlib.Path) -> None:
    """See that only this user can enter the socket's folder. Raises `FailedPrecondition` otherwise."""
    folder = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
    except OSError as error:
        raise errors.FailedPrecondition(
            f"--socket: {folder} cannot be made: {error.strerror}", field="--socket"
        ) from error
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise errors.FailedPrecondition(
            f"--socket: {folder} must be this user's alone, for whoever can enter it can give orders; "
            f"chmod 700 {folder}, or choose another folder",
            field="--socket",
        )


def run(flags: Mapping[str, str | None], *, is_ephemeral: bool = False) -> None:
    """Serve with settings from everywhere; returns when the agent has ended. Raises core errors."""
    config = configs.load(flags)
    writer = log_writer.LogWriter(sys.stderr)
    logs.configure(config.log_format, config.log_level, stream=_as_text(writer), service="agent")  # type: ignore[arg-type]
    try:
        memory.protect(lambda told: _log.debug("not_protected", message=told))
        asyncio.run(_Process(config, flags, is_ephemeral=is_ephemeral).serve())
    finally:
        writer.close()


def _as_text(writer: log_writer.LogWriter) -> Any:
    return writer
