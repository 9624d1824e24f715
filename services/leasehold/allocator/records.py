"""etcd's keys and values: lease records, in-force definitions, the epoch.

All keys stand below one prefix::

    PREFIX/leader                                the election's key
    PREFIX/epoch                                 the epoch in force; every write compares it
    PREFIX/unknown-past                          there while budgets must still be quarantined: what an earlier
                                                 etcd had granted is not known
    PREFIX/budgets/BUDGET                        in-force definition
    PREFIX/leases/BUDGET/HOLDER/INCARNATION      upper bound of what one incarnation may have

Values are JSON. Names cannot contain a slash, so keys split without escapes.
"""

import json
from dataclasses import dataclass
from typing import Any

from leasehold.core import errors
from leasehold.core.budget import aftermath as aftermaths
from leasehold.core.budget import codec, effects, model


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one installation."""

    prefix: str

    @property
    def epoch(self) -> str:
        """Holds the epoch in force."""
        return f"{self.prefix}/epoch"

    @property
    def unknown_past(self) -> str:
        """There while it is not known what was granted before, and not all is quarantined yet."""
        return f"{self.prefix}/unknown-past"

    @property
    def leader(self) -> str:
        """Held by the leader's etcd lease."""
        return f"{self.prefix}/leader"

    @property
    def budgets(self) -> str:
        """Prefix of the definitions."""
        return f"{self.prefix}/budgets/"

    @property
    def leases(self) -> str:
        """Prefix of the lease records."""
        return f"{self.prefix}/leases/"

    def budget(self, name: str) -> str:
        """Key of a definition."""
        return self.budgets + name

    def lease(self, key: tuple[str, str, str]) -> str:
        """Key of a record."""
        return self.leases + "/".join(key)

    def lease_parts(self, key: str) -> tuple[str, str, str] | None:
        """(budget, holder, incarnation) of a record's key; None for a key that is none."""
        parts = key.removeprefix(self.leases).split("/")
        if not key.startswith(self.leases) or len(parts) != 3:
            return None
        return parts[0], parts[1], parts[2]


def encode_record(record: effects.Record) -> bytes:
    """The value of a record."""
    value = {
        "lease_id": record.lease_id,
        "amounts": dict(record.amounts),
        "ttl_seconds": record.ttl_seconds,
        "is_cooling": record.is_cooling,
        "is_tracked": record.is_tracked,
        "is_superseded": record.is_superseded,
    }
    return json.dumps(value, separators=(",", ":")).encode()


def decode_record(keys: Keys, key: str, value: bytes) -> effects.Record:
    """The record under a key; raises `InvalidArgument` if key or value are none."""
    try:
        budget, holder, incarnation = key.removeprefix(keys.leases).split("/")
        fields = json.loads(value)
        return effects.Record(
            budget=budget,
            holder=holder,
            incarnation=incarnation,
            lease_id=int(fields["lease_id"]),
            amounts={str(name): int(amount) for name, amount in fields["amounts"].items()},
            ttl_seconds=float(fields["ttl_seconds"]),
            is_cooling=bool(fields["is_cooling"]),
            is_tracked=bool(fields["is_tracked"]),
            is_superseded=bool(fields.get("is_superseded", False)),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise errors.InvalidArgument(f"not a lease record: {key}", field="record") from error


def encode_definition(definition: effects.PutDefinition) -> bytes:
    """The value of a definition."""
    value = {
        "definition": codec.encode_budget(definition.spec),
        "version": definition.version,
        "is_retired": definition.is_retired,
        "aftermath": _encode_aftermath(definition.aftermath),
    }
    return json.dumps(value, separators=(",", ":")).encode()


def decode_definition(value: bytes) -> effects.PutDefinition:
    """The definition as it was put; raises `InvalidArgument`."""
    try:
        fields = json.loads(value)
        return effects.PutDefinition(
            codec.decode_budget(fields["definition"]),
            int(fields["version"]),
            bool(fields["is_retired"]),
            # An older allocator did not write it.
            _decode_aftermath(fields.get("aftermath") or {}),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise errors.InvalidArgument("not a budget's definition", field="definition") from error


def _encode_aftermath(aftermath: aftermaths.Aftermath) -> dict[str, Any]:
    encoded: dict[str, Any] = {}
    terms = aftermath.terms
    if terms is not None:
        encoded["terms"] = {
            "left_seconds": terms.until,
            "max_call_seconds": terms.max_call_seconds,
            "orphan_seconds": terms.orphan_seconds,
            "safe_ttl_seconds": terms.safe_ttl_seconds,
            "safe_classes": [
                [{"pattern": each.pattern, "micros": dict(each.safe_capacity)} for each in classes]
                for classes in terms.safe_classes
            ],
        }
    if aftermath.removed:
        encoded["removed"] = [
            {"name": each.name, "micros": each.amount, "left_seconds": each.until} for each in aftermath.removed
        ]
    return encoded


def _decode_aftermath(encoded: dict[str, Any]) -> aftermaths.Aftermath:
    terms = encoded.get("terms")
    removed = tuple(
        aftermaths.Removed(
            name=str(each["name"]), amount=int(each["micros"]), until=float(each["left_seconds"])
        )
        for each in encoded.get("removed", ())
    )
    if terms is None:
        return aftermaths.Aftermath(removed=removed)
    earlier = aftermaths.EarlierTerms(
        until=float(terms["left_seconds"]),
        max_call_seconds=float(terms["max_call_seconds"]),
        orphan_seconds=float(terms["orphan_seconds"]),
        safe_ttl_seconds=float(terms["safe_ttl_seconds"]),
        safe_classes=tuple(tuple(map(_decode_class, classes)) for classes in terms["safe_classes"]),
    )
    return aftermaths.Aftermath(terms=earlier, removed=removed)


def _decode_class(encoded: dict[str, Any]) -> model.HolderClass:
    safe = {str(name): int(micros) for name, micros in encoded["micros"].items()}
    return model.HolderClass(pattern=str(encoded["pattern"]), safe_capacity=safe)
