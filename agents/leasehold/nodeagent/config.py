"""The agent's configuration, from a preset, its YAML file, `.env` files, the environment and flags.

A setting is looked up by its one name in this order, the later one winning::

    preset < YAML file < .env < .env.$ENV < environment < flags

``ENV=production`` reads ``.env.production``. What a pool says of itself in the YAML file is nearer than any
setting for all pools. No pydantic here: it would be a fifth of the agent's memory.
"""

import dataclasses
import os
import pathlib
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from leasehold.core import errors
from leasehold.core.node import model, settings
from leasehold.nodeagent import documents, dotenv, job_settings, names, templates, worker_values
from leasehold.observe import logs as observe_logs
from leasehold.rpc import addresses, tls
from leasehold.runtime import agent_paths, strict_yaml

DEFAULT_ADDRESS: Final = "127.0.0.1:7400"
#: A stop may take the drain deadline, and a last immediate stop after it.
DRAIN_SECONDS_MAX: Final = 7 * 86_400.0

_CONFIG_VARIABLE: Final = "LEASEHOLD_AGENT_CONFIG"
_ENV_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,32}")
_FOREIGN: Final = re.compile(r"[^a-z0-9.-]+")
_LABELS_MAX: Final = 32
_LABEL_LENGTH_MAX: Final = 63
_MIB: Final = 2**20


