from pathlib import Path

import pytest
from leasehold.core import errors
from leasehold.nodeagent import dotenv


def test_a_block_with_comments_behind_values_parses() -> None:
    text = """
# Workers
MEMORY_THRESHOLD_GB=8      # at least so much stays free
MAX_WORKERS=6              # per host
MIN_WORKERS=1
MEMORY_CHECK_INTERVAL=30   # seconds
WORKER_MEMORY_LIMIT_GB=4
ENABLE_AUTO_SCALING=true   # false: starts paused
"""

    assert dotenv.parse(text) == {
        "MEMORY_THRESHOLD_GB": "8",
        "MAX_WORKERS": "6",
        "MIN_WORKERS": "1",
        "MEMORY_CHECK_INTERVAL": "30",
        "WORKER_MEMORY_LIMIT_GB": "4",
        "ENABLE_AUTO_SCALING": "true",
    }


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("A=", ""),
        ("A= # only a comment", ""),
        ("A=#no-comment", "#no-comment"),
        ("A=redis://h/0#frag", "redis://h/0#frag"),
        ("A = spaced out ", "spaced out"),
        ("export A=exported", "exported"),
        ("\tA='it''s' ", None),
        ("A='sin#gle' # c", "sin#gle"),
        (r"A='it\'s \\ $HOME'", r"it's \ $HOME"),
        (r'A="two\nlines\t\"q\" \\"', 'two\nlines\t"q" \\'),
        ('A="over\ntwo lines"', "over\ntwo lines"),
        ("A=${B}`c`", "${B}`c`"),
        ("A=1\r", "1"),
        ("A=1\nA=2", "2"),
    ],
)
def test_values_are_read_as_other_readers_do(line: str, value: str | None) -> None:
    if value is None:
        with pytest.raises(errors.InvalidArgument, match="goes on after the closing quote"):
            dotenv.parse(line)
    else:
        assert dotenv.parse(line + "\n") == {"A": value}


def test_a_bare_name_sets_nothing() -> None:
    assert dotenv.parse("A\nexport B # for the shell\nC=1") == {"C": "1"}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("A=1\nnot a setting\n", ".env: line 2 is not NAME=value"),
        ("1A=2", ".env: line 1 is not NAME=value"),
        ('\n\nA="open', '.env: line 3 has a " that is not closed'),
        ("=x", ".env: line 1 is not NAME=value"),
    ],
)
def test_what_is_wrong_is_told_by_line_without_its_value(text: str, told: str) -> None:
    with pytest.raises(errors.InvalidArgument) as raised:
        dotenv.parse(text)

    assert raised.value.message == told


def test_a_file_that_is_not_there_is_none_and_a_mark_of_its_encoding_is_left_out(tmp_path: Path) -> None:
    assert dotenv.read(tmp_path / ".env") is None
    (tmp_path / ".env").write_bytes(b"\xef\xbb\xbfA=1\r\nB=2\r\n")
    assert dotenv.read(tmp_path / ".env") == {"A": "1", "B": "2"}


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"\xff\xfe")
    with pytest.raises(errors.InvalidArgument, match="is not UTF-8"):
        dotenv.read(tmp_path / ".env")
    with pytest.raises(errors.InvalidArgument, match="Is a directory"):
        dotenv.read(tmp_path)
