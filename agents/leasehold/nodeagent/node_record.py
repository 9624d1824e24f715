"""What a host's agent is to the allocator, kept from one agent to the next: id, incarnation, highest epoch."""

import uuid
from typing import Any

from leasehold.core import epoch as epochs
from leasehold.core import errors
from leasehold.nodeagent import state
from leasehold.observe import logs

_NAME = "node"
_log = logs.get_logger(__name__)


class NodeRecord:
    """``node.json``. A record that cannot be written is told, and what it would have said holds in memory."""

    def __init__(self, folder: state.StateFolder) -> None:
        self._folder = folder
        self.node_id = ""
        self.incarnation = 0
        self.epoch: epochs.Epoch | None = None
        #: Why it is not on disk; empty: it is.
        self.problem = ""

    def begin(self) -> None:
        """Take the record over, or make one, and begin a new incarnation."""
        record = self._folder.read(_NAME) or {}
        try:
            self.node_id = str(record["node_id"])
            self.incarnation = int(record["incarnation"])
            text = record.get("epoch")
            self.epoch = epochs.Epoch.decode(text) if isinstance(text, str) else None
        except (KeyError, TypeError, ValueError, OverflowError, errors.InvalidArgument):
            # Another id is another node: the registry gives the name to it once the former one is not heard.
            self.node_id, self.incarnation, self.epoch = str(uuid.uuid4()), 0, None
        self.incarnation += 1
        self._write()

    def check_epoch(self, epoch: epochs.Epoch) -> None:
        """Take note of a leader's epoch. Raises `StaleEpoch` if a higher one was seen."""
        known = self.epoch
        if known is not None and epoch[:2] < known[:2]:
            raise errors.StaleEpoch(
                f"epoch {epoch.encode()} is over: this host has seen {known.encode()}",
                metadata={"epoch": epoch.encode(), "highest_epoch": known.encode()},
            )
        if epoch != known:
            self.epoch = epoch
            self._write()

    def supersede(self, incarnation: int) -> None:
        """The registry knows a higher incarnation than this one: an older copy of the folder came back."""
        if incarnation >= self.incarnation:
            self.incarnation = incarnation + 1
            self._write()

    def retry(self) -> None:
        """Write what could not be written."""
        if self.problem:
            self._write()

    def _write(self) -> None:
        record: dict[str, Any] = {"node_id": self.node_id, "incarnation": self.incarnation}
        if self.epoch is not None:
            record["epoch"] = self.epoch.encode()
        try:
            self._folder.write(_NAME, record)
        except errors.LeaseholdError as error:
            if not self.problem:
                _log.error("node_record_not_written", message=error.message)
            self.problem = error.message
        else:
            self.problem = ""
