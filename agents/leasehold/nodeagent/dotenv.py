"""Files of `NAME=value` lines, as programs of one project share them.

Told apart as the common readers do it: `export` before a name, quotes, and a comment after a blank and `#`.
Nothing is expanded: `$` and backquotes are plain characters.
"""

import pathlib
import re
from typing import Final

from leasehold.core import errors

TEXT_BYTES_MAX: Final = 1 << 20

_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")
_START: Final = re.compile(r"[ \t]*(?:export[ \t]+)?(?P<name>[^\s=#'\"]+)[ \t]*(?P<equals>=?)")
_BLANK: Final = re.compile(r"[ \t]*(?:#[^\n]*)?")
_BLANKS: Final = re.compile(r"[ \t]*")
_COMMENT: Final = re.compile(r"[ \t]+#.*")
_QUOTED: Final = {
    "'": re.compile(r"'((?:[^'\\]|\\.)*)'", re.DOTALL),
    '"': re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL),
}
_ESCAPE: Final = re.compile(r"\\(.)", re.DOTALL)
_ESCAPES: Final = {"n": "\n", "t": "\t", "r": "\r"}


def read(path: pathlib.Path) -> dict[str, str] | None:
    """The values of a file; None if there is none. Raises `InvalidArgument` naming file and line."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise errors.InvalidArgument(f"{path}: {error.strerror}", field=str(path)) from error
    if len(data) > TEXT_BYTES_MAX:
        raise errors.InvalidArgument(f"{path}: larger than 1 MiB", field=str(path))
    try:
        return parse(data.decode("utf-8-sig"), where=str(path))
    except UnicodeDecodeError as error:
        raise errors.InvalidArgument(f"{path}: is not UTF-8", field=str(path)) from error


def parse(text: str, *, where: str = ".env") -> dict[str, str]:
    """Names and values of a text; of a name given twice, the last. A bare name sets nothing.

    Raises `InvalidArgument` naming `where` and the line.
    """
    text = text.replace("\r\n", "\n")
    values: dict[str, str] = {}
    position = 0
    while position < len(text):
        end = _end_of_line(text, position)
        if _BLANK.fullmatch(text, position, end):
            position = end + 1
            continue
        start = _START.match(text, position, end)
        if start is None or not _NAME.fullmatch(start["name"]):
            raise _wrong(text, position, where, "is not NAME=value")
        if not start["equals"]:
            if not _BLANK.fullmatch(text, start.end(), end):
                raise _wrong(text, position, where, "is not NAME=value")
            position = end + 1
            continue
        values[start["name"]], position = _value(text, start.end(), where)
    return values


def _value(text: str, position: int, where: str) -> tuple[str, int]:
    """The value that begins at `position`, and where the next line begins."""
    blanks = _BLANKS.match(text, position)
    first = blanks.end() if blanks is not None else position
    quote = text[first : first + 1]
    if quote in _QUOTED:
        quoted = _QUOTED[quote].match(text, first)
        if quoted is None:
            raise _wrong(text, position, where, f"has a {quote} that is not closed")
        end = _end_of_line(text, quoted.end())
        if not _BLANK.fullmatch(text, quoted.end(), end):
            raise _wrong(text, quoted.end(), where, "goes on after the closing quote")
        return _unescaped(quoted[1], quote), end + 1
    end = _end_of_line(text, position)
    return _COMMENT.sub("", text[position:end]).strip(), end + 1


def _unescaped(text: str, quote: str) -> str:
    if quote == "'":
        return text.replace("\\'", "'").replace("\\\\", "\\")
    return _ESCAPE.sub(lambda found: _ESCAPES.get(found[1], found[1]), text)


def _end_of_line(text: str, position: int) -> int:
    end = text.find("\n", position)
    return len(text) if end < 0 else end


def _wrong(text: str, position: int, where: str, what: str) -> errors.InvalidArgument:
    # Not the line itself: it may hold a password.
    line = text.count("\n", 0, position) + 1
    return errors.InvalidArgument(f"{where}: line {line} {what}", field=where)
