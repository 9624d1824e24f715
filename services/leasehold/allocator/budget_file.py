"""The YAML file of budgets: applied at start, again whenever it changes, keeping the last good one."""

import asyncio
import hashlib
import pathlib

from leasehold.allocator import leadership
from leasehold.core import errors
from leasehold.core.budget import model
from leasehold.observe import logs
from leasehold.runtime import budgets_yaml

#: A file that changed is applied once it was found the same twice: it may be in the midst of being written.
POLL_SECONDS = 0.25

_log = logs.get_logger(__name__)


def read(path: pathlib.Path) -> tuple[model.BudgetSpec, ...]:
    """The budgets of the file at `path`. Raises `InvalidArgument`."""
    return _parse(_text(path))


def _parse(text: str) -> tuple[model.BudgetSpec, ...]:
    try:
        return budgets_yaml.parse(text)
    except RecursionError:
        raise errors.InvalidArgument("budgets: nested too deeply", field="budgets") from None


def _text(path: pathlib.Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise errors.InvalidArgument(f"{path}: {error.strerror}", field="budgets_file") from error
    if len(data) > budgets_yaml.TEXT_BYTES_MAX:
        raise errors.InvalidArgument(f"{path}: is larger than 4 MiB", field="budgets_file")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise errors.InvalidArgument(f"{path}: is not UTF-8", field="budgets_file") from error


class BudgetFile:
    """Follows one file. Only the leader writes; a budget that leaves the file stays in force."""

    def __init__(self, path: pathlib.Path, leader: leadership.Leadership) -> None:
        self._path = path
        self._leader = leader
        #: What was found last: a digest of the content, or why it cannot be read.
        self._found = ""
        #: What was dealt with last, applied or refused.
        self._settled = ""

    async def run(self) -> None:
        """Apply the file in each reign, and when its content changes."""
        applied_in: object = None
        while True:
            await self._leader.administration.is_synchronized.wait()
            if self._leader.reign is not applied_in:
                applied_in, self._settled = self._leader.reign, ""
            try:
                await self._apply_if_new()
            except errors.InvalidArgument as error:
                _log.error(
                    "budgets_file_refused",
                    path=str(self._path),
                    error=error.message,
                    in_force="the last good one",
                )
            except errors.LeaseholdError as error:
                self._settled = ""
                _log.warning("budgets_file_waits", path=str(self._path), why=error.message)
            await asyncio.sleep(POLL_SECONDS)

    async def _apply_if_new(self) -> None:
        """Apply the file if it is new and at rest. Raises `InvalidArgument`, once for each wrong content."""
        unreadable: errors.InvalidArgument | None = None
        text = ""
        try:
            text = await asyncio.to_thread(_text, self._path)
            found = hashlib.sha256(text.encode()).hexdigest()
        except errors.InvalidArgument as error:
            found, unreadable = error.message, error
        before, self._found = self._found, found
        if found != before or found == self._settled:
            return
        self._settled = found
        if unreadable is not None:
            raise unreadable
        # In a thread: a large file takes seconds to parse.
        await self._apply(await asyncio.to_thread(_parse, text))

    async def _apply(self, specs: tuple[model.BudgetSpec, ...]) -> None:
        core = self._leader.require().core
        for spec in specs:
            # All are looked at before the first is changed.
            core.check_definition(spec)
        for spec in specs:
            await self._leader.administration.put_budget(spec, actor="budgets file", cause=str(self._path))
        _log.info("budgets_file_applied", path=str(self._path), budgets=len(specs))
