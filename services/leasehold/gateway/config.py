"""Settings of a gateway: flags first, then the environment, then defaults."""

import pathlib
from collections.abc import Mapping
from typing import Any, Final

import pydantic
import pydantic_settings
from leasehold.core import errors
from leasehold.rpc import addresses, tls

PREFIX: Final = "LEASEHOLD_"
#: Fields of this process alone; their flags go without it.
OWN_PREFIX: Final = "gateway_"

_LOOPBACK_NAMES: Final = frozenset({"localhost", "127.0.0.1", "::1"})
_EVERY_INTERFACE: Final = frozenset({"0.0.0.0", "::"})  # noqa: S104 - to refuse them as a name


def _setting(default: Any, description: str, **bounds: Any) -> Any:
    return pydantic.Field(default, description=description, **bounds)


class Settings(pydantic_settings.BaseSettings):
    """What a gateway must know. Each field is also `LEASEHOLD_` + its name in capitals.

    TLS towards the allocators is set by LEASEHOLD_TLS_CERTIFICATE_FILE, _KEY_FILE and _CA_FILE, as it is for
    every client.
    """

    model_config = pydantic_settings.SettingsConfigDict(env_prefix=PREFIX, extra="ignore", frozen=True)

    addr: str = _setting("127.0.0.1:7400", "host:port of the allocators, comma-separated")
    gateway_listen: str = _setting(
        "127.0.0.1:8000", "host:port of the HTTP API; beyond loopback only with the three tls files"
    )
    gateway_allowed_hosts: str = _setting(
        "", "names, comma-separated, under which clients may call beside loopback's (the Host header)"
    )
    gateway_tls_certificate_file: pathlib.Path | None = _setting(None, "PEM of the API's certificate")
    gateway_tls_key_file: pathlib.Path | None = _setting(None, "PEM of the API's key")
    gateway_tls_ca_file: pathlib.Path | None = _setting(
        None, "PEM of the authorities that clients' certificates come from"
    )
    gateway_request_timeout_seconds: float = _setting(
        30.0, "a request that takes longer is answered with 504", gt=0, le=300
    )
    gateway_allocator_timeout_seconds: float = _setting(
        5.0, "how long a leading allocator is looked for", gt=0, le=60
    )
    gateway_body_bytes_max: int = _setting(65_536, "largest body of a request", ge=0, le=2**20)
    log_format: str = _setting("auto", "auto, json or console")
    log_level: str = _setting("info", "debug, info, warning or error")

    def check(self) -> None:
        """Raise `InvalidArgument`, naming the setting, for what is wrong whatever the allocators say."""
        self.allocators()
        where = self.listen
        if where.is_unix:
            raise errors.InvalidArgument("--listen: a Unix socket is not offered over HTTP", field="--listen")
        files = self.tls_files
        if not where.is_loopback and (files is None or not files.is_mutual):
            raise errors.InvalidArgument(
                f"refusing to listen on {self.gateway_listen}, which other hosts can reach, without mutual "
                "TLS: set --tls-certificate-file, --tls-key-file and --tls-ca-file (LEASEHOLD_GATEWAY_TLS_…), "
                "or choose a loopback address with --listen (LEASEHOLD_GATEWAY_LISTEN)",
                field="gateway_tls_ca_file",
            )
        if files is not None:
            tls.server_credentials(files)
        names = self.allowed_hosts
        if where.host in _EVERY_INTERFACE and names == _LOOPBACK_NAMES:
            raise errors.InvalidArgument(
                f"--listen {self.gateway_listen} has no name that clients call by: set --allowed-hosts "
                "(LEASEHOLD_GATEWAY_ALLOWED_HOSTS)",
                field="gateway_allowed_hosts",
            )
        client_files = tls.client_files()
        if client_files is not None:
            tls.channel_credentials(client_files)

    def allocators(self) -> tuple[str, ...]:
        """Their addresses. Raises `InvalidArgument`."""
        return addresses.parse_list(self.addr, setting="LEASEHOLD_ADDR or --addr")

    @property
    def listen(self) -> addresses.Address:
        """Where the API listens. Raises `InvalidArgument`."""
        return addresses.parse(self.gateway_listen, setting="--listen")

    @property
    def tls_files(self) -> tls.TlsFiles | None:
        """The API's own TLS files, if any is set."""
        found = (self.gateway_tls_certificate_file, self.gateway_tls_key_file, self.gateway_tls_ca_file)
        return tls.TlsFiles(*found, setting_prefix="gateway_tls_") if any(found) else None

    @property
    def allowed_hosts(self) -> frozenset[str]:
        """Names that a Host header may have, in small letters, without ports. Raises `InvalidArgument`."""
        given = [part.strip().lower().strip("[]") for part in self.gateway_allowed_hosts.split(",")]
        for name in filter(None, given):
            if set(name) & set("/*@ \t\r\n\0") or len(name) > 253:
                raise errors.InvalidArgument(
                    f"--allowed-hosts: {name[:60]!r} is no name of a host; ports and patterns are not taken",
                    field="gateway_allowed_hosts",
                )
        host = self.listen.host.lower()
        own = set() if host in _EVERY_INTERFACE else {host}
        return frozenset({*_LOOPBACK_NAMES, *own, *filter(None, given)})


def flag(field: str) -> str:
    """Such as ``--listen``."""
    return f"--{field.removeprefix(OWN_PREFIX).replace('_', '-')}"


def load(flags: Mapping[str, Any]) -> Settings:
    """Settings from flags (None: not given), the environment and defaults.

    Raises `InvalidArgument` that names the setting.
    """
    try:
        return Settings(**{name: value for name, value in flags.items() if value is not None})
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise errors.InvalidArgument(
            f"{flag(name)} ({PREFIX}{name.upper()}): {first['msg']}", field=name
        ) from None
