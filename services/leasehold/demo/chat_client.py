"""The little of an LLM client that a replay needs: one chat completion, whole or streamed."""

import json
from types import TracebackType
from typing import Any, Self

import httpx
from leasehold.core import errors

CONNECT_SECONDS = 5.0
MODEL = "simulated"


class ChatClient:
    """Connections to one provider. Use it as an async context manager."""

    def __init__(self, base_url: str, *, worker_id: str) -> None:
        self._http = httpx.AsyncClient(
            base_url=base_url,
            headers={"x-worker-id": worker_id},
            # How long a call may take is its caller's to say; how many there may be, the budget's.
            timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
            trust_env=False,
        )

    async def __aenter__(self) -> Self:
        await self._http.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.__aexit__(kind, error, trace)

    async def complete(
        self, *, prompt_tokens: int, completion_tokens: int, max_tokens: int, is_stream: bool, request_id: str
    ) -> int:
        """Total tokens of the answer once it has been read to its end.

        Raises `ResourceExhausted`, with the time to wait, on a 429, and `Unavailable` on anything else that is
        not an answer.
        """
        body: dict[str, Any] = {
            "model": MODEL,
            "messages": [{"role": "user", "content": "replayed"}],
            "max_tokens": max_tokens,
            "metadata": {"prompt_tokens": str(prompt_tokens), "completion_tokens": str(completion_tokens)},
        }
        if is_stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        headers = {"x-request-id": request_id}
        try:
            async with self._http.stream("POST", "chat/completions", json=body, headers=headers) as response:
                if response.status_code != 200:
                    await response.aread()
                    raise _refusal(response)
                usage = await (_streamed_usage(response) if is_stream else _whole_usage(response))
                return int(usage["total_tokens"])
        except (httpx.HTTPError, KeyError, TypeError, ValueError) as error:
            raise errors.Unavailable(f"{type(error).__name__}: {error}") from error


def _refusal(response: httpx.Response) -> errors.LeaseholdError:
    message = f"{response.status_code}: {response.text[:300]}"
    if response.status_code == 429:
        millis = response.headers.get("retry-after-ms", "1000")
        return errors.ResourceExhausted(message, retry_after_seconds=int(millis) / 1000)
    return errors.Unavailable(message)


async def _whole_usage(response: httpx.Response) -> dict[str, Any]:
    usage: dict[str, Any] = json.loads(await response.aread())["usage"]
    return usage


async def _streamed_usage(response: httpx.Response) -> dict[str, Any]:
    usage: dict[str, Any] | None = None
    async for line in response.aiter_lines():
        data = line.removeprefix("data: ")
        if data and data != "[DONE]":
            usage = json.loads(data).get("usage") or usage
    if usage is None:
        raise ValueError("the stream ended without its usage")
    return usage
