"""The demo's provider as a process of its own, over real HTTP, judged by its log."""

import asyncio
import json
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest
from leasehold.sim import auditor

DEADLINE_SECONDS = 20.0


class RunningProvider:
    """A provider process and its log."""

    def __init__(self, folder: pathlib.Path, *arguments: str) -> None:
        self.log_path = folder / "provider.jsonl"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "leasehold.demo.provider", "--log", str(self.log_path), *arguments],
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().strip()
        assert self.url, "the provider did not start"

    def events(self, kind: str) -> list[dict[str, Any]]:
        events = [json.loads(line) for line in self.log_path.read_text().splitlines()]
        return [event for event in events if event["event"] == kind]

    def stop(self) -> int:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        code = self._process.wait(DEADLINE_SECONDS)
        assert self._process.stdout is not None
        self._process.stdout.close()
        return code

    def verdict(self) -> auditor.Verdict:
        assert self.stop() == 0
        return auditor.audit(self.log_path)


StartProvider = Callable[..., RunningProvider]


@pytest.fixture
def start_provider(tmp_path: pathlib.Path) -> Iterator[StartProvider]:
    started: list[RunningProvider] = []

    def start(*arguments: str) -> RunningProvider:
        started.append(RunningProvider(tmp_path, *arguments))
        return started[-1]

    yield start
    for provider in started:
        provider.stop()


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(timeout=DEADLINE_SECONDS) as client:
        yield client


def chat_body(*, prompt: int = 10, answer: int = 5, bound: int = 20, **fields: Any) -> dict[str, Any]:
    return {
        "model": "simulated",
        "messages": [{"role": "user", "content": "replayed"}],
        "max_tokens": bound,
        "metadata": {"prompt_tokens": str(prompt), "completion_tokens": str(answer)},
        **fields,
    }


async def post(http: httpx.AsyncClient, provider: RunningProvider, **fields: Any) -> httpx.Response:
    return await http.post(
        f"{provider.url}/chat/completions", json=chat_body(**fields), headers={"x-worker-id": "worker-a"}
    )


async def use(http: httpx.AsyncClient, provider: RunningProvider) -> dict[str, int]:
    use: dict[str, int] = (await http.get(f"{provider.url}/limits")).json()["use"]
    return use


async def until_use(http: httpx.AsyncClient, provider: RunningProvider, **wanted: int) -> dict[str, int]:
    deadline_seconds = time.monotonic() + DEADLINE_SECONDS
    while True:
        now = await use(http, provider)
        if wanted.items() <= now.items():
            return now
        assert time.monotonic() < deadline_seconds, f"{now}, not {wanted}"
        await asyncio.sleep(0.01)


async def test_answer_has_the_shape_the_usage_and_the_rate_headers(
    start_provider: StartProvider, http: httpx.AsyncClient
) -> None:
    provider = start_provider("--requests", "10", "--tokens", "1000", "--first-token-seconds", "0")

    response = await post(http, provider)

    body = response.json()
    assert response.status_code == 200
    assert (body["object"], body["model"]) == ("chat.completion", "simulated")
    assert len(body["choices"][0]["message"]["content"].split()) == 5
    assert body["usage"] == {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    assert response.headers["x-ratelimit-limit-requests"] == "10"
    assert response.headers["x-ratelimit-remaining-requests"] == "9"
    assert response.headers["x-ratelimit-remaining-tokens"] == "970"
    assert response.headers["x-ratelimit-reset-tokens"] == "1m0s"
    assert (await http.get(provider.url.removesuffix("/v1") + "/healthz")).json() == {"status": "ok"}
    verdict = provider.verdict()
    assert verdict.broken == ()
    assert list(verdict.workers) == ["worker-a"]


async def test_reserved_tokens_are_corrected_to_the_actual_ones_at_completion(
    start_provider: StartProvider, http: httpx.AsyncClient
) -> None:
    provider = start_provider("--tokens", "1000", "--first-token-seconds", "0.5", "--seconds-per-token", "0")

    call = asyncio.create_task(post(http, provider, prompt=100, answer=7, bound=800))
    assert (await until_use(http, provider, concurrency=1))["tokens"] == 900
    assert (await call).status_code == 200

    assert await use(http, provider) == {"requests": 1, "tokens": 107, "concurrency": 0}
    assert provider.events("settle")[0]["tokens"] == 107


async def test_request_above_the_request_limit_is_answered_429_and_counts_nothing(
    start_provider: StartProvider, http: httpx.AsyncClient
) -> None:
    provider = start_provider("--requests", "2", "--first-token-seconds", "0", "--window-seconds", "30")

    statuses = [(await post(http, provider)).status_code for _ in range(2)]
    refused = await post(http, provider)

    assert statuses == [200, 200]
    assert refused.status_code == 429
    assert refused.json()["error"]["type"] == "requests"
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert "limit 2, used 2, requested 1" in refused.json()["error"]["message"]
    assert 1 <= int(refused.headers["retry-after"]) <= 30
    assert (await use(http, provider))["requests"] == 2
    verdict = provider.verdict()
    assert [claim.is_upheld for claim in verdict.claims] == [True, False, True, True, False]
    assert verdict.peaks["requests"].highest == 3


async def test_token_limit_counts_reservations_and_tells_what_can_never_fit(
    start_provider: StartProvider, http: httpx.AsyncClient
) -> None:
    provider = start_provider("--tokens", "1000", "--first-token-seconds", "0")

    assert (await post(http, provider, prompt=900, answer=1, bound=50)).status_code == 200
    refused = await post(http, provider, prompt=10, bound=90)
    impossible = await post(http, provider, prompt=10, bound=991)

    assert (refused.status_code, refused.json()["error"]["type"]) == (429, "tokens")
    assert "retry-after" in refused.headers
    assert impossible.status_code == 429
    assert impossible.json()["error"]["message"].startswith("Request too large for tokens")
    assert "retry-after" not in impossible.headers


async def test_window_slides_a_request_is_let_in_as_soon_as_the_first_has_left(
    start_provider: StartProvider, http: httpx.AsyncClient
) -> None:
    provider = start_provider("--requests", "1", "--first-token-seconds", "0", "--window-seconds", "0.4")

    assert (await post(http, provider)).status_code == 200
    deadline_seconds = time.monotonic() + DEADLINE_SECONDS
    while (await post(http, provider)).status_code == 429:
        assert time.monotonic() < deadline_seconds

    first, second = (event["mono_ns"] for event in provider.events("admit"))
    last_reject = provider.events("reject")[-1]
    assert second - first >= 400_000_000
    assert last_reject["mono_ns"] - first < 400_000_000
    assert last_reject["mono_ns"] + last_reject["retry_after_seconds"] * 1e9 == pytest.approx(
        first + 400_000_000, abs=10
    )


async def test_concurrency_limit_refuses_and_a_disconnect_frees_the_slot_at_once(
    start_provider: StartProvider, http: httpx.AsyncClient
) -> None:
    provider = start_provider("--concurrency", "1", "--first-token-seconds", "600")

    for is_stream in (False, True):
        call = asyncio.create_task(post(http, provider, stream=is_stream))
        await until_use(http, provider, concurrency=1)
        refused = await post(http, provider)
        assert (refused.status_code, refused.json()["error"]["type"]) == (429, "concurrency")
        assert refused.headers["retry-after"] == "1"
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        now = await until_use(http, provider, concurrency=0)
        assert now["tokens"] == now["requests"] * 30

    assert [event["request"] for event in provider.events("disconnect")] == ["r1", "r3"]
    verdict = provider.verdict()
    assert (verdict.disconnected, verdict.rejected) == (2, 2)


async def test_slot_of_a_killed_client_is_free(start_provider: StartProvider, http: httpx.AsyncClient) -> None:
    provider = start_provider("--concurrency", "1", "--first-token-seconds", "600")
    code = (
        f"import httpx; httpx.post({provider.url + '/chat/completions'!r}, json={chat_body()!r}, timeout=None)"
    )
    client = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdin=subprocess.DEVNULL)
    try:
        await until_use(http, provider, concurrency=1)
    finally:
        client.kill()
        await client.wait()

    await until_use(http, provider, concurrency=0)


