"""Reading of a user's document, part by part: each wrong value is told with the place where it stands."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

from leasehold.core import errors

T = TypeVar("T")

_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def wrong(where: str, what: str) -> errors.InvalidArgument:
    """The error for a value at `where`."""
    return errors.InvalidArgument(f"{where}: {what}", field=where)


class Section:
    """A mapping with known keys. What is taken is checked; what is left at `end` is refused."""

    def __init__(self, value: object, where: str) -> None:
        if value is None:
            value = {}
        if not isinstance(value, Mapping):
            raise wrong(where, f"{_shown(value)} is not a mapping")
        self.where = where
        self._left = dict(value)
        self._known: list[str] = []

    def __contains__(self, key: str) -> bool:
        return self._left.get(key) is not None

    def at(self, key: str) -> str:
        """Where the key's value stands, for an error."""
        return f"{self.where}.{key}" if self.where else key

    def take(self, key: str) -> Any:
        """The value as it is; None if there is none."""
        self._known.append(key)
        return self._left.pop(key, None)

    def text(self, key: str, default: str | None = None) -> str:
        """A text; a number or a truth value is taken as it is written. Without a default it must be there."""
        value = self.take(key)
        if value is None:
            if default is None:
                raise wrong(self.at(key), "is missing")
            return default
        return scalar(value, self.at(key))

    def number(self, key: str, default: float, *, least: float = 0.0, most: float = 1e9) -> float:
        """A finite number within bounds."""
        value = self.take(key)
        return default if value is None else number(value, self.at(key), least=least, most=most)

    def whole(self, key: str, default: int, *, least: int = 0, most: int = 2**31 - 1) -> int:
        """A whole number within bounds."""
        value = self.take(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise wrong(self.at(key), f"{_shown(value)} is not a whole number of {least} to {most}")
        return value

    def truth(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self.take(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise wrong(self.at(key), f"{_shown(value)} is neither true nor false")
        return value

    def choice(self, key: str, default: str, allowed: Sequence[str]) -> str:
        """One of some words."""
        value = self.text(key, default)
        if value not in allowed:
            raise wrong(self.at(key), f"{value[:60]!r} is none of {', '.join(allowed)}")
        return value

    def texts(self, key: str, default: tuple[str, ...] | None = None) -> tuple[str, ...]:
        """A list of texts; without a default it must be there, and not be empty."""
        value = self.take(key)
        if value is None:
            if default is None:
                raise wrong(self.at(key), "is missing")
            return default
        return texts(value, self.at(key)) if value or default is None else default

    def section(self, key: str) -> "Section":
        """A mapping inside; an empty one where there is none."""
        return Section(self.take(key), self.at(key))

    def sections(self, key: str) -> "list[Section]":
        """A list of mappings."""
        value = self.take(key)
        if value is None:
            return []
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise wrong(self.at(key), f"{_shown(value)} is not a list")
        return [Section(item, f"{self.at(key)}[{place}]") for place, item in enumerate(value)]

    def named(self, key: str, read: "Callable[[str, Section], T]") -> dict[str, T]:
        """A mapping of names to mappings, each read by `read`."""
        value = self.take(key)
        inner = Section(value, self.at(key))
        return {name: read(name, Section(inner.take(name), inner.at(name))) for name in inner.names()}

    def names(self) -> list[str]:
        """Keys that were not taken yet. Raises `InvalidArgument` for one that is no text."""
        for key in self._left:
            if not isinstance(key, str):
                raise wrong(self.where, f"the key {_shown(key)} is not a text")
        return list(self._left)

    def variables(self, key: str) -> dict[str, str]:
        """Environment variables."""
        inner = self.section(key)
        found = {}
        for name in inner.names():
            if not _VARIABLE.fullmatch(name):
                raise wrong(inner.at(name), "is not the name of an environment variable")
            found[name] = inner.text(name, "")
        return found

    def end(self) -> None:
        """Raise `InvalidArgument` for the first key that nobody has taken, with the one it may have meant."""
        import difflib  # only a mistake needs it

        for key in self.names():
            near = difflib.get_close_matches(key, self._known, n=1)
            meant = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(sorted(self._known))}"
            raise wrong(self.at(key), f"there is no such setting{meant}")


def scalar(value: object, where: str) -> str:
    """A text, number or truth value as a text."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int | float):
        text = str(value)
        if "\0" in text:
            raise wrong(where, "has a NUL character")
        return text
    raise wrong(where, f"{_shown(value)} is not a text")


def texts(value: object, where: str) -> tuple[str, ...]:
    """A list of texts, not empty."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise wrong(where, f"{_shown(value)} is not a list of texts")
    return tuple(scalar(item, f"{where}[{place}]") for place, item in enumerate(value))


def number(value: object, where: str, *, least: float = 0.0, most: float = 1e9) -> float:
    """A finite number within bounds."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not least <= value <= most:  # type: ignore[arg-type,operator]
        raise wrong(where, f"{_shown(value)} is not a number of {least:g} to {most:g}")
    return float(value)  # type: ignore[arg-type]


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
