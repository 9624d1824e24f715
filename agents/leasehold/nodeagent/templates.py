"""Command templates: what an agent may run. Lists of arguments with typed parameters; there is no shell.

Only files of this host declare them (the built-in ones, and the agent's own configuration), so nobody who
reaches the control plane can run anything that the host's administrator did not write down.
"""

import dataclasses
import functools
import os
import pathlib
import re
import signal
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from leasehold.core import errors
from leasehold.core.node import model
from leasehold.nodeagent import documents
from leasehold.runtime import strict_yaml

BUILTIN: Final = pathlib.Path(__file__).with_name("builtin_templates.yaml")
#: Filled in by the agent for each worker; no parameter may have such a name.
FACTS: Final = ("worker", "pool_name", "node", "log_file", "interpreter")

Value = str | tuple[str, ...]
Values = Mapping[str, Value]

_NAME: Final = re.compile(r"[a-z][a-z0-9_-]{0,62}")
_PARAMETER: Final = re.compile(r"[a-z][a-z0-9_]{0,62}")
_PLACE: Final = re.compile(r"\{\{|\}\}|\{([a-z][a-z0-9_]*)\}|[{}]")
_SECONDS: Final = re.compile(r"\{([a-z][a-z0-9_]*)\}(?: *\+ *([0-9]+(?:\.[0-9]+)?))?")
_SECONDS_MAX: Final = 7 * 86_400.0
_DEPTH_KINDS: Final = ("redis", "rabbitmq", "url")


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """What a pool may set. `default` None: it must. A default may name facts."""

    name: str
    pattern: re.Pattern[str]
    default: str | None = None
    is_list: bool = False
    help: str = ""

    def checked(self, value: str, where: str) -> str:
        """`value` if the whole of it matches, else raises `InvalidArgument`."""
        if "\0" not in value and self.pattern.fullmatch(value):
            return value
        shown = repr(value if len(value) <= 60 else value[:57] + "...")
        told = f" ({self.help})" if self.help else ""
        raise documents.wrong(where, f"{shown} does not match {self.pattern.pattern!r}{told}")


@dataclass(frozen=True, slots=True)
class Seconds:
    """A time: fixed, or a parameter's value and so much more."""

    more: float
    parameter: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A step of a stop contract, nothing filled in."""

    signal: str
    wait: Seconds
    scope: model.SignalScope


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """A stop contract, nothing filled in."""

    steps: tuple[Step, ...]
    immediate_step: int
    visibility_timeout: Seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Depth:
    """What tells how much waits."""

    #: redis, rabbitmq, or url: by the scheme of the address.
    kind: str
    url_variable: str
    queues: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What is looked at before a pool's first worker."""

    #: broker, database (passed over where its variable is not set) or command.
    kind: str
    url_variable: str = ""
    argv: tuple[str, ...] = ()
    timeout_seconds: float = 30.0
    #: A failure is told, and the pool starts nevertheless.
    is_warning: bool = False
    advice: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """One way to run a worker."""

    name: str
    description: str
    argv: tuple[str, ...]
    parameters: Mapping[str, Parameter]
    cwd: str = ""
    env: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    env_pass: tuple[str, ...] = ()
    stop: Stop | None = None
    restart: model.RestartPolicy = field(default_factory=model.RestartPolicy)
    #: "rename", the name of a signal, or "": never.
    log_reopens_on: str = ""
    depth: Depth | None = None
    preflight: tuple[Check, ...] = ()

    def values(self, given: Mapping[str, object], where: str) -> Values:
        """What a pool gives, checked, with the defaults of the rest (their facts not filled in).

        Raises `InvalidArgument` naming the parameter: unknown, missing, or not of its pattern.
        """
        section = documents.Section(given, where)
        found: dict[str, Value] = {}
        for parameter in self.parameters.values():
            at = section.at(parameter.name)
            if parameter.name not in section:
                section.take(parameter.name)
                if parameter.default is None:
                    told = f" ({parameter.help})" if parameter.help else ""
                    raise documents.wrong(at, f"is missing: template {self.name!r} needs it{told}")
                found[parameter.name] = (
                    _split(parameter.default, at) if parameter.is_list else parameter.default
                )
            elif parameter.is_list:
                items = section.take(parameter.name)
                words = _split(items, at) if isinstance(items, str) else documents.texts(items, at)
                found[parameter.name] = tuple(parameter.checked(word, at) for word in words)
            else:
                found[parameter.name] = parameter.checked(section.text(parameter.name), at)
        section.end()
        return found

    def known(self, values: Values, facts: Mapping[str, str]) -> Values:
        """Values and facts of one worker; facts in defaults are filled in and the results checked."""
        filled: dict[str, Value] = dict(facts)
        for name, value in values.items():
            parameter = self.parameters[name]
            if isinstance(value, str) and value == parameter.default and _PLACE.search(value):
                filled[name] = parameter.checked(_filled(value, facts), name)
            else:
                filled[name] = value
        return filled


