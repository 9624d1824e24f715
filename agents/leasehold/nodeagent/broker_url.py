"""Addresses of brokers, as Celery writes them; a password is never shown."""

import ssl
import urllib.parse
from dataclasses import dataclass, field
from typing import Final

from leasehold.core import errors

REDIS: Final = "redis"
RABBITMQ: Final = "rabbitmq"

_SCHEMES: Final = {
    "redis": (REDIS, 6379, False),
    "rediss": (REDIS, 6379, True),
    "redis+socket": (REDIS, 0, False),
    "valkey": (REDIS, 6379, False),
    "valkeys": (REDIS, 6379, True),
    "amqp": (RABBITMQ, 5672, False),
    "pyamqp": (RABBITMQ, 5672, False),
    "amqps": (RABBITMQ, 5671, True),
}
_CERTIFICATE_CHECKS: Final = {"none", "cert_none", "optional", "cert_optional"}


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerUrl:
    """Where a broker is, and how to log in."""

    #: `REDIS` or `RABBITMQ`.
    kind: str
    host: str = "127.0.0.1"
    port: int = 0
    #: Of a unix socket, in place of host and port.
    socket_path: str = ""
    user: str = ""
    password: str = field(default="", repr=False)
    #: Number of the database; Redis only.
    database: int = 0
    #: RabbitMQ only.
    virtual_host: str = "/"
    tls: ssl.SSLContext | None = field(default=None, compare=False, repr=False)

    @property
    def place(self) -> str:
        """Where it is, for people and without the login: ``127.0.0.1:6379/0``."""
        if self.socket_path:
            return f"{self.socket_path} database {self.database}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        where = str(self.database) if self.kind == REDIS else self.virtual_host.lstrip("/")
        return f"{host}:{self.port}/{where}"


def parse(url: str, *, setting: str) -> BrokerUrl:
    """The first of the addresses in `url` (Celery takes several, with semicolons between).

    `setting` names where it was given. Raises `InvalidArgument`, in whose message there is no password.
    """
    first = url.split(";")[0].strip()
    scheme, mark, _ = first.partition("://")
    known = _SCHEMES.get(scheme.lower())
    if not mark or known is None:
        shown = repr(scheme[:20]) if mark else "a text without ://"
        raise errors.InvalidArgument(
            f"{setting}: {shown} is no scheme of a broker known here; known are {', '.join(_SCHEMES)}",
            field=setting,
        )
    kind, default_port, is_tls = known
    try:
        parts = urllib.parse.urlsplit(first)
        port = parts.port or default_port
        query = dict(urllib.parse.parse_qsl(parts.query))
        tls = _context(query) if is_tls else None
    except (ValueError, OSError) as error:
        detail = "the port is not a number of 0 to 65535" if isinstance(error, ValueError) else str(error)
        raise errors.InvalidArgument(f"{setting}: {detail}", field=setting) from None
    user, password = (urllib.parse.unquote(text or "") for text in (parts.username, parts.password))
    path = urllib.parse.unquote(parts.path)
    if scheme.lower() == "redis+socket":
        path, database = "", _database(query.get("virtual_host", ""), setting)
        return BrokerUrl(
            kind=kind,
            socket_path=urllib.parse.unquote(parts.path),
            user=user,
            password=password,
            database=database,
        )
    if kind == REDIS:
        return BrokerUrl(
            kind=kind,
            host=parts.hostname or "127.0.0.1",
            port=port,
            user=user,
            password=password,
            database=_database(path, setting),
            tls=tls,
        )
    return BrokerUrl(
        kind=kind,
        host=parts.hostname or "127.0.0.1",
        port=port,
        user=user or "guest",
        password=password or ("" if user else "guest"),
        virtual_host=path[1:] or "/",
        tls=tls,
    )


def _database(path: str, setting: str) -> int:
    text = path.strip("/")
    if not text:
        return 0
    if not (text.isascii() and text.isdigit() and len(text) <= 5):
        raise errors.InvalidArgument(f"{setting}: {path[:20]!r} is no number of a database", field=setting)
    return int(text)


def _context(query: dict[str, str]) -> ssl.SSLContext:
    """TLS by the parameters that Celery takes: ssl_cert_reqs, ssl_ca_certs, ssl_certfile, ssl_keyfile."""
    context = ssl.create_default_context(cafile=query.get("ssl_ca_certs"))
    if query.get("ssl_cert_reqs", "required").lower() in _CERTIFICATE_CHECKS:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if "ssl_certfile" in query:
        context.load_cert_chain(query["ssl_certfile"], query.get("ssl_keyfile"))
    return context
