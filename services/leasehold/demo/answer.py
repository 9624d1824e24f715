"""An admitted request being answered, whole or as a stream of server-sent events."""

import asyncio
import json
import time
from collections.abc import Callable, Mapping

from leasehold.demo import chat, service_time
from starlette import responses, types

CHUNK_SECONDS = 0.2


class Answer(responses.Response):
    """Takes its time, answers, and ends the admission whatever happens.

    `settle` is called when the answer is done, just before its last bytes are sent: whoever has read them may
    rely on the slot being free. `abandon` is called at the end in any case; after `settle` it has nothing
    to do.
    """

    def __init__(
        self,
        wanted: chat.ChatRequest,
        *,
        completion_id: str,
        speed: service_time.ServiceTime,
        headers: Mapping[str, str],
        settle: Callable[[], None],
        abandon: Callable[[], None],
    ) -> None:
        kind = "text/event-stream; charset=utf-8" if wanted.is_stream else "application/json"
        self.status_code = 200
        self.background = None
        self._wanted = wanted
        self._completion_id = completion_id
        self._speed = speed
        self._settle = settle
        self._abandon = abandon
        self._created_seconds = int(time.time())
        self.init_headers({**headers, "content-type": kind, "cache-control": "no-cache"})

    def init_headers(self, headers: Mapping[str, str] | None = None) -> None:
        """Takes headers as they are; there is no length to tell before the answer is made."""
        self.raw_headers = [(k.encode("latin-1"), v.encode("latin-1")) for k, v in (headers or {}).items()]

    async def __call__(self, scope: types.Scope, receive: types.Receive, send: types.Send) -> None:
        """The ASGI application that is this answer."""
        gone = asyncio.create_task(_until_disconnect(receive))
        try:
            if self._wanted.is_stream:
                await self._send_stream(send, gone)
            else:
                await self._send_whole(send, gone)
        finally:
            self._abandon()
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)

    async def _send_whole(self, send: types.Send, gone: asyncio.Task[None]) -> None:
        if await _is_done_within(gone, self._speed.seconds(self._wanted.completion_tokens)):
            return
        answer = chat.completion(self._wanted, completion_id=self._completion_id, created=self._created_seconds)
        body = json.dumps(answer, separators=(",", ":")).encode()
        self._settle()
        await self._send_start(send, [(b"content-length", str(len(body)).encode())])
        await send({"type": "http.response.body", "body": body})

    async def _send_stream(self, send: types.Send, gone: asyncio.Task[None]) -> None:
        started_seconds = time.monotonic()
        await self._send_start(send, [])
        await self._send_part(send, self._chunk({"role": "assistant", "content": ""}))
        sent_tokens = 0
        for due_tokens in self._schedule():
            wait_seconds = started_seconds + self._speed.seconds(due_tokens) - time.monotonic()
            if await _is_done_within(gone, wait_seconds):
                return
            await self._send_part(send, self._chunk({"content": chat.text_of(due_tokens - sent_tokens)}))
            sent_tokens = due_tokens
        self._settle()
        await send({"type": "http.response.body", "body": self._last_chunks()})

    def _schedule(self) -> list[int]:
        """Tokens sent in all after each chunk; a chunk holds what is generated in `CHUNK_SECONDS`."""
        total = self._wanted.completion_tokens
        per_token = self._speed.seconds_per_token
        step = total if per_token * total <= CHUNK_SECONDS else max(1, round(CHUNK_SECONDS / per_token))
        return [*range(step, total, step), total] if total else []

    def _chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> bytes:
        return chat.chunk(
            self._wanted,
            completion_id=self._completion_id,
            created=self._created_seconds,
            delta=delta,
            finish_reason=finish_reason,
        )

    def _last_chunks(self) -> bytes:
        last = self._chunk({}, self._wanted.finish_reason)
        if self._wanted.includes_usage:
            last += chat.chunk(
                self._wanted,
                completion_id=self._completion_id,
                created=self._created_seconds,
                usage=chat.usage(self._wanted),
            )
        return last + chat.DONE

    async def _send_start(self, send: types.Send, headers: list[tuple[bytes, bytes]]) -> None:
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers + headers}
        )

    async def _send_part(self, send: types.Send, part: bytes) -> None:
        await send({"type": "http.response.body", "body": part, "more_body": True})


async def _until_disconnect(receive: types.Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _is_done_within(task: asyncio.Task[None], seconds: float) -> bool:
    await asyncio.wait({task}, timeout=max(0.0, seconds))
    return task.done()