def fill_argv(argv: Sequence[str], known: Values) -> list[str]:
    """Arguments with their places filled in. A list becomes its items; what names an empty text is left out."""
    found: list[str] = []
    for text in argv:
        places = [place[1] for place in _PLACE.finditer(text) if place[1]]
        whole = _PLACE.fullmatch(text)
        value = known[whole[1]] if whole is not None and whole[1] else None
        if isinstance(value, tuple):
            found.extend(value)
        elif not any(known[name] == "" for name in places):
            found.append(_filled(text, known))
    return found


def fill(text: str, known: Values) -> str:
    """A text with its places filled in; a list with commas between."""
    return _filled(text, known)


def filled_check(check: Check, known: Values) -> Check:
    """A check with its places filled in."""
    return dataclasses.replace(check, argv=tuple(fill_argv(check.argv, known)))


def _split(text: str, where: str) -> tuple[str, ...]:
    import shlex  # only a pool that writes a list as one text needs it

    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise documents.wrong(where, f"cannot be split into words: {error}") from error


def _filled(text: str, values: Values) -> str:
    def replaced(place: re.Match[str]) -> str:
        if place[1] is None:
            return place[0][0]
        value = values[place[1]]
        return value if isinstance(value, str) else ",".join(value)

    return _PLACE.sub(replaced, text)


def seconds(given: Seconds, values: Values) -> float:
    """A time with its parameter filled in. Raises `InvalidArgument` if that is no number of seconds."""
    if not given.parameter:
        return given.more
    value = values[given.parameter]
    try:
        found = float(value) + given.more if isinstance(value, str) else -1.0
    except ValueError:
        found = -1.0
    if not 0.0 <= found <= _SECONDS_MAX:
        raise documents.wrong(given.parameter, f"{value!r} is not a number of seconds")
    return found


def contract(stop: Stop | None, values: Values) -> model.StopContract:
    """The stop contract for a pool's values; the plain one where the template has none."""
    if stop is None:
        return model.PLAIN_STOP
    return model.StopContract(
        steps=tuple(
            model.StopStep(
                signal=_signal(_filled(step.signal, values), "stop"),
                wait_seconds=seconds(step.wait, values),
                scope=step.scope,
            )
            for step in stop.steps
        ),
        immediate_step=stop.immediate_step,
        visibility_timeout_seconds=seconds(stop.visibility_timeout, values),
    )


# Reading


def read_template(name: str, section: documents.Section, *, facts: Sequence[str] = FACTS) -> Template:
    """One template; `facts` are filled in by the agent. Raises `InvalidArgument` naming the place."""
    if not _NAME.fullmatch(name):
        raise documents.wrong(section.where, "a template's name is of a-z, 0-9, '_', '-'")
    parameters = section.named("parameters", lambda each, inner: _read_parameter(each, inner, facts))
    log = section.section("log")
    reopens_on = log.text("reopens_on", "")
    if reopens_on not in ("", "rename"):
        reopens_on = _signal(reopens_on, log.at("reopens_on"))
    log.end()
    template = Template(
        name=name,
        description=section.text("description", ""),
        argv=section.texts("argv"),
        parameters=parameters,
        cwd=section.text("cwd", ""),
        env=section.variables("env"),
        env_pass=section.texts("env_pass", ()),
        stop=read_stop(section, parameters),
        restart=read_restart(section),
        log_reopens_on=reopens_on,
        depth=_read_depth(section),
        preflight=tuple(_read_check(check) for check in section.sections("preflight")),
    )
    section.end()
    _check_places(template, section.where, facts)
    return template


