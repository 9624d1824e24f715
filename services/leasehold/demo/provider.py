"""A local server that speaks chat completions and enforces its limits as a provider does.

Requests are counted, and their tokens (prompt and `max_tokens`) reserved, on arrival; tokens are corrected to
the actual ones when the answer is done; a slot is freed when the answer is done or the client disconnects (its
tokens then stay as reserved). A request that would break a limit gets a 429 and is not counted. Windows are
true sliding windows.

Its log is what a verdict on its clients rests on. Each line has `mono_ns` (CLOCK_MONOTONIC) and `event`:

- `start`: `limits` {`requests`, `tokens`, `concurrency`, `window_seconds`} and `address`; `stop`
- `arrive`: `request` (unique in the log), `worker` (header x-worker-id), `client_request` (header
  x-request-id), `reserved_tokens`; then, of that request, at the same instant
- `admit`, or `reject` with `limit` and `retry_after_seconds`; after `admit` one of
- `settle` with the actual `tokens`, or `disconnect`.

An answer is settled before its last bytes are sent: whoever has read it may rely on the freed slot.
"""

import argparse
import asyncio
import contextlib
import itertools
import math
import pathlib
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

import uvicorn
from leasehold.core import errors
from leasehold.demo import answer, chat, children, journal, service_time, windows
from starlette import applications, requests, responses, routing

BODY_BYTES_MAX = 4 * 1024 * 1024
_HEADER_CHARACTERS_MAX = 200
#: Turns of the event loop in which a connection that its client has closed is noticed.
_TURNS_TO_NOTICE_DISCONNECTS = 5


class Provider:
    """The account's limits, the model's speed and the log, behind an ASGI application."""

    def __init__(self, limits: windows.Limits, speed: service_time.ServiceTime, log: journal.Journal) -> None:
        self._speed = speed
        self._quota = windows.Quota(limits)
        self._log = log
        self._numbers = itertools.count(1)

    def application(self) -> applications.Starlette:
        """The HTTP face."""
        return applications.Starlette(
            routes=[
                routing.Route("/v1/chat/completions", self._complete, methods=["POST"]),
                routing.Route("/v1/limits", self._show_limits, methods=["GET"]),
                routing.Route("/healthz", self._show_health, methods=["GET"]),
            ],
            exception_handlers={404: _no_such_route, 405: _no_such_route},
        )

    async def _show_health(self, request: requests.Request) -> responses.Response:
        return responses.JSONResponse({"status": "ok"})

    async def _show_limits(self, request: requests.Request) -> responses.Response:
        limits = self._quota.limits
        use = self._quota.use(time.monotonic_ns())
        return responses.JSONResponse({"limits": limits_fields(limits), "use": use_fields(use)})

    async def _complete(self, request: requests.Request) -> responses.Response:
        try:
            wanted = chat.parse(await _body(request))
        except errors.InvalidArgument as error:
            body = chat.error(error.message, kind="invalid_request_error", code=None, param=error.field)
            return responses.JSONResponse(body, status_code=400)
        except requests.ClientDisconnect:
            return responses.Response(status_code=400)
        if not self._quota.has_slot:
            # A client that closed its connection before this request was sent has freed its slot already;
            # the loop may have both in hand and must see the disconnect first.
            for _ in range(_TURNS_TO_NOTICE_DISCONNECTS):
                await asyncio.sleep(0)
        return self._admit(wanted, request.headers)

    def _admit(self, wanted: chat.ChatRequest, headers: Mapping[str, str]) -> responses.Response:
        now_ns = time.monotonic_ns()
        request_id = f"r{next(self._numbers)}"
        self._log.write(
            "arrive",
            at_ns=now_ns,
            request=request_id,
            worker=headers.get("x-worker-id", "")[:_HEADER_CHARACTERS_MAX],
            client_request=headers.get("x-request-id", "")[:_HEADER_CHARACTERS_MAX],
            reserved_tokens=wanted.reserved_tokens,
        )
        decision = self._quota.try_admit(now_ns, wanted.reserved_tokens)
        headers_out = self._rate_headers(now_ns) | {"x-request-id": request_id}
        if isinstance(decision, windows.Refusal):
            return self._rejected(wanted, request_id, decision, now_ns, headers_out)
        self._log.write("admit", at_ns=now_ns, request=request_id)
        return answer.Answer(
            wanted,
            completion_id=f"chatcmpl-{request_id}",
            speed=self._speed,
            headers=headers_out,
            settle=lambda: self._settle(request_id, decision, wanted.total_tokens),
            abandon=lambda: self._abandon(request_id, decision),
        )

    def _rejected(
        self,
        wanted: chat.ChatRequest,
        request_id: str,
        refusal: windows.Refusal,
        now_ns: int,
        headers: dict[str, str],
    ) -> responses.Response:
        seconds = None
        if refusal.is_possible:
            # How long a running request takes is not known; a second is a modest guess.
            seconds = 1.0 if refusal.retry_after_ns is None else refusal.retry_after_ns / 1e9
            headers |= {"retry-after": str(math.ceil(seconds)), "retry-after-ms": str(math.ceil(seconds * 1e3))}
        self._log.write(
            "reject", at_ns=now_ns, request=request_id, limit=refusal.limit, retry_after_seconds=seconds
        )
        body = chat.error(
            self._refusal_text(wanted, refusal, seconds, now_ns),
            kind=str(refusal.limit),
            code="rate_limit_exceeded",
        )
        return responses.JSONResponse(body, status_code=429, headers=headers)

    def _refusal_text(
        self, wanted: chat.ChatRequest, refusal: windows.Refusal, seconds: float | None, now_ns: int
    ) -> str:
        limits = self._quota.limits
        use = self._quota.use(now_ns)
        limit, used, asked = {
            windows.Limit.REQUESTS: (limits.requests, use.requests, 1),
            windows.Limit.TOKENS: (limits.tokens, use.tokens, wanted.reserved_tokens),
            windows.Limit.CONCURRENCY: (limits.concurrency, use.concurrency, 1),
        }[refusal.limit]
        per = "at a time" if refusal.limit is windows.Limit.CONCURRENCY else f"per {limits.window_seconds:g} s"
        if seconds is None:
            return f"Request too large for {refusal.limit} {per}: limit {limit}, requested {asked}."
        return (
            f"Rate limit reached for {refusal.limit} {per}: limit {limit}, used {used}, requested {asked}. "
            f"Please try again in {seconds:.3f}s."
        )

    def _rate_headers(self, now_ns: int) -> dict[str, str]:
        limits = self._quota.limits
        use = self._quota.use(now_ns)
        requests_reset_ns, tokens_reset_ns = self._quota.empty_in_ns(now_ns)
        return {
            "x-ratelimit-limit-requests": str(limits.requests),
            "x-ratelimit-limit-tokens": str(limits.tokens),
            "x-ratelimit-remaining-requests": str(max(0, limits.requests - use.requests)),
            "x-ratelimit-remaining-tokens": str(max(0, limits.tokens - use.tokens)),
            "x-ratelimit-reset-requests": _duration_text(requests_reset_ns),
            "x-ratelimit-reset-tokens": _duration_text(tokens_reset_ns),
        }

    def _settle(self, request_id: str, admission: windows.Admission, tokens: int) -> None:
        self._quota.end(admission, tokens=tokens)
        self._log.write("settle", request=request_id, tokens=tokens)

    def _abandon(self, request_id: str, admission: windows.Admission) -> None:
        if self._quota.end(admission):
            self._log.write("disconnect", request=request_id)


