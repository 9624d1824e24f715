"""What survives a restart of the agent: who decides about each pool, and whether the node drains."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from leasehold.core import errors
from leasehold.core.node import model

VERSION: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedMode:
    """One pool's."""

    mode: model.PoolMode
    #: Of MANUAL, and the number that PAUSED keeps.
    workers: int | None = None
    #: Until MANUAL ends, counted from `SavedModes.at_seconds`; None: never.
    hold_remaining_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedModes:
    """All pools whose mode is not that of the configuration."""

    pools: Mapping[str, SavedMode] = field(default_factory=lambda: MappingProxyType({}))
    #: The agent's monotonic clock when it was saved. A boot begins it anew; time spent off does not count.
    at_seconds: float = 0.0
    #: Of which boot that clock is; empty: not known.
    boot_id: str = ""
    #: By a person's order.
    is_draining: bool = False

    def elapsed_seconds(self, now: float, boot_id: str) -> float:
        """How long ago it was saved, as far as that counts."""
        is_other_boot = bool(self.boot_id) and self.boot_id != boot_id
        return 0.0 if is_other_boot else max(0.0, now - self.at_seconds)

    def encode(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "version": VERSION,
            "at_seconds": self.at_seconds,
            "boot_id": self.boot_id,
            "is_draining": self.is_draining,
            "pools": {
                name: {
                    "mode": saved.mode.value,
                    "workers": saved.workers,
                    "hold_remaining_seconds": saved.hold_remaining_seconds,
                }
                for name, saved in self.pools.items()
            },
        }

    @classmethod
    def decode(cls, document: Any) -> "SavedModes":
        """Inverse of `encode`; raises `InvalidArgument` on anything else."""
        try:
            if document["version"] != VERSION:
                raise errors.InvalidArgument(f"modes of version {document['version']!r}", field="version")
            return cls(
                pools={
                    model.checked_pool_name(name): _decode_mode(saved)
                    for name, saved in document["pools"].items()
                },
                at_seconds=_number(document["at_seconds"]),
                boot_id=str(document.get("boot_id", "")),
                is_draining=document.get("is_draining", False) is True,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise errors.InvalidArgument(f"not a record of modes: {error!r}", field="modes") from error


def _decode_mode(saved: Any) -> SavedMode:
    workers, hold = saved["workers"], saved["hold_remaining_seconds"]
    if workers is not None and not 0 <= int(workers) <= model.WORKERS_MAX:
        raise ValueError(f"{workers} workers")
    return SavedMode(
        mode=model.PoolMode(saved["mode"]),
        workers=None if workers is None else int(workers),
        hold_remaining_seconds=None if hold is None else _number(hold),
    )


def _number(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{number} is not finite")
    return number