def _read_parameter(name: str, section: documents.Section, facts: Sequence[str]) -> Parameter:
    if not _PARAMETER.fullmatch(name) or name in facts:
        raise documents.wrong(section.where, "is not a name for a parameter")
    pattern_text = section.text("pattern")
    try:
        pattern = re.compile(pattern_text)
    except re.error as error:
        raise documents.wrong(section.at("pattern"), f"is no regular expression: {error}") from error
    parameter = Parameter(
        name=name,
        pattern=pattern,
        default=section.text("default", "") if "default" in section else section.take("default"),
        is_list=section.truth("is_list", False),
        help=section.text("help", ""),
    )
    section.end()
    default = parameter.default
    if default:
        at = section.at("default")
        for place in _PLACE.finditer(default):
            if place[1] not in (None, *facts):
                raise documents.wrong(at, f"{place[0]} is none of {', '.join(facts)}")
        if not _PLACE.search(default):
            for word in _split(default, at) if parameter.is_list else (default,):
                parameter.checked(word, at)
    return parameter


def _read_depth(section: documents.Section) -> Depth | None:
    if "depth" not in section:
        section.take("depth")
        return None
    inner = section.section("depth")
    depth = Depth(
        kind=inner.choice("kind", "url", _DEPTH_KINDS),
        url_variable=inner.text("url_variable"),
        queues=inner.text("queues"),
    )
    inner.end()
    return depth


def _read_check(section: documents.Section) -> Check:
    kind = section.choice("kind", "", ("broker", "database", "command"))
    if kind in ("broker", "database"):
        check = Check(kind=kind, url_variable=section.text("url_variable"))
    else:
        check = Check(
            kind=kind,
            argv=section.texts("argv"),
            timeout_seconds=section.number("timeout_seconds", 30.0, least=0.1, most=3600.0),
            is_warning=section.truth("is_warning", False),
            advice=section.text("advice", ""),
        )
    section.end()
    return check


def read_stop(section: documents.Section, parameters: Mapping[str, Parameter]) -> Stop | None:
    """The key `stop` of a template or a pool; None if there is none."""
    if "stop" not in section:
        section.take("stop")
        return None
    inner = section.section("stop")
    steps = tuple(_read_step(step, parameters) for step in inner.sections("steps"))
    if not steps:
        raise documents.wrong(inner.at("steps"), "at least one is needed")
    stop = Stop(
        steps=steps,
        immediate_step=inner.whole("immediate_step", 0, least=0, most=len(steps) - 1),
        visibility_timeout=_read_seconds(inner, "visibility_timeout_seconds", parameters, default=0.0),
    )
    inner.end()
    return stop


def _read_step(section: documents.Section, parameters: Mapping[str, Parameter]) -> Step:
    name = section.text("signal")
    place = _PLACE.fullmatch(name)
    if place is None or place[1] not in parameters:
        name = _signal(name, section.at("signal"))
    step = Step(
        signal=name,
        wait=_read_seconds(section, "wait_seconds", parameters),
        scope=model.SignalScope(section.choice("scope", "main", [scope.value for scope in model.SignalScope])),
    )
    section.end()
    return step


def _signal(name: str, where: str) -> str:
    short = name.upper().removeprefix("SIG")
    if f"SIG{short}" not in signal.Signals.__members__:
        raise documents.wrong(where, f"there is no signal {name[:20]!r}")
    return short


def _read_seconds(
    section: documents.Section, key: str, parameters: Mapping[str, Parameter], default: float | None = None
) -> Seconds:
    at = section.at(key)
    value = section.take(key)
    if value is None:
        if default is None:
            raise documents.wrong(at, "is missing")
        return Seconds(default)
    if not isinstance(value, str):
        return Seconds(documents.number(value, at, most=_SECONDS_MAX))
    found = _SECONDS.fullmatch(value)
    if found is None or found[1] not in parameters:
        raise documents.wrong(at, f"{value[:60]!r} is neither a number nor '{{parameter}} + number'")
    return Seconds(float(found[2] or 0), found[1])


