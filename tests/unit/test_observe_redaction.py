from pathlib import Path

import pytest
from leasehold.observe import redaction

CANARY = "c4n4ry"


@pytest.mark.parametrize(
    "key",
    [
        *("password", "PASSWORD", "postgres_password", "PGPASSWORD", "token", "joinToken", "access-token"),
        *("api_key", "apiKey", "tls_private_key", "client_secret", "Authorization", "set-cookie", "passphrase"),
    ],
)
def test_keys_of_secrets_are_known(key: str) -> None:
    assert redaction.is_secret_key(key)


@pytest.mark.parametrize(
    "key",
    [
        *("tokens", "tpm_limit", "max_tokens_per_request", "token_count", "password_file", "tls_key_file"),
        *("key", "etcd_key", "request_id", "primary_keys", "secretary", "", "_"),
    ],
)
def test_quantities_paths_and_ordinary_keys_stay_readable(key: str) -> None:
    assert not redaction.is_secret_key(key)


@pytest.mark.parametrize(
    "text",
    [
        f"postgresql://user:{CANARY}@db:5432/x?sslmode=require",
        f"postgresql://user:p@{CANARY}@db/x",
        f"redis://:{CANARY}@cache",
        f"host=db user=u password={CANARY} dbname=x",
        f"host=db password='it\\'s {CANARY}' dbname=x",
        f"GET /v1?api_key={CANARY}&x=1",
        f'{{"token": "{CANARY}", "x": 1}}',
        f"{{'db_password': '{CANARY}'}}",
        f"Authorization: Bearer {CANARY}{CANARY}",
        f"-----BEGIN EC PRIVATE KEY-----\n{CANARY}\n-----END EC PRIVATE KEY-----",
        f"-----BEGIN PRIVATE KEY-----\n{CANARY}",
    ],
)
def test_secrets_inside_texts_are_hidden(text: str) -> None:
    assert CANARY not in redaction.redact_text(text)
    assert redaction.REDACTED in redaction.redact_text(text)


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://db:5432/x",
        "http://127.0.0.1:8080/metrics",
        "reserved tokens=1200 of 40000",
        "user@host: permission denied",
        "a basic example of it",
        "",
    ],
)
def test_texts_without_secrets_are_left_alone(text: str) -> None:
    assert redaction.redact_text(text) == text


def test_what_stays_of_a_url_says_which_server_it_was() -> None:
    assert redaction.redact_text(f"postgres://u:{CANARY}@db:5432/x") == "postgres://u:[redacted]@db:5432/x"


def test_nested_values_are_followed_and_objects_become_what_they_print() -> None:
    class Settings:
        def __repr__(self) -> str:
            return f"Settings(password='{CANARY}')"

    value = {"db": [{"password": CANARY, "port": 1}], "path": Path("/a"), "settings": Settings(), "none": None}
    assert redaction.redact(value) == {
        "db": [{"password": "[redacted]", "port": 1}],
        "path": "/a",
        "settings": "Settings(password=[redacted])",
        "none": None,
    }


def test_depth_and_length_are_bounded() -> None:
    deep: object = CANARY
    for _ in range(100):
        deep = [deep]
    assert CANARY not in str(redaction.redact(deep))
    assert len(redaction.redact_text("x" * 1_000_000)) < 17_000
    assert len(redaction.redact(list(range(10_000)))) == 256  # type: ignore[arg-type]
