"""The YAML file of budgets: applied at start, again whenever it changes, keeping the last good one."""

import asyncio
import hashlib
import pathlib

from leasehold.allocator import leadership
from leasehold.core import errors
from leasehold.core.budget import model
from leasehold.observe import logs
from leasehold.runtime import budgets_yaml

POLL_SECONDS = 1.0

_log = logs.get_logger(__name__)


def read(path: pathlib.Path) -> tuple[model.BudgetSpec, ...]:
    """The budgets of the file at `path`. Raises `InvalidArgument`."""
    return budgets_yaml.parse(_text(path))


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
        self._seen = ""

    async def run(self) -> None:
        """Apply the file in each reign, and when its content changes."""
        applied_in: object = None
        while True:
            await self._leader.is_synchronized.wait()
            if self._leader.reign is not applied_in:
                self._seen = ""
            try:
                applied_in = self._leader.reign
                await self._apply_if_new()
            except (errors.Unavailable, errors.StaleEpoch) as error:
                self._seen = ""
                _log.warning("budgets_file_waits", path=str(self._path), why=error.message)
            await asyncio.sleep(POLL_SECONDS)

    async def _apply_if_new(self) -> None:
        try:
            text = await asyncio.to_thread(_text, self._path)
            digest = hashlib.sha256(text.encode()).hexdigest()
            if digest == self._seen:
                return
            specs = budgets_yaml.parse(text)
        except errors.InvalidArgument as error:
            if error.message != self._seen:
                _log.error(
                    "budgets_file_refused",
                    path=str(self._path),
                    error=error.message,
                    in_force="the last good one",
                )
            self._seen = error.message
            return
        self._seen = digest
        for spec in specs:
            try:
                await self._leader.put_budget(spec, actor="budgets file", cause=str(self._path))
            except errors.InvalidArgument as error:
                _log.error("budget_refused", budget=spec.name, error=error.message)
        _log.info("budgets_file_applied", path=str(self._path), budgets=len(specs))
