"""Rules that both stores hold to: bounds of arguments, repeats of requests, and the words of refusals."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from leasehold.core import epoch as epochs
from leasehold.core import errors
from leasehold.core.budget import codec, model
from leasehold.core.node import registry_model
from leasehold.postgres import port

PUT_BUDGET = "PutBudget"
DELETE_BUDGET = "DeleteBudget"
REGISTER_NODE = "RegisterNode"
DELETE_NODE = "DeleteNode"

_ID_MAX = 2**63 - 1


def checked_page_size(page_size: int) -> int:
    """`page_size` if it is 1 to 1000, else raises `InvalidArgument`."""
    if not 1 <= page_size <= port.PAGE_SIZE_MAX:
        raise errors.InvalidArgument(
            f"page_size: {page_size} is not in 1 to {port.PAGE_SIZE_MAX}", field="page_size"
        )
    return page_size


def checked_request_id(request_id: str) -> str:
    """`request_id` if it is empty or 1 to 64 printable ASCII characters, else raises `InvalidArgument`."""
    is_printable = request_id.isascii() and request_id.isprintable()
    if len(request_id) > port.REQUEST_ID_LENGTH_MAX or not is_printable:
        raise errors.InvalidArgument(
            f"request_id: at most {port.REQUEST_ID_LENGTH_MAX} printable ASCII characters",
            field="request_id",
        )
    return request_id


def checked_age(age_seconds: float) -> float:
    """`age_seconds` if it is finite and not negative, else raises `InvalidArgument`."""
    if not math.isfinite(age_seconds) or age_seconds < 0:
        raise errors.InvalidArgument(f"age_seconds: {age_seconds:g} is no age", field="age_seconds")
    return age_seconds


def checked_ledger_batch(entries: Sequence[port.LedgerEntry], batch: int) -> None:
    """Raise `InvalidArgument` if a batch is too long or its number is negative."""
    if len(entries) > port.LEDGER_BATCH_ENTRIES_MAX:
        raise errors.InvalidArgument(
            f"entries: {len(entries)} given, at most {port.LEDGER_BATCH_ENTRIES_MAX} are allowed",
            field="entries",
        )
    if not 0 <= batch <= _ID_MAX:
        raise errors.InvalidArgument(f"batch: {batch} is not in 0 to 2**63 - 1", field="batch")


def checked_before_id(before_id: int | None) -> int:
    """The id below which a page begins; None: above all. Raises `InvalidArgument` if it can be no id."""
    if before_id is None:
        return _ID_MAX
    if not 0 <= before_id <= _ID_MAX:
        raise errors.InvalidArgument(f"before_id: {before_id} is not in 0 to 2**63 - 1", field="before_id")
    return before_id


def encode_cluster_id(etcd_cluster_id: int) -> str:
    """As etcd's tools print it, in 16 hexadecimal digits. Raises `InvalidArgument` beyond 64 bits."""
    if not 0 <= etcd_cluster_id < 2**64:
        raise errors.InvalidArgument("etcd_cluster_id: is not in 0 to 2**64 - 1", field="etcd_cluster_id")
    return f"{etcd_cluster_id:016x}"


def foreign_etcd_cluster(claimed: str, accepted: str) -> errors.ForeignEtcdCluster:
    """Refusal of an etcd cluster that Postgres does not know."""
    return errors.ForeignEtcdCluster(
        f"etcd cluster {claimed} is not {accepted}, whose epochs Postgres knows: "
        "if etcd was replaced or wiped on purpose, start once with --accept-new-etcd",
        metadata={"etcd_cluster_id": claimed, "accepted_etcd_cluster_id": accepted},
    )


def blank_etcd_cluster(claimed: str, fence: epochs.Epoch) -> errors.ForeignEtcdCluster:
    """Refusal of an etcd cluster whose id is known, but which has lost the epochs that Postgres knows."""
    return errors.ForeignEtcdCluster(
        f"etcd cluster {claimed} has lost the epoch {fence.encode()} that Postgres knows: its data was wiped "
        "or restored; if that was on purpose, start once with --accept-new-etcd",
        metadata={"etcd_cluster_id": claimed, "fence": fence.encode()},
    )


