"""Keeps secrets out of the log: by the name of a key, and by the shape of a text."""

import re
from collections.abc import Mapping
from typing import Final

REDACTED: Final = "[redacted]"

TEXT_CHARACTERS_MAX: Final = 16_384
_DEPTH_MAX: Final = 6
_ITEMS_MAX: Final = 256

# The last word of a key decides: `join_token` is hidden; `tokens`, `token_count`, `max_tokens_per_request` (the
# quantities this product is about) and `password_file` (a path) are not.
_SECRET_LAST_WORDS: Final = frozenset(
    {
        *("password", "passwd", "pwd", "passphrase", "pgpassword", "secret", "secrets", "token"),
        *("authorization", "cookie", "credential", "credentials", "apikey"),
    }
)
_SECRET_LAST_TWO_WORDS: Final = frozenset(
    (kind, "key") for kind in ("api", "private", "access", "signing", "secret", "tls")
)
_WORD_BREAK: Final = re.compile(r"[^A-Za-z0-9]+|(?<=[a-z0-9])(?=[A-Z])")

_SHAPES: Final = (
    # postgres://user:password@host — up to the last @ before the path, as a password may hold one.
    re.compile(r"(?P<keep>\b[a-z][a-z0-9+.-]*://[^\s:/?#@]*:)[^\s/?#]+(?=@)", re.IGNORECASE),
    # libpq's keywords, query strings and reprs: password=…, password='…', "api_key": "…"
    re.compile(
        r"(?P<keep>\b(?:[a-z0-9]+[_-])*(?:password|passwd|passphrase|secret|token|api_?key)[\"']?\s*[=:]\s*)"
        r"(?:'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"|[^\s&,;'\"(){}]+)",
        re.IGNORECASE,
    ),
    re.compile(r"(?P<keep>\b(?:bearer|basic)\s+)[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE),
    re.compile(r"(?P<keep>-----BEGIN [A-Z ]*PRIVATE KEY-----).*?(?=-----END|\Z)", re.DOTALL),
)
# One cheap scan that most texts fail, in place of four.
_MAY_HOLD_SECRET: Final = re.compile(r"://|pass|secret|token|key|bearer|basic", re.IGNORECASE)


def is_secret_key(key: str) -> bool:
    """Whether values under this key are never to be shown: ``dsn_password``, ``apiKey``, ``JOIN_TOKEN``."""
    words = [word.lower() for word in _WORD_BREAK.split(key) if word]
    if not words:
        return False
    return words[-1] in _SECRET_LAST_WORDS or tuple(words[-2:]) in _SECRET_LAST_TWO_WORDS


def redact_text(text: str) -> str:
    """The text without passwords in URLs and DSNs, bearer tokens and private keys, cut to a sane length."""
    if len(text) > TEXT_CHARACTERS_MAX:
        # The end of a traceback tells more than its start, so both are kept.
        half = TEXT_CHARACTERS_MAX // 2
        text = f"{text[:half]} … {len(text) - 2 * half} characters left out … {text[-half:]}"
    if _MAY_HOLD_SECRET.search(text) is None:
        return text
    for shape in _SHAPES:
        text = shape.sub(rf"\g<keep>{REDACTED}", text)
    return text


def redact(value: object, *, depth: int = 0) -> object:
    """A copy of a logged value without secrets; containers are followed six deep, 256 items each."""
    if isinstance(value, str):
        return redact_text(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if depth >= _DEPTH_MAX:
        return "…"
    if isinstance(value, Mapping):
        items = list(value.items())[:_ITEMS_MAX]
        return {
            str(key): REDACTED if is_secret_key(str(key)) and item else redact(item, depth=depth + 1)
            for key, item in items
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [redact(item, depth=depth + 1) for item in list(value)[:_ITEMS_MAX]]
    # Paths, enumerations, exceptions, messages: as they print, since that is what would reach the log.
    return redact_text(str(value))