async def test_reader_of_the_whole_answer_finds_the_slot_free(
    start_provider: StartProvider, http: httpx.AsyncClient
) -> None:
    provider = start_provider("--concurrency", "1", "--first-token-seconds", "0", "--seconds-per-token", "0")

    statuses = [(await post(http, provider, stream=number % 2 == 1)).status_code for number in range(200)]

    assert statuses == [200] * 200
    assert provider.verdict().peaks["concurrency"].highest == 1


async def test_stream_sends_chunks_as_they_are_generated_then_usage_then_done(
    start_provider: StartProvider, http: httpx.AsyncClient
) -> None:
    provider = start_provider("--first-token-seconds", "0", "--seconds-per-token", "0.05")
    body = chat_body(answer=12, stream=True, stream_options={"include_usage": True})

    started = time.monotonic()
    async with http.stream("POST", f"{provider.url}/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
    elapsed_seconds = time.monotonic() - started

    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    assert deltas[0]["role"] == "assistant"
    assert [len(delta.get("content", "").split()) for delta in deltas] == [0, 4, 4, 4, 0]
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["usage"]["total_tokens"] == 22
    assert elapsed_seconds >= 0.6


@pytest.mark.parametrize(
    ("content", "param"),
    [(b"{", "body"), (b'{"model": "m"}', "messages"), (b" " * (4 * 1024 * 1024 + 1), "body")],
)
async def test_bad_request_is_answered_400_with_the_field_and_counts_nothing(
    start_provider: StartProvider, http: httpx.AsyncClient, content: bytes, param: str
) -> None:
    provider = start_provider()

    response = await http.post(f"{provider.url}/chat/completions", content=content)

    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert (await use(http, provider))["requests"] == 0


async def test_unknown_routes_are_answered_in_the_error_shape(
    start_provider: StartProvider, http: httpx.AsyncClient
) -> None:
    provider = start_provider()

    unknown = await http.get(f"{provider.url}/models")
    wrong_method = await http.get(f"{provider.url}/chat/completions")

    assert (unknown.status_code, wrong_method.status_code) == (404, 405)
    assert unknown.json()["error"]["code"] == "unknown_url"


async def test_stop_with_calls_in_flight_ends_the_log_in_order(
    start_provider: StartProvider, http: httpx.AsyncClient
) -> None:
    provider = start_provider("--first-token-seconds", "600")
    calls = [asyncio.create_task(post(http, provider, stream=number == 1)) for number in range(2)]
    await until_use(http, provider, concurrency=2)

    verdict = await asyncio.to_thread(provider.verdict)

    await asyncio.gather(*calls, return_exceptions=True)
    assert verdict.broken == ()
    assert verdict.disconnected == 2


@pytest.mark.parametrize(
    "arguments", [["--requests", "0"], ["--seconds-per-token", "-1"], ["--host", "192.0.2.1"]]
)
def test_provider_that_cannot_start_says_so(tmp_path: pathlib.Path, arguments: list[str]) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "leasehold.demo.provider", "--log", str(tmp_path / "log"), *arguments],
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )

    assert ran.returncode == 2
    assert len(ran.stderr.splitlines()) == 1
