"""Settings of an allocator: flags first, then the environment, then defaults."""

import os
import pathlib
import socket
from collections.abc import Mapping
from typing import Any

import pydantic
import pydantic_settings
from leasehold.core import errors
from leasehold.etcd import settings as etcd_settings
from leasehold.rpc import addresses, tls
from leasehold.runtime import roles_yaml

PREFIX = "LEASEHOLD_"

_EVERY_INTERFACE = ("0.0.0.0", "::")  # noqa: S104 - to refuse them as an address to be told


def _setting(default: Any, description: str, **bounds: Any) -> Any:
    return pydantic.Field(default, description=description, **bounds)


class Settings(pydantic_settings.BaseSettings):
    """What an allocator must know. Each field is also `LEASEHOLD_` + its name in capitals."""

    model_config = pydantic_settings.SettingsConfigDict(env_prefix=PREFIX, extra="ignore", frozen=True)

    listen: str = _setting(
        "127.0.0.1:7400", "host:port of the gRPC API; beyond loopback only with the tls files"
    )
    advertise: str = _setting("", "host:port that holders are told while this one leads (default: listen)")
    etcd_endpoints: str = _setting("127.0.0.1:2379", "host:port of etcd's members, comma-separated")
    etcd_prefix: str = _setting("/leasehold", "prefix of every key in etcd")
    etcd_ca_file: str | None = _setting(None, "PEM of the authorities of etcd's certificate")
    etcd_certificate_file: str | None = _setting(None, "PEM of this client's certificate")
    etcd_key_file: str | None = _setting(None, "PEM of this client's key")
    etcd_user: str | None = _setting(None, "user of etcd's own authentication")
    etcd_password_file: pathlib.Path | None = _setting(None, "file with that user's password")
    etcd_txn_ops_max: int = _setting(128, "etcd's --max-txn-ops", ge=2, le=100_000)
    postgres_dsn: str = _setting("", "libpq connection string; not a flag, for it has a password", repr=False)
    postgres_dsn_file: pathlib.Path | None = _setting(None, "file with the libpq connection string")
    budgets_file: pathlib.Path | None = _setting(None, "YAML file of budgets, followed while it changes")
    election_ttl_seconds: int = _setting(3, "how long the others wait after the leader is lost", ge=1, le=60)
    accept_new_etcd: bool = _setting(False, "take an etcd that Postgres does not know as a new generation")
    accept_unfit_etcd: bool = _setting(
        False, "serve on an etcd whose version is known to lose data when it is killed"
    )
    tls_certificate_file: pathlib.Path | None = _setting(None, "PEM of the API's certificate")
    tls_key_file: pathlib.Path | None = _setting(None, "PEM of the API's key")
    tls_ca_file: pathlib.Path | None = _setting(
        None, "PEM of the authorities that clients' certificates come from"
    )
    roles_file: pathlib.Path | None = _setting(
        None, "YAML file of what each certificate may do, followed while it changes; required beyond loopback"
    )
    log_format: str = _setting("auto", "auto, json or console")
    log_level: str = _setting("info", "debug, info, warning or error")

    def check(self) -> None:
        """Raise `InvalidArgument`, naming the setting, for what is wrong whatever the servers say."""
        self._check_addresses()
        self._check_roles()
        if self.tls_files is not None:
            tls.server_credentials(self.tls_files)
        if self.etcd_tls is not None:
            self.etcd_tls.credentials()
        self.etcd_login()
        self.dsn()

    def _check_addresses(self) -> None:
        where = addresses.parse(self.listen, setting="--listen")
        if not where.is_loopback and (self.tls_files is None or not self.tls_files.is_mutual):
            raise errors.InvalidArgument(
                f"refusing to listen on {self.listen}, which other hosts can reach, without mutual TLS: set "
                "--tls-certificate-file, --tls-key-file and --tls-ca-file, or choose a loopback address "
                "with --listen",
                field="tls_ca_file",
            )
        if self.advertise:
            addresses.parse(self.advertise, setting="--advertise")
        elif where.is_unix or where.host in _EVERY_INTERFACE:
            raise errors.InvalidArgument(
                f"--listen {self.listen} is no address to send holders to: set --advertise to one that they "
                "can reach",
                field="advertise",
            )

    def _check_roles(self) -> None:
        if self.roles_file is None:
            if not addresses.parse(self.listen, setting="--listen").is_loopback:
                raise errors.InvalidArgument(
                    f"refusing to listen on {self.listen}, which other hosts can reach, without roles: tell by "
                    "--roles-file what each certificate may do, or choose a loopback address with --listen",
                    field="roles_file",
                )
            return
        if self.tls_files is None or not self.tls_files.is_mutual:
            raise errors.InvalidArgument(
                "--roles-file is of no use without mutual TLS, by which callers are known: set "
                "--tls-certificate-file, --tls-key-file and --tls-ca-file",
                field="roles_file",
            )
        roles_yaml.read(self.roles_file)

    @property
    def candidate_id(self) -> str:
        """Names this replica in the election."""
        return f"{socket.gethostname()}-{os.getpid()}"

    @property
    def tls_files(self) -> tls.TlsFiles | None:
        """The server's own TLS files, if any is set."""
        if not (self.tls_certificate_file or self.tls_key_file or self.tls_ca_file):
            return None
        return tls.TlsFiles(
            certificate_file=self.tls_certificate_file,
            key_file=self.tls_key_file,
            ca_file=self.tls_ca_file,
        )

    @property
    def etcd_tls(self) -> etcd_settings.Tls | None:
        """TLS towards etcd, if any of its files is set."""
        if not (self.etcd_ca_file or self.etcd_certificate_file or self.etcd_key_file):
            return None
        return etcd_settings.Tls(self.etcd_ca_file, self.etcd_certificate_file, self.etcd_key_file)

    def etcd_login(self) -> etcd_settings.Login | None:
        """etcd's user and password. Raises `InvalidArgument` if the file cannot be read."""
        if self.etcd_user is None:
            return None
        if self.etcd_password_file is None:
            raise errors.InvalidArgument(
                "etcd_user is set without etcd_password_file", field="etcd_password_file"
            )
        return etcd_settings.Login(self.etcd_user, _contents(self.etcd_password_file, "etcd_password_file"))

    def dsn(self) -> str:
        """Connection string of Postgres. Raises `InvalidArgument` if there is none."""
        if self.postgres_dsn_file is not None:
            return _contents(self.postgres_dsn_file, "postgres_dsn_file")
        if not self.postgres_dsn:
            raise errors.InvalidArgument(
                "no Postgres: set LEASEHOLD_POSTGRES_DSN or --postgres-dsn-file", field="postgres_dsn"
            )
        return self.postgres_dsn


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
            f"{name} ({PREFIX}{name.upper()} or --{name.replace('_', '-')}): {first['msg']}", field=name
        ) from None


def _contents(path: pathlib.Path, field: str) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise errors.InvalidArgument(f"{field}: {error.strerror}: {path}", field=field) from error
