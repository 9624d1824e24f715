"""What every request passes before a route sees it: the Host, the Origin, the size, the time.

There is no CORS: no other site's page may read an answer. A page may still send a request that it cannot read,
so everything but GET and HEAD is refused where the browser says that another site's page sent it. A program
that is no browser sends neither Origin nor Sec-Fetch-Site, and is let through. The Host is checked against
names that rebinding a foreign name to 127.0.0.1 cannot give.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from leasehold.core import errors
from leasehold.gateway import refusals
from leasehold.observe import logs
from starlette import types

_HOST: Final = re.compile(r"(?P<name>\[[0-9a-f:.]{2,45}\]|[a-z0-9._-]{1,253})(?::(?P<port>[0-9]{1,5}))?")
_READING_METHODS: Final = frozenset({"GET", "HEAD"})
_DEFAULT_PORTS: Final = {"http": "80", "https": "443"}
#: Bodies that say nothing: some HTTP libraries send one with every POST.
_EMPTY_BODIES: Final = frozenset({b"", b"{}", b"null"})

HEADERS: Final[Sequence[tuple[bytes, bytes]]] = (
    (b"cache-control", b"no-store"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)

_log = logs.get_logger(__name__)


class Guard:
    """ASGI middleware around the routes. `observe(method, path, status, seconds)` hears of every answer."""

    def __init__(
        self,
        app: types.ASGIApp,
        *,
        allowed_hosts: frozenset[str],
        body_bytes_max: int,
        timeout_seconds: float,
        observe: Callable[[str, str, int, float], None],
    ) -> None:
        self._app = app
        self._allowed_hosts = allowed_hosts
        self._body_bytes_max = body_bytes_max
        self._timeout_seconds = timeout_seconds
        self._observe = observe

    async def __call__(self, scope: types.Scope, receive: types.Receive, send: types.Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            return
        loop = asyncio.get_running_loop()
        began = loop.time()
        answer = _Answer(send)
        try:
            await self._answer(scope, receive, answer)
        except Exception as error:  # noqa: BLE001 - a request must not take the server along, nor tell its inside
            _log.exception("request_failed", path=scope["path"], error=type(error).__name__)
            if not answer.status:
                broken = errors.LeaseholdError("something went wrong in the gateway; its log has more")
                await refusals.answer(broken)(scope, receive, answer.send)
        finally:
            self._observe(scope["method"], scope["path"], answer.status, loop.time() - began)

    async def _answer(self, scope: types.Scope, receive: types.Receive, answer: "_Answer") -> None:
        try:
            async with asyncio.timeout(self._timeout_seconds):
                host = self._checked_host(scope)
                if scope["method"] not in _READING_METHODS:
                    _check_origin(scope, host)
                body = await self._read(scope, receive)
                await self._app(scope, _replay(body, receive), answer.send)
        except refusals.HttpRefusal as refusal:
            await refusals.answer(refusal)(scope, receive, answer.send)
        except TimeoutError:
            if answer.status:
                raise
            late = errors.DeadlineExceeded(f"not done within {self._timeout_seconds:g} s")
            await refusals.answer(late)(scope, receive, answer.send)

    def _checked_host(self, scope: types.Scope) -> str:
        """The Host header. Raises `HttpRefusal`: 400 for none or a malformed one, 421 for a foreign one."""
        given = _header(scope, b"host")
        if len(given) != 1:
            raise refusals.HttpRefusal(400, "BAD_HOST", f"{len(given)} Host headers; there must be one")
        host = given[0].lower()
        found = _HOST.fullmatch(host)
        if found is None:
            raise refusals.HttpRefusal(400, "BAD_HOST", "the Host header is no host:port")
        if found["name"].strip("[]") not in self._allowed_hosts:
            raise refusals.HttpRefusal(
                421,
                "HOST_NOT_ALLOWED",
                f"{found['name']} is not served here; LEASEHOLD_GATEWAY_ALLOWED_HOSTS lists the names that are",
            )
        return host

    async def _read(self, scope: types.Scope, receive: types.Receive) -> bytes:
        """The whole body. Raises `HttpRefusal`: 413 above the limit, 400 if it says something."""
        too_large = refusals.HttpRefusal(
            413, "BODY_TOO_LARGE", f"a body has at most {self._body_bytes_max} bytes", connection="close"
        )
        for length in _header(scope, b"content-length"):
            if not length.isdigit() or int(length) > self._body_bytes_max:
                raise too_large
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return bytes(body)
            body += message.get("body", b"")
            if len(body) > self._body_bytes_max:
                raise too_large
            if not message.get("more_body"):
                break
        if bytes(body).strip() not in _EMPTY_BODIES:
            raise refusals.HttpRefusal(
                400, "BODY_NOT_TAKEN", "no route takes a body: parameters stand in the query, as ?node=r620-1"
            )
        return bytes(body)


class _Answer:
    """Sends, adds the headers that every answer has, and remembers the status; 0: nothing was sent."""

    def __init__(self, send: types.Send) -> None:
        self._send = send
        self.status = 0

    async def send(self, message: types.Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": [*message["headers"], *HEADERS]}
        await self._send(message)


def _replay(body: bytes, receive: types.Receive) -> Callable[[], Awaitable[types.Message]]:
    """What `receive` would give, had nobody read the body yet."""
    is_given = False

    async def replayed() -> types.Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


def _check_origin(scope: types.Scope, host: str) -> None:
    """Raise `HttpRefusal` 403 if a page of another site sends this."""
    foreign = refusals.HttpRefusal(403, "FOREIGN_ORIGIN", "a page of another site may not change anything here")
    origins, sites = _header(scope, b"origin"), _header(scope, b"sec-fetch-site")
    if any(site.lower() not in ("same-origin", "none") for site in sites):
        raise foreign
    scheme = scope.get("scheme", "http")
    own = f"{scheme}://{_with_port(host, scheme)}"
    for origin in origins:
        its_scheme, _, its_host = origin.lower().partition("://")
        if f"{its_scheme}://{_with_port(its_host, its_scheme)}" != own:
            raise foreign


def _with_port(host: str, scheme: str) -> str:
    found = _HOST.fullmatch(host)
    if found is None:
        return ""
    return f"{found['name']}:{found['port'] or _DEFAULT_PORTS.get(scheme, '')}"


def _header(scope: types.Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1").strip() for key, value in scope["headers"] if key == name]