def read_restart(section: documents.Section, base: model.RestartPolicy | None = None) -> model.RestartPolicy:
    """The key `restart` of a template or a pool, over `base`."""
    base = base or model.RestartPolicy()
    inner = section.section("restart")
    initial = inner.number("initial_seconds", base.initial_seconds, least=0.01, most=3600.0)
    most = inner.number("max_seconds", max(base.max_seconds, initial), least=0.01, most=86_400.0)
    if most < initial:
        raise documents.wrong(inner.at("max_seconds"), f"{most:g} is below initial_seconds, {initial:g}")
    codes = inner.take("permanent_exit_codes")
    if codes is None:
        permanent = base.permanent_exit_codes
    else:
        at = inner.at("permanent_exit_codes")
        if not isinstance(codes, Sequence) or not all(type(code) is int and 1 <= code <= 255 for code in codes):
            raise documents.wrong(at, "is not a list of exit codes, 1 to 255")
        permanent = frozenset(codes)
    reset_after = inner.number("reset_after_seconds", base.reset_after_seconds, most=86_400.0)
    inner.end()
    return model.RestartPolicy(
        initial_seconds=initial,
        max_seconds=most,
        reset_after_seconds=reset_after,
        permanent_exit_codes=permanent,
    )


def _check_places(template: Template, where: str, facts: Sequence[str]) -> None:
    """Every {place} is a parameter or a fact, and a list stands alone in an item of argv."""
    texts = {f"argv[{place}]": text for place, text in enumerate(template.argv)}
    texts |= {f"env.{name}": text for name, text in template.env.items()}
    texts["cwd"] = template.cwd
    if template.depth is not None:
        texts["depth.queues"] = template.depth.queues
    for number, check in enumerate(template.preflight):
        texts |= {f"preflight[{number}].argv[{place}]": text for place, text in enumerate(check.argv)}
    for at, text in texts.items():
        for place in _PLACE.finditer(text):
            name = place[1]
            if name is None:
                if len(place[0]) == 1:
                    raise documents.wrong(f"{where}.{at}", f"a single {place[0]} (write it twice to mean it)")
                continue
            parameter = template.parameters.get(name)
            if parameter is None and name not in facts:
                raise documents.wrong(f"{where}.{at}", f"{{{name}}} is no parameter of this template")
            if parameter is not None and parameter.is_list and (place[0] != text or "argv" not in at):
                raise documents.wrong(
                    f"{where}.{at}", f"{place[0]} is a list: it stands alone in an item of argv"
                )


def read_templates(section: documents.Section) -> Mapping[str, Template]:
    """The key `templates` of a document."""
    return MappingProxyType(section.named("templates", read_template))


@functools.cache
def builtin() -> Mapping[str, Template]:
    """The templates that every host has."""
    document = documents.Section(strict_yaml.load(BUILTIN.read_text(encoding="utf-8"), field="templates"), "")
    found = read_templates(document)
    document.end()
    return found


def read_private(path: pathlib.Path, *, setting: str) -> str:
    """The text of a file that decides what is run.

    Raises `InvalidArgument` if it cannot be read, or if others than its owner could have written it, or if its
    owner is neither root nor this user.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            data = file.read(strict_yaml.TEXT_BYTES_MAX + 1)
    except OSError as error:
        raise errors.InvalidArgument(f"{setting}: {path}: {error.strerror}", field=setting) from error
    if stat.S_IMODE(status.st_mode) & (stat.S_IWGRP | stat.S_IWOTH):
        raise errors.InvalidArgument(
            f"{setting}: {path} can be written by its group or by others, who could then run what they like; "
            f"chmod go-w {path}",
            field=setting,
        )
    if status.st_uid not in (0, os.geteuid()):
        raise errors.InvalidArgument(
            f"{setting}: {path} belongs to user {status.st_uid}, neither to root nor to this user; chown it",
            field=setting,
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise errors.InvalidArgument(f"{setting}: {path}: is not UTF-8", field=setting) from error