def stale_epoch(epoch: epochs.Epoch, fence: epochs.Epoch) -> errors.StaleEpoch:
    """Refusal of a write by a leader whose successor has taken the fence."""
    return errors.StaleEpoch(
        f"epoch {epoch.encode()} was overtaken by {fence.encode()}: another leader writes to Postgres",
        metadata={"epoch": epoch.encode(), "fence": fence.encode()},
    )


def no_such_budget(name: str) -> errors.NotFound:
    """There is no budget of that name."""
    return errors.NotFound(f"there is no budget {name}", metadata={"budget": name})


def no_such_node(name: str) -> errors.NotFound:
    """There is no node of that name."""
    return errors.NotFound(f"there is no node {name}", field="node", metadata={"node": name})


def checked_node_writes(nodes: Sequence[port.NodeWrite]) -> Sequence[port.NodeWrite]:
    """`nodes` if they are not too many for one transaction, else raises `InvalidArgument`."""
    if len(nodes) > port.NODE_WRITES_MAX:
        raise errors.InvalidArgument(
            f"nodes: {len(nodes)} given, at most {port.NODE_WRITES_MAX} are allowed", field="nodes"
        )
    return nodes


def checked_audit_entries(entries: Sequence[port.AuditEntry]) -> Sequence[port.AuditEntry]:
    """`entries` if they are not too many for one transaction, else raises `InvalidArgument`."""
    if len(entries) > port.AUDIT_ENTRIES_MAX:
        raise errors.InvalidArgument(
            f"entries: {len(entries)} given, at most {port.AUDIT_ENTRIES_MAX} are allowed", field="entries"
        )
    for entry in entries:
        if not entry.entry_id:
            raise errors.InvalidArgument("entry_id: an entry needs one of its own", field="entry_id")
        checked_request_id(entry.entry_id)
    return entries


def audited_node(record: registry_model.NodeRecord) -> dict[str, Any]:
    """A node as the audit log keeps it: what its agent registered. Its state is no change by anybody."""
    registration = record.registration
    return {
        "node_id": registration.node_id,
        "incarnation": registration.incarnation,
        "boot_id": registration.boot_id,
        "cpus": registration.cpus,
        "memory_bytes": registration.memory_bytes,
        "labels": dict(registration.labels),
    }


def node_change(
    before: registry_model.NodeRecord | None, after: registry_model.NodeRecord
) -> tuple[dict[str, Any] | None, dict[str, Any]] | None:
    """What the audit log is told of a write: before and after. None: only the state has moved."""
    known = None if before is None else audited_node(before)
    told = audited_node(after)
    return None if known == told else (known, told)


def refuse_other_version(name: str, expected_version: int, version: int) -> None:
    """Raise `VersionConflict` unless `expected_version` is 0 or `version` (0: there is no such budget)."""
    if expected_version not in (0, version):
        present = f"is at version {version}" if version else "does not exist"
        raise errors.VersionConflict(
            f"budget {name} {present}, not at version {expected_version}",
            metadata={"version": str(version)},
        )


def put_payload(spec: model.BudgetSpec, expected_version: int) -> dict[str, Any]:
    """What `put_budget` asks for."""
    return {"definition": codec.encode_budget(spec), "expected_version": expected_version}


def delete_payload(name: str) -> dict[str, Any]:
    """What `delete_budget` asks for."""
    return {"name": name}


def payload_sha256(payload: Mapping[str, Any]) -> bytes:
    """Digest of what a request asks for. Actor and cause are left out: a retry may come by another way."""
    return hashlib.sha256(json.dumps(payload, sort_keys=True, separators=(",", ":")).encode()).digest()


def refuse_other_payload(kept_sha256: bytes, asked_sha256: bytes, request_id: str) -> None:
    """Raise `InvalidArgument` if a request id comes again with something else."""
    if kept_sha256 != asked_sha256:
        raise errors.InvalidArgument(
            f"request_id: {request_id} was used for another request; take a new one", field="request_id"
        )


def encode_stored_budget(stored: port.StoredBudget) -> dict[str, Any]:
    """An answer as it is kept for repeats."""
    return {
        "definition": codec.encode_budget(stored.spec),
        "version": stored.version,
        "update_time": stored.update_time.isoformat(),
    }


def decode_stored_budget(answer: Mapping[str, Any]) -> port.StoredBudget:
    """Inverse of `encode_stored_budget`."""
    return port.StoredBudget(
        spec=codec.decode_budget(answer["definition"]),
        version=answer["version"],
        update_time=datetime.fromisoformat(answer["update_time"]),
    )
