"""The chat-completions shape: what is taken, what is refused, and what is answered."""

import json
from typing import Any

import pytest
from leasehold.core import errors
from leasehold.demo import chat

MESSAGES = [{"role": "user", "content": "word" * 10}]


def parse(**fields: Any) -> chat.ChatRequest:
    return chat.parse(json.dumps({"model": "m", "messages": MESSAGES, **fields}).encode())


def test_ordinary_request_is_estimated_from_its_text() -> None:
    parts = [{"type": "text", "text": "x" * 9}, {"type": "image_url", "image_url": {"url": "u"}}]
    request = parse(messages=[{"role": "system", "content": "y" * 4}, {"role": "user", "content": parts}])

    assert request.prompt_tokens == 4
    assert request.max_tokens == chat.MAX_TOKENS_DEFAULT
    assert request.reserved_tokens == 4 + chat.MAX_TOKENS_DEFAULT
    assert request.completion_tokens == chat.COMPLETION_TOKENS_DEFAULT
    assert (request.is_stream, request.includes_usage, request.finish_reason) == (False, False, "stop")


def test_metadata_states_lengths_and_the_bound_cuts_the_answer() -> None:
    request = parse(metadata={"prompt_tokens": "1200", "completion_tokens": "300"}, max_tokens=100)

    assert (request.prompt_tokens, request.completion_tokens, request.total_tokens) == (1200, 100, 1300)
    assert request.finish_reason == "length"


def test_newer_name_of_the_bound_wins() -> None:
    assert parse(max_tokens=5, max_completion_tokens=7).max_tokens == 7


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"model": ""}, "model"),
        ({"model": 3}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": ["hello"]}, "messages.0"),
        ({"messages": [{"content": "x"}]}, "messages.0"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens"),
        ({"metadata": "x"}, "metadata"),
        ({"metadata": {"prompt_tokens": 12}}, "metadata.prompt_tokens"),
        ({"metadata": {"completion_tokens": "-1"}}, "metadata.completion_tokens"),
        ({"metadata": {"completion_tokens": "99999999"}}, "metadata.completion_tokens"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": "all"}, "stream_options"),
        ({"stream_options": {"include_usage": 1}}, "include_usage"),
    ],
)
def test_wrong_field_is_refused_by_name(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(errors.InvalidArgument) as refused:
        parse(**fields)
    assert refused.value.field == field


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff"])
def test_body_that_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(errors.InvalidArgument) as refused:
        chat.parse(body)
    assert refused.value.field == "body"


def test_completion_carries_text_of_its_tokens_and_the_usage() -> None:
    request = parse(metadata={"prompt_tokens": "3", "completion_tokens": "2"})

    answer = chat.completion(request, completion_id="c1", created=5)

    assert answer["choices"][0]["message"]["content"].split() == ["word", "word"]
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
