"""What goes with every administrator's write, in its transaction: the kept answer and the audit record."""

from collections.abc import Mapping
from typing import Any

from leasehold.core import epoch as epochs
from leasehold.postgres import database, port, queries, rowmap, rules
from psycopg.types import json

_AUDIT = queries.load("audit.sql")
_REQUEST = queries.load("request.sql")


class Request:
    """One request that may be a repeat. An empty `request_id` never is."""

    def __init__(self, method: str, request_id: str, payload: Mapping[str, Any]) -> None:
        self._request_id = rules.checked_request_id(request_id)
        self._key = {"request_id": request_id, "method": method}
        self._payload_sha256 = rules.payload_sha256(payload)

    async def first_answer(self, cursor: database.Cursor) -> dict[str, Any] | None:
        """What the same request was answered before. Raises `InvalidArgument` if it asked something else."""
        if not self._request_id:
            return None
        await cursor.execute(_REQUEST["get_request"], self._key)
        row = await cursor.fetchone()
        if row is None:
            return None
        rules.refuse_other_payload(row["payload_sha256"], self._payload_sha256, self._request_id)
        answer: dict[str, Any] = row["answer"]
        return answer

    async def keep(self, cursor: database.Cursor, answer: Mapping[str, Any]) -> None:
        """Keep the answer for repeats."""
        if self._request_id:
            kept = {"payload_sha256": self._payload_sha256, "answer": json.Jsonb(answer)}
            await cursor.execute(_REQUEST["insert_request"], {**self._key, **kept})


async def note_change(
    cursor: database.Cursor,
    epoch: epochs.Epoch,
    *,
    method: str,
    target: str,
    actor: str,
    cause: str,
    before: Mapping[str, Any] | None,
    after: Mapping[str, Any] | None,
) -> None:
    """Write the audit record of a change."""
    await cursor.execute(
        _AUDIT["insert_audit"],
        {
            "method": method,
            "target": target,
            "actor": port.clean_text(actor),
            "cause": port.clean_text(cause),
            "before": None if before is None else json.Jsonb(before),
            "after": None if after is None else json.Jsonb(after),
            **rowmap.epoch_columns(epoch),
        },
    )
