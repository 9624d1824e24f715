"""TLS from files: server and channel credentials, checked before gRPC sees them.

gRPC tells of a bad certificate only as "failed to bind", or at the first handshake; here each fault names the
setting that it came from.
"""

import os
import ssl
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import grpc
from leasehold.core import errors


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Paths of PEM files, the same for either end of a connection.

    ``certificate_file`` and ``key_file`` are this end's own chain and key. ``ca_file`` holds the authorities
    that the *other* end's certificate must come from: at a server it makes clients show one (mutual TLS), at a
    client it replaces the system's authorities. ``setting_prefix`` is put before the names in error messages,
    so that they read as the user's own settings do.
    """

    certificate_file: Path | None = None
    key_file: Path | None = None
    ca_file: Path | None = None
    setting_prefix: str = "tls_"

    @property
    def is_mutual(self) -> bool:
        """Whether a server with these files knows who its clients are."""
        return None not in (self.certificate_file, self.key_file, self.ca_file)


def client_files(environment: Mapping[str, str] = os.environ) -> TlsFiles | None:
    """Files of ``LEASEHOLD_TLS_CERTIFICATE_FILE``, ``_KEY_FILE`` and ``_CA_FILE``; None where none is set."""

    def path(name: str) -> Path | None:
        value = environment.get(f"LEASEHOLD_TLS_{name}_FILE")
        return Path(value) if value else None

    files = TlsFiles(path("CERTIFICATE"), path("KEY"), path("CA"), setting_prefix="LEASEHOLD_TLS_")
    return files if files.certificate_file or files.key_file or files.ca_file else None


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Credentials of a server; clients need a certificate if ``ca_file`` is set. Raises `InvalidArgument`."""
    pair = _own_pair(files)
    if pair is None:
        raise errors.InvalidArgument(
            f"a TLS server needs {files.setting_prefix}certificate_file and {files.setting_prefix}key_file",
            field=f"{files.setting_prefix}certificate_file",
        )
    certificate, key = pair
    authorities = _authorities(files)
    return grpc.ssl_server_credentials(
        [(key, certificate)], root_certificates=authorities, require_client_auth=authorities is not None
    )


def channel_credentials(files: TlsFiles) -> grpc.ChannelCredentials:
    """Credentials of a client, with its own certificate if there is one. Raises `InvalidArgument`."""
    certificate, key = _own_pair(files) or (None, None)
    return grpc.ssl_channel_credentials(
        root_certificates=_authorities(files), private_key=key, certificate_chain=certificate
    )


def _own_pair(files: TlsFiles) -> tuple[bytes, bytes] | None:
    if files.certificate_file is None and files.key_file is None:
        return None
    certificate_setting = f"{files.setting_prefix}certificate_file"
    key_setting = f"{files.setting_prefix}key_file"
    if files.certificate_file is None:
        raise errors.InvalidArgument(f"{key_setting} needs {certificate_setting}", field=certificate_setting)
    if files.key_file is None:
        raise errors.InvalidArgument(f"{certificate_setting} needs {key_setting}", field=key_setting)
    certificate = _read(files.certificate_file, certificate_setting)
    key = _read(files.key_file, key_setting)
    if files.key_file.stat().st_mode & stat.S_IRWXO:
        raise errors.InvalidArgument(
            f"{key_setting} {files.key_file} is open to every user of this host; chmod 600 it",
            field=key_setting,
        )
    try:
        # An empty password in place of a prompt: a service has nobody to ask.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
            files.certificate_file, files.key_file, password=lambda: b""
        )
    except (ssl.SSLError, ValueError) as error:
        raise errors.InvalidArgument(
            f"{certificate_setting} {files.certificate_file} and {key_setting} {files.key_file} "
            f"are not a certificate and its unencrypted key: {error}",
            field=certificate_setting,
        ) from error
    return certificate, key


def _authorities(files: TlsFiles) -> bytes | None:
    if files.ca_file is None:
        return None
    setting = f"{files.setting_prefix}ca_file"
    authorities = _read(files.ca_file, setting)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(files.ca_file)
    except (ssl.SSLError, ValueError) as error:
        raise errors.InvalidArgument(
            f"{setting} {files.ca_file} holds no PEM certificate: {error}", field=setting
        ) from error
    return authorities


def _read(path: Path, setting: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise errors.InvalidArgument(
            f"{setting} {path} cannot be read: {error.strerror}", field=setting
        ) from error
