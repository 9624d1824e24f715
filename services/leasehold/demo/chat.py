"""The OpenAI chat-completions shape: requests in, answers, chunks and errors out. No limits, no time.

Ordinary requests are taken as they are: prompt tokens are estimated as characters / 4. A replayed request
states its lengths in `metadata` instead (`prompt_tokens`, `completion_tokens`, decimal text as the API's
metadata values are), so that no prompt of thousands of words need travel.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from leasehold.core import errors

CHARACTERS_PER_TOKEN = 4
COMPLETION_TOKENS_DEFAULT = 64
MAX_TOKENS_DEFAULT = 1024
TOKENS_MAX = 10_000_000
_WORD = "word "


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """What the server needs to know of a chat-completions request."""

    model: str
    prompt_tokens: int
    #: Upper bound of the answer, as the client states it.
    max_tokens: int
    #: What this simulated model will generate: at most `max_tokens`.
    completion_tokens: int
    is_stream: bool
    includes_usage: bool

    @property
    def reserved_tokens(self) -> int:
        """What counts under the token limit until the answer is done."""
        return self.prompt_tokens + self.max_tokens

    @property
    def total_tokens(self) -> int:
        """What counts afterwards."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def finish_reason(self) -> str:
        """`length` if the bound cut the answer short, else `stop`."""
        return "length" if self.completion_tokens == self.max_tokens else "stop"


def parse(body: bytes) -> ChatRequest:
    """The request in `body`; raises `InvalidArgument`, naming the field, if it is not one."""
    try:
        fields = json.loads(body)
    except ValueError as error:
        raise errors.InvalidArgument("the body is not JSON", field="body") from error
    if not isinstance(fields, dict):
        raise errors.InvalidArgument("the body is not a JSON object", field="body")
    model = fields.get("model")
    if not isinstance(model, str) or not model:
        raise errors.InvalidArgument("model: a name is required", field="model")
    metadata = fields.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise errors.InvalidArgument("metadata: is not an object", field="metadata")
    max_tokens = _max_tokens(fields)
    stated = _stated_tokens(metadata, "completion_tokens")
    return ChatRequest(
        model=model,
        prompt_tokens=_prompt_tokens(fields.get("messages"), metadata),
        max_tokens=max_tokens,
        completion_tokens=min(max_tokens, COMPLETION_TOKENS_DEFAULT if stated is None else stated),
        is_stream=_flag(fields, "stream"),
        includes_usage=_includes_usage(fields),
    )


def _max_tokens(fields: Mapping[str, Any]) -> int:
    for name in ("max_completion_tokens", "max_tokens"):
        value = fields.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= TOKENS_MAX:
            raise errors.InvalidArgument(f"{name}: is not a whole number of 1 to {TOKENS_MAX}", field=name)
        return value
    return MAX_TOKENS_DEFAULT


def _stated_tokens(metadata: Mapping[str, Any], name: str) -> int | None:
    value = metadata.get(name)
    if value is None:
        return None
    is_number = isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 8
    if not is_number or int(value) > TOKENS_MAX:
        field = f"metadata.{name}"
        raise errors.InvalidArgument(f"{field}: is not a whole number of 0 to {TOKENS_MAX}", field=field)
    return int(value)


def _prompt_tokens(messages: Any, metadata: Mapping[str, Any]) -> int:
    if not isinstance(messages, list) or not messages:
        raise errors.InvalidArgument("messages: at least one is required", field="messages")
    characters = 0
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            field = f"messages.{number}"
            raise errors.InvalidArgument(f"{field}: is not an object with a role", field=field)
        characters += _characters(message.get("content"), f"messages.{number}.content")
    stated = _stated_tokens(metadata, "prompt_tokens")
    return -(-characters // CHARACTERS_PER_TOKEN) if stated is None else stated


def _characters(content: Any, field: str) -> int:
    if content is None:
        return 0
    if isinstance(content, str):
        return len(content)
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        return sum(len(part["text"]) for part in content if isinstance(part.get("text"), str))
    raise errors.InvalidArgument(f"{field}: is neither text nor a list of parts", field=field)


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name) or False
    if not isinstance(value, bool):
        raise errors.InvalidArgument(f"{name}: is neither true nor false", field=name)
    return value


def _includes_usage(fields: Mapping[str, Any]) -> bool:
    options = fields.get("stream_options") or {}
    if not isinstance(options, dict):
        raise errors.InvalidArgument("stream_options: is not an object", field="stream_options")
    return _flag(options, "include_usage")


def text_of(tokens: int) -> str:
    """Some text of `tokens` tokens."""
    return _WORD * tokens


def usage(request: ChatRequest) -> dict[str, int]:
    """The `usage` object of a finished request."""
    return {
        "prompt_tokens": request.prompt_tokens,
        "completion_tokens": request.completion_tokens,
        "total_tokens": request.total_tokens,
    }


def completion(request: ChatRequest, *, completion_id: str, created: int) -> dict[str, Any]:
    """The whole answer of a request that does not stream; `created` in seconds since 1970."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text_of(request.completion_tokens), "refusal": None},
        "logprobs": None,
        "finish_reason": request.finish_reason,
    }
    return {
        "id": completion_id,
        "object": "chat.completion",
        "created": created,
        "model": request.model,
        "choices": [choice],
        "usage": usage(request),
    }


def chunk(
    request: ChatRequest,
    *,
    completion_id: str,
    created: int,
    delta: Mapping[str, str] | None = None,
    finish_reason: str | None = None,
    usage: Mapping[str, int] | None = None,
) -> bytes:
    """One server-sent event of a stream: a delta, or without one the closing chunk that carries the usage."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    body: dict[str, Any] = {
        "id": completion_id,
        "object": "chat.completion.chunk",
        "created": created,
        "model": request.model,
        "choices": [] if delta is None else [choice],
    }
    if usage is not None:
        body["usage"] = usage
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


def error(message: str, *, kind: str, code: str | None, param: str | None = None) -> dict[str, Any]:
    """The body of an answer that is an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