async def _body(request: requests.Request) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > BODY_BYTES_MAX:
            raise errors.InvalidArgument(f"the body is above {BODY_BYTES_MAX} bytes", field="body")
    return bytes(body)


async def _no_such_route(request: requests.Request, error: Exception) -> responses.Response:
    status = getattr(error, "status_code", 404)
    message = f"Unknown request: {request.method} {request.url.path}"
    body = chat.error(message, kind="invalid_request_error", code="unknown_url")
    return responses.JSONResponse(body, status_code=status)


def limits_fields(limits: windows.Limits) -> dict[str, float]:
    """`limits` as they stand in the log and in answers."""
    return {
        "requests": limits.requests,
        "tokens": limits.tokens,
        "concurrency": limits.concurrency,
        "window_seconds": limits.window_seconds,
    }


def use_fields(use: windows.Use) -> dict[str, int]:
    """`use` as it stands in answers."""
    return {"requests": use.requests, "tokens": use.tokens, "concurrency": use.concurrency}


def _duration_text(nanos: int) -> str:
    """As the API writes them: `20ms`, `1.5s`, `6m0s`."""
    if nanos < windows.NANOS_PER_SECOND:
        return f"{math.ceil(nanos / 1e6)}ms"
    minutes, seconds = divmod(nanos / 1e9, 60)
    text = f"{seconds:.3f}".rstrip("0").rstrip(".")
    return f"{int(minutes)}m{text}s" if minutes else f"{text}s"


class _Server(uvicorn.Server):
    """Leaves signals to `_serve`: the log must get its last line before the process ends."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(options: argparse.Namespace) -> None:
    limits = windows.Limits(
        requests=options.requests,
        tokens=options.tokens,
        concurrency=options.concurrency,
        window_seconds=options.window_seconds,
    )
    speed = service_time.ServiceTime(
        first_token_seconds=options.first_token_seconds,
        seconds_per_token=options.seconds_per_token,
        answer_seconds_max=options.answer_seconds_max,
    )
    with journal.Journal(options.log) as log, socket.create_server((options.host, options.port)) as listener:
        # Accepted connections inherit it. asyncio sets it only on sockets made with an explicit protocol, and
        # without it each answer waits 40 ms for a delayed acknowledgement.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        address = "http://{}:{}".format(*listener.getsockname())
        server = _Server(
            uvicorn.Config(
                Provider(limits, speed, log).application(),
                log_level="warning",
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=1,
                timeout_keep_alive=120,
            )
        )
        stop = children.stop_event(options.lifeline_fd)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        # The socket listens already: whoever reads this line can connect.
        log.write("start", address=address, limits=limits_fields(limits))
        sys.stdout.write(f"{address}/v1\n")
        sys.stdout.flush()
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        server.should_exit = True
        await serving
        log.write("stop")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m leasehold.demo.provider", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: any free one, printed on standard output")
    parser.add_argument("--log", type=pathlib.Path, required=True, help="file that the log is appended to")
    parser.add_argument("--requests", type=int, default=800, help="requests in any window")
    parser.add_argument("--tokens", type=int, default=40_000, help="tokens in any window")
    parser.add_argument("--concurrency", type=int, default=40, help="requests at one time")
    parser.add_argument("--window-seconds", type=float, default=60.0)
    parser.add_argument("--first-token-seconds", type=float, default=0.2)
    parser.add_argument("--seconds-per-token", type=float, default=0.014)
    parser.add_argument("--answer-seconds-max", type=float, default=60.0)
    parser.add_argument("--lifeline-fd", type=int, help="stop when this descriptor reaches end of file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until SIGTERM or SIGINT. Exit code 0, or 2 for a wrong argument or a port that is taken."""
    try:
        asyncio.run(_serve(_options(arguments)))
    except errors.LeaseholdError as error:
        sys.stderr.write(f"{error.message}\n")
        return 2
    except OSError as error:
        sys.stderr.write(f"cannot serve: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