@dataclass(frozen=True, slots=True)
class Value:
    """A setting's text, and where it was found."""

    text: str
    where: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """One pool, as declared."""

    spec: model.PoolSpec
    template: templates.Template
    values: templates.Values
    env: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    env_file: pathlib.Path | None = None
    log: worker_values.LogSettings = field(default_factory=worker_values.LogSettings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Everything that an agent is told."""

    node: str
    labels: Mapping[str, str]
    state_dir: pathlib.Path
    socket: pathlib.Path
    #: Of the allocators; none: the agent works alone.
    addresses: tuple[str, ...]
    tls_files: tls.TlsFiles | None
    workers_cgroup: pathlib.Path | None
    #: None: as long as the longest stop contract.
    drain_deadline_seconds: float | None
    log_format: str
    log_level: str
    host: settings.HostSettings
    pools: tuple[Pool, ...]
    jobs: job_settings.JobSettings
    job_templates: Mapping[str, templates.Template]
    #: What workers inherit: the environment, over the `.env` files.
    environment: Mapping[str, str]
    #: Where each setting came from, for people.
    origins: Mapping[str, str]
    #: Read again when one of them changes.
    files: tuple[pathlib.Path, ...]

    def drain_seconds(self) -> float:
        """How long a drain waits for running tasks, before they are given back: as set, else the longest."""
        if self.drain_deadline_seconds is not None:
            return self.drain_deadline_seconds
        return max((_waits_for_tasks(pool.spec.stop) for pool in self.pools), default=0.0)


def _waits_for_tasks(stop: model.StopContract) -> float:
    """Seconds of the steps before an immediate stop begins; of all, where it begins with the first."""
    if not stop.immediate_step:
        return stop.deadline_seconds()
    return stop.deadline_seconds() - stop.deadline_seconds(is_immediate=True)


def load(
    flags: Mapping[str, str | None],
    environment: Mapping[str, str] = os.environ,
    folder: pathlib.Path | None = None,
) -> Config:
    """The configuration. `flags` by the settings' names (None: not given); `folder` is where `.env` is.

    Raises `InvalidArgument` that names the setting and where it stands.
    """
    folder = folder or pathlib.Path.cwd()
    layers, files, inherited = _outer_layers(flags, environment, folder)
    file_value = _first(layers, _CONFIG_VARIABLE)
    if file_value is None:
        return _with_document(documents.Section(None, ""), layers, folder, files, inherited)
    path = (folder / file_value.text).absolute()
    text = templates.read_private(path, setting=file_value.where)
    try:
        document = documents.Section(strict_yaml.load(text, field="--config"), "")
        return _with_document(document, layers, path.parent, [*files, path], inherited)
    except errors.InvalidArgument as error:
        raise errors.InvalidArgument(f"{path}: {error.message}", field=error.field or "--config") from error


def _with_document(
    document: documents.Section,
    layers: list[dict[str, Value]],
    base: pathlib.Path,
    files: list[pathlib.Path],
    inherited: Mapping[str, str],
) -> Config:
    layers = [*layers, _of_document(document)]
    layers.append(_of_preset(_first(layers, "LEASEHOLD_PRESET")))
    return _build(document, layers, base=base, files=files, inherited=inherited)


def _outer_layers(
    flags: Mapping[str, str | None], environment: Mapping[str, str], folder: pathlib.Path
) -> tuple[list[dict[str, Value]], list[pathlib.Path], dict[str, str]]:
    """Flags, the environment and `.env` files, the nearest first; the files; and what workers inherit."""
    given = {name: Value(text, _flag(name)) for name, text in flags.items() if text is not None}
    files = [folder / ".env"]
    plain = dotenv.read(files[0]) or {}
    which = environment.get("ENV", "").strip() or plain.get("ENV", "").strip()
    special: dict[str, str] = {}
    if which:
        if not _ENV_NAME.fullmatch(which):
            raise errors.InvalidArgument(f"ENV: {which[:40]!r} is not a name for .env.NAME", field="ENV")
        files.append(folder / f".env.{which}")
        special = dotenv.read(files[1]) or {}
    layers = [given]
    for values, where in ((environment, "environment"), (special, f".env.{which}"), (plain, ".env")):
        layers.append(_known(values, where))
    return layers, files, {**plain, **special, **environment}


def _known(values: Mapping[str, str], where: str) -> dict[str, Value]:
    """The settings among the names of a shared place. Raises `InvalidArgument` for one that is nearly one."""
    names.check_product_names(values, where)
    settings.check_near_misses(values, where=where)
    return {
        name: Value(text.strip(), where)
        for name, text in values.items()
        # An empty value in a file that is shared by several programs is no value.
        if (name in settings.NAMES or name in names.AGENT) and text.strip()
    }


def _flag(name: str) -> str:
    return f"--{names.AGENT[name][0]}" if name in names.AGENT else f"--{name.lower().replace('_', '-')}"


#: Keys of the YAML file for the agent's own settings.
_KEYS: Final = {
    "node": "LEASEHOLD_NODE",
    "state_dir": "LEASEHOLD_STATE_DIR",
    "socket": "LEASEHOLD_SOCKET",
    "preset": "LEASEHOLD_PRESET",
    "workers_cgroup": "LEASEHOLD_WORKERS_CGROUP",
    "drain_deadline_seconds": "LEASEHOLD_DRAIN_DEADLINE_SECONDS",
    "log_format": "LEASEHOLD_LOG_FORMAT",
    "log_level": "LEASEHOLD_LOG_LEVEL",
    "tls_certificate_file": "LEASEHOLD_TLS_CERTIFICATE_FILE",
    "tls_key_file": "LEASEHOLD_TLS_KEY_FILE",
    "tls_ca_file": "LEASEHOLD_TLS_CA_FILE",
}


def _of_document(document: documents.Section) -> dict[str, Value]:
    """Settings in the YAML file; in its section `settings` small letters do as well."""
    found: dict[str, Value] = {}
    for key, name in _KEYS.items():
        text = document.text(key, "")
        if text:
            found[name] = Value(text, key)
    allocators = document.take("allocators")
    if allocators is not None:
        texts = (allocators,) if isinstance(allocators, str) else documents.texts(allocators, "allocators")
        found["LEASEHOLD_ADDR"] = Value(",".join(texts), "allocators")
    section = document.section("settings")
    given = {name.upper(): section.at(name) for name in section.names()}
    settings.check_near_misses(given, where="settings")
    for name in section.names():
        if name.upper() not in settings.NAMES:
            raise documents.wrong(
                section.at(name), f"there is no such setting; known are {', '.join(sorted(settings.NAMES))}"
            )
        found[name.upper()] = Value(section.text(name, ""), section.at(name))
    return found


def _of_preset(preset: Value | None) -> dict[str, Value]:
    if preset is None:
        return {}
    if preset.text not in settings.PRESETS:
        raise errors.InvalidArgument(
            f"{preset.where}: there is no preset {preset.text[:40]!r}; known are {', '.join(settings.PRESETS)}",
            field="LEASEHOLD_PRESET",
        )
    return {name: Value(text, f"preset {preset.text}") for name, text in settings.PRESETS[preset.text].items()}


def _first(layers: Sequence[Mapping[str, Value]], name: str) -> Value | None:
    return next((layer[name] for layer in layers if name in layer), None)


def _build(
    document: documents.Section,
    layers: Sequence[Mapping[str, Value]],
    *,
    base: pathlib.Path,
    files: list[pathlib.Path],
    inherited: Mapping[str, str],
) -> Config:
    merged: dict[str, Value] = {}
    for layer in reversed(layers):
        merged.update(layer)
    found = {name: value.text for name, value in merged.items()}
    sizing = settings.parse(
        {name: text for name, text in found.items() if name in settings.NAMES},
        where={name: value.where for name, value in merged.items()},
    )
    own_templates = templates.read_templates(document)
    known = {**templates.builtin(), **own_templates}
    pools = _pools(document, known, sizing, base)
    jobs, for_jobs = job_settings.read_settings(document), job_settings.read_templates(document)
    files.extend(pool.env_file for pool in pools if pool.env_file is not None)
    labels = _labels(document)
    document.end()
    state_dir = agent_paths.state_dir(found.get("LEASEHOLD_STATE_DIR"), inherited)
    drain = found.get("LEASEHOLD_DRAIN_DEADLINE_SECONDS")
    cgroup = found.get("LEASEHOLD_WORKERS_CGROUP")
    socket_text = found.get("LEASEHOLD_SOCKET", "")
    return Config(
        node=model.checked_node_name(found.get("LEASEHOLD_NODE") or default_node(), field_name="node"),
        labels=labels,
        state_dir=state_dir,
        socket=_socket(socket_text) if socket_text else agent_paths.default_socket(state_dir),
        addresses=_addresses(merged.get("LEASEHOLD_ADDR")),
        tls_files=_tls(found),
        workers_cgroup=pathlib.Path(cgroup) if cgroup else None,
        drain_deadline_seconds=_drain(drain) if drain else None,
        log_format=_choice(found, "LEASEHOLD_LOG_FORMAT", "auto", ("auto", "json", "console")),
        log_level=_choice(found, "LEASEHOLD_LOG_LEVEL", "info", observe_logs.LEVELS),
        host=sizing.host,
        pools=pools,
        jobs=jobs,
        job_templates=MappingProxyType(dict(for_jobs)),
        environment=MappingProxyType(dict(inherited)),
        origins=MappingProxyType({name: value.where for name, value in merged.items()}),
        files=tuple(files),
    )


# Pools


def _pools(
    document: documents.Section,
    known: Mapping[str, templates.Template],
    sizing: settings.Parsed,
    base: pathlib.Path,
) -> tuple[Pool, ...]:
    found: dict[str, Pool] = {}
    for section in document.sections("pools"):
        pool = _pool(section, known, sizing, base)
        if pool.spec.name in found:
            raise documents.wrong(section.at("name"), f"there are two pools {pool.spec.name!r}")
        found[pool.spec.name] = pool
    if len(found) > model.POOLS_MAX:
        raise documents.wrong("pools", f"{len(found)} pools; at most {model.POOLS_MAX}")
    return tuple(found.values())


#: Keys of a pool that stand for a setting of all pools.
_POOL_SETTINGS: Final = {
    "min_workers": "MIN_WORKERS",
    "max_workers": "MAX_WORKERS",
    "worker_memory_limit_gb": "WORKER_MEMORY_LIMIT_GB",
    "memory_threshold_gb": "MEMORY_THRESHOLD_GB",
    "enable_auto_scaling": "ENABLE_AUTO_SCALING",
}


def _pool(
    section: documents.Section,
    known: Mapping[str, templates.Template],
    sizing: settings.Parsed,
    base: pathlib.Path,
) -> Pool:
    name = model.checked_pool_name(section.text("name"), field_name=section.at("name"))
    template_name = section.text("template")
    template = known.get(template_name)
    if template is None:
        raise documents.wrong(
            section.at("template"),
            f"there is no template {template_name[:63]!r}; known are {', '.join(sorted(known))}",
        )
    given = section.take("parameters") or {}
    own = {
        setting: (section.text(key), section.at(key))
        for key, setting in _POOL_SETTINGS.items()
        if key in section
    }
    for key in _POOL_SETTINGS:
        section.take(key)
    stop = templates.read_stop(section, template.parameters) or template.stop
    restart = templates.read_restart(section, template.restart)
    priority = section.whole("priority", 0, least=-1000, most=1000)
    env, env_file = section.variables("env"), section.text("env_file", "")
    log = _log_settings(section, template)
    # Before what may be missing is missed: it may stand there under a mistyped name.
    section.end()
    values = template.values(given, section.at("parameters"))
    spec = settings.pool_spec(
        name=name,
        template=template_name,
        parameters={key: _shown(value) for key, value in values.items()},
        priority=priority,
        defaults=sizing,
        own={setting: text for setting, (text, _) in own.items()},
        where={setting: where for setting, (_, where) in own.items()},
        stop=templates.contract(stop, values),
        restart=restart,
    )
    return Pool(
        spec=spec,
        template=template,
        values=values,
        env=env,
        env_file=base / env_file if env_file else None,
        log=log,
    )


def _shown(value: templates.Value) -> str:
    return value if isinstance(value, str) else " ".join(value)


def _log_settings(section: documents.Section, template: templates.Template) -> worker_values.LogSettings:
    inner = section.section("log")
    megabytes = inner.number("max_mb", 50.0, least=0.01, most=100_000.0)
    keep = inner.whole("keep", 5, least=1, most=1000)
    inner.end()
    return worker_values.LogSettings(
        max_bytes=int(megabytes * _MIB), keep=keep, is_reopened=template.log_reopens_on == "rename"
    )


# Single values


def default_node() -> str:
    """This host's name as a node's."""
    return _FOREIGN.sub("-", socket.gethostname().lower()).strip("-.")[:63] or "node"


def _socket(text: str) -> pathlib.Path:
    name = "LEASEHOLD_SOCKET"
    path = text.removeprefix("unix:")
    if "/" not in path and ":" in path:
        raise documents.wrong(
            name, f"{text[:60]!r} is no path: the agent's API is offered on a Unix socket only"
        )
    return pathlib.Path(addresses.parse(f"unix:{pathlib.Path(path).absolute()}", setting=name).path)


def _labels(document: documents.Section) -> Mapping[str, str]:
    section = document.section("labels")
    found = {name: section.text(name, "") for name in section.names()}
    if len(found) > _LABELS_MAX:
        raise documents.wrong("labels", f"{len(found)} labels; at most {_LABELS_MAX}")
    for name, text in found.items():
        if not name or max(len(name), len(text)) > _LABEL_LENGTH_MAX:
            raise documents.wrong(f"labels.{name}", f"longer than {_LABEL_LENGTH_MAX} characters, or empty")
    return MappingProxyType(found)


def _addresses(value: Value | None) -> tuple[str, ...]:
    text = DEFAULT_ADDRESS if value is None else value.text
    if text == "none":
        return ()
    where = "LEASEHOLD_ADDR" if value is None else value.where
    parts = [part.strip() for part in text.split(",") if part.strip()]
    return tuple(dict.fromkeys(str(addresses.parse(part, setting=where)) for part in parts))


def _tls(found: Mapping[str, str]) -> tls.TlsFiles | None:
    kinds = ("certificate_file", "key_file", "ca_file")
    paths = {kind: found.get(f"LEASEHOLD_TLS_{kind.upper()}") for kind in kinds}
    if not any(paths.values()):
        return None
    return tls.TlsFiles(
        **{kind: pathlib.Path(path) if path else None for kind, path in paths.items()},
        setting_prefix="LEASEHOLD_TLS_",
    )


def _drain(text: str) -> float:
    name = "LEASEHOLD_DRAIN_DEADLINE_SECONDS"
    try:
        return documents.number(float(text), name, most=DRAIN_SECONDS_MAX)
    except ValueError:
        raise documents.wrong(name, f"{text[:40]!r} is not a number of seconds") from None


def _choice(found: Mapping[str, str], name: str, default: str, allowed: Sequence[str]) -> str:
    text = found.get(name, default).lower()
    if text not in allowed:
        raise documents.wrong(name, f"{text[:40]!r} is none of {', '.join(allowed)}")
    return text


def with_fixed(config: Config, running: Config) -> Config:
    """`config` with what a running agent cannot change as it is."""
    return dataclasses.replace(
        config,
        node=running.node,
        state_dir=running.state_dir,
        socket=running.socket,
        addresses=running.addresses,
        tls_files=running.tls_files,
        workers_cgroup=running.workers_cgroup,
    )


def without_pools(flags: Mapping[str, str | None]) -> Config:
    """What the flags say, with no pool and no allocator: for ending what an agent left."""
    return load({**flags, "LEASEHOLD_ADDR": "none"}, {}, pathlib.Path(os.devnull).parent)
