"""The YAML file of roles: in force from the start, again whenever it changes, keeping the last good one."""

import asyncio
import pathlib
from typing import NoReturn

from leasehold.core import access, errors
from leasehold.observe import logs
from leasehold.rpc import access as rpc_access
from leasehold.runtime import roles_yaml

POLL_SECONDS = 1.0

_log = logs.get_logger(__name__)


class RolesFile:
    """Follows one file for a guard. Calls that are under way go on as they began."""

    def __init__(self, path: pathlib.Path, guard: rpc_access.Guard) -> None:
        self._path = path
        self._guard = guard
        #: What was found last: roles, or why there are none.
        self._found: access.Roles | str = guard.roles

    async def run(self) -> NoReturn:
        """Look at the file until cancelled."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            await self.look()

    async def look(self) -> None:
        """Put the file in force if it is another, and was found the same twice; tell once if it is wrong."""
        before, found = self._found, await asyncio.to_thread(self._read)
        self._found = found
        if found != before or found == self._guard.roles:
            return
        if isinstance(found, access.Roles):
            self._guard.roles = found
            _log.info("roles_file_applied", path=str(self._path), rules=len(found.rules))

    def _read(self) -> access.Roles | str:
        try:
            return roles_yaml.read(self._path)
        except errors.InvalidArgument as error:
            if self._found != error.message:
                _log.error(
                    "roles_file_refused",
                    path=str(self._path),
                    error=error.message,
                    in_force="the last good one",
                )
            return error.message
