"""Reads the configuration again on SIGHUP, and when a file of it changes, keeping the last good one."""

import asyncio
import pathlib
from collections.abc import Callable
from typing import Final

from leasehold.core import errors
from leasehold.nodeagent import agent as agents
from leasehold.nodeagent import config as configs
from leasehold.observe import logs

LOOK_SECONDS: Final = 1.0

#: What a running agent cannot change.
_FIXED: Final = ("node", "state_dir", "socket", "addresses", "tls_files", "workers_cgroup")

_Marks = tuple[tuple[int, int, int] | None, ...]
_log = logs.get_logger(__name__)


class Reloading:
    """Follows the files of one agent's configuration."""

    def __init__(
        self,
        host: agents.Agent,
        load: Callable[[], configs.Config],
        *,
        on_begin: Callable[[], None] = lambda: None,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self._host = host
        self._load = load
        self._on_begin = on_begin
        self._on_end = on_end
        self._marks = _marks(host.config.files)
        self._is_asked = asyncio.Event()
        #: Why the newest files are not in force; empty: they are.
        self.problem = ""

    def ask(self) -> None:
        """Read again, changed or not."""
        self._is_asked.set()

    async def run(self) -> None:
        """Follow until cancelled."""
        while True:
            try:
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._is_asked.wait()
            except TimeoutError:
                pass
            found = _marks(self._host.config.files)
            if self._is_asked.is_set() or found != self._marks:
                is_asked = self._is_asked.is_set()
                self._is_asked.clear()
                # A file that is being written is read when it is at rest.
                if not is_asked:
                    await asyncio.sleep(LOOK_SECONDS / 4)
                    if _marks(self._host.config.files) != found:
                        continue
                self._marks = found
                self._on_begin()
                try:
                    await self._reload()
                finally:
                    self._on_end()

    async def _reload(self) -> None:
        try:
            # In a thread: a large file takes a while to parse, and workers must be watched meanwhile.
            config = await asyncio.to_thread(self._load)
            fixed = [name for name in _FIXED if getattr(config, name) != getattr(self._host.config, name)]
            self._host.reconfigure(configs.with_fixed(config, self._host.config))
        except errors.LeaseholdError as error:
            if error.message != self.problem:
                _log.error("configuration_refused", message=error.message, in_force="the last good one")
            self.problem = error.message
        else:
            self._marks = _marks(config.files)
            self.problem = ""
            if fixed:
                self.problem = f"changed, but only a restart takes it over: {', '.join(fixed)}"
                _log.warning("configuration_needs_restart", settings=fixed)
            _log.info("configuration_reloaded", pools=[pool.spec.name for pool in config.pools])
        self._host.changed()


def _marks(files: tuple[pathlib.Path, ...]) -> _Marks:
    """What tells one content of each file from another; None where there is no file."""
    found: list[tuple[int, int, int] | None] = []
    for path in files:
        try:
            status = path.stat()
        except OSError:
            found.append(None)
        else:
            found.append((status.st_ino, status.st_mtime_ns, status.st_size))
    return tuple(found)
