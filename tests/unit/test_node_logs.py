"""Workers' logs: rotation that loses nothing, or tells what it lost, and cursors that survive it."""

import asyncio
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from leasehold.core import errors
from leasehold.nodeagent import logs
from leasehold.nodeagent.worker_values import LogSettings

NAME = "p_1@host"
RENAMED = LogSettings(max_bytes=100, keep=2, is_reopened=True)
COPIED = LogSettings(max_bytes=100, keep=2)


@pytest.fixture
def kept(tmp_path: Path) -> logs.Logs:
    return logs.Logs(tmp_path)


def write(kept: logs.Logs, *lines: str) -> None:
    with kept.path(NAME).open("a") as file:
        file.writelines(f"{line}\n" for line in lines)


def lines(first: int, last: int) -> list[str]:
    return [f"line {number:04}" for number in range(first, last + 1)]


def told(first: int, last: int) -> bytes:
    return "".join(f"{line}\n" for line in lines(first, last)).encode()


async def test_the_last_lines_are_read_first_and_then_what_is_new(kept: logs.Logs) -> None:
    write(kept, *lines(1, 50))
    chunk = await kept.read(NAME, tail_lines=3)
    assert chunk.data == told(48, 50)
    write(kept, *lines(51, 52))
    chunk = await kept.read(NAME, cursor=chunk.cursor)
    assert (chunk.data, chunk.lost_bytes) == (told(51, 52), 0)

    assert (await kept.read(NAME, cursor=chunk.cursor)).data == b""


@pytest.mark.parametrize("settings", [RENAMED, COPIED])
async def test_a_cursor_survives_rotations(kept: logs.Logs, settings: LogSettings) -> None:
    write(kept, *lines(1, 5))
    cursor = (await kept.read(NAME, tail_lines=1)).cursor
    write(kept, *lines(6, 20))
    assert kept.rotate(NAME, settings)
    write(kept, *lines(21, 35))
    assert kept.rotate(NAME, settings)
    write(kept, *lines(36, 37))
    data, lost = b"", 0
    while True:
        chunk = await kept.read(NAME, cursor=cursor, bytes_max=64)
        if not chunk.data:
            break
        data, lost, cursor = data + chunk.data, lost + chunk.lost_bytes, chunk.cursor

    assert (data, lost) == (told(6, 37), 0)


@pytest.mark.parametrize("settings", [RENAMED, COPIED])
async def test_what_is_gone_is_told_to_the_byte(kept: logs.Logs, settings: LogSettings) -> None:
    write(kept, *lines(1, 20))
    cursor = (await kept.read(NAME, tail_lines=5)).cursor
    cursor = f"1.{int(cursor.partition('.')[2]) - 50}"
    for first in (21, 41, 61):
        assert kept.rotate(NAME, settings)
        write(kept, *lines(first, first + 19))
    chunk = await kept.read(NAME, cursor=cursor)

    assert chunk.lost_bytes == 50
    assert chunk.data == told(21, 40)
    assert sorted(path.name for path in kept.path(NAME).parent.glob("*.log.0*")) == [
        f"{NAME}.log.000002",
        f"{NAME}.log.000003",
    ]


async def test_bytes_that_a_cut_lost_are_told(kept: logs.Logs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker writes between the copy and the cut; what it wrote during the copy is copied after it."""
    write(kept, *lines(1, 20))
    cursor = (await kept.read(NAME)).cursor
    copy = shutil.copyfileobj

    words = iter(["late", "lost"])

    def copy_slowly(*arguments: Any) -> None:
        copy(*arguments)
        write(kept, next(words))

    monkeypatch.setattr(shutil, "copyfileobj", copy_slowly)
    assert kept.rotate(NAME, COPIED)
    write(kept, "new")
    late = await kept.read(NAME, cursor=cursor)
    new = await kept.read(NAME, cursor=late.cursor)

    assert (late.data, late.lost_bytes) == (b"late\n", 0)
    assert (new.data, new.lost_bytes) == (b"new\n", len("lost\n"))


async def test_a_log_is_read_while_it_is_copied(kept: logs.Logs, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy may take seconds; the event loop, which reads, waits for none of them."""
    write(kept, *lines(1, 20))
    has_begun, may_go_on = threading.Event(), threading.Event()
    copy, has_waited = shutil.copyfileobj, []

    def copy_slowly(*arguments: Any) -> None:
        has_begun.set()
        has_waited.append(may_go_on.wait(5.0))
        copy(*arguments)

    monkeypatch.setattr(shutil, "copyfileobj", copy_slowly)
    rotation = asyncio.get_running_loop().run_in_executor(None, kept.rotate, NAME, COPIED)
    assert await asyncio.to_thread(has_begun.wait, 5.0)
    chunk = await kept.read(NAME, tail_lines=2)
    may_go_on.set()

    assert await rotation
    assert (chunk.data, has_waited[0]) == (told(19, 20), True)


async def test_two_rotations_at_once_are_one(kept: logs.Logs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second would make a segment of next to nothing, and drop one that is worth keeping for it."""
    write(kept, *lines(1, 20))
    has_begun, may_go_on = threading.Event(), threading.Event()
    copy = shutil.copyfileobj

    def copy_slowly(*arguments: Any) -> None:
        has_begun.set()
        may_go_on.wait(5.0)
        copy(*arguments)

    monkeypatch.setattr(shutil, "copyfileobj", copy_slowly)
    loop = asyncio.get_running_loop()
    first = loop.run_in_executor(None, kept.rotate, NAME, COPIED)
    assert await asyncio.to_thread(has_begun.wait, 5.0)
    has_come, path = threading.Event(), kept.path

    def path_of(name: str) -> Path:
        has_come.set()
        return path(name)

    monkeypatch.setattr(kept, "path", path_of)
    second = loop.run_in_executor(None, kept.rotate, NAME, COPIED)
    assert await asyncio.to_thread(has_come.wait, 5.0)
    may_go_on.set()

    assert (await first, await second) == (True, False)
    assert [path.name for path in kept.path(NAME).parent.glob("*.log.0*")] == [f"{NAME}.log.000001"]


async def test_a_renamed_log_is_read_to_its_end_before_the_next(kept: logs.Logs) -> None:
    """The worker still has the old file open when it is renamed."""
    write(kept, *lines(1, 20))
    cursor = (await kept.read(NAME)).cursor
    with kept.path(NAME).open("a") as still_open:
        assert kept.rotate(NAME, RENAMED)
        nothing = await kept.read(NAME, cursor=cursor)
        assert nothing.data == b""
        still_open.write("late\n")
    write(kept, "new")
    late = await kept.read(NAME, cursor=nothing.cursor)
    new = await kept.read(NAME, cursor=late.cursor)

    assert (late.data, new.data, late.lost_bytes + new.lost_bytes) == (b"late\n", b"new\n", 0)


async def test_a_log_that_is_not_over_its_size_is_left_alone(kept: logs.Logs) -> None:
    write(kept, "short")

    assert not kept.rotate(NAME, RENAMED)
    assert not kept.rotate("p_2@host", RENAMED)


async def test_the_tail_right_after_a_rotation_is_that_of_the_segment_before(kept: logs.Logs) -> None:
    write(kept, *lines(1, 20))
    assert kept.rotate(NAME, COPIED)

    assert (await kept.read(NAME, tail_lines=2)).data == told(19, 20)


async def test_a_disk_without_room_for_the_copy_costs_the_copy_and_tells_it(
    kept: logs.Logs, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(kept, *lines(1, 20))
    cursor = (await kept.read(NAME, tail_lines=1)).cursor
    cursor = f"1.{int(cursor.partition('.')[2]) - 30}"

    def no_room(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", no_room)
    assert kept.rotate(NAME, COPIED)
    write(kept, "new")
    chunk = await kept.read(NAME, cursor=cursor)

    assert chunk.data == b"new\n"
    assert chunk.lost_bytes == len(told(1, 20))
    assert kept.path(NAME).stat().st_size == len("new\n")


async def test_following_waits_for_something_new(kept: logs.Logs) -> None:
    write(kept, "first")
    cursor = (await kept.read(NAME)).cursor
    reading = asyncio.create_task(kept.read(NAME, cursor=cursor, wait_seconds=10.0))
    await asyncio.sleep(0)
    write(kept, "second")

    assert (await reading).data == b"second\n"


async def test_the_end_is_told_once_everything_of_an_ended_worker_was_read(kept: logs.Logs) -> None:
    write(kept, "last")
    chunk = await kept.read(NAME, is_ended=lambda: True)
    assert (chunk.data, chunk.is_end) == (b"last\n", False)
    end = await kept.read(NAME, cursor=chunk.cursor, wait_seconds=20.0, is_ended=lambda: True)

    assert (end.data, end.is_end) == (b"", True)


async def test_a_log_that_another_hand_cut_is_read_from_its_start(kept: logs.Logs) -> None:
    write(kept, *lines(1, 5))
    cursor = (await kept.read(NAME)).cursor
    kept.path(NAME).write_text("anew\n")

    assert (await kept.read(NAME, cursor=cursor)).data == b"anew\n"


async def test_a_long_line_is_read_in_pieces(kept: logs.Logs) -> None:
    write(kept, "x" * 300)
    first = await kept.read(NAME, tail_lines=1, bytes_max=200)

    assert len(first.data) == 200
    assert first.data.endswith(b"x\n")


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"cursor": "../etc"}, "cursor"),
        ({"cursor": "0.5"}, "cursor"),
        ({"tail_lines": 10_001}, "tail_lines"),
        ({"wait_seconds": 21.0}, "wait"),
        ({"bytes_max": 2**20 + 1}, "bytes_max"),
    ],
)
async def test_bad_input_names_its_field(kept: logs.Logs, arguments: dict[str, object], field: str) -> None:
    write(kept, "x")
    with pytest.raises(errors.InvalidArgument) as caught:
        await kept.read(NAME, **arguments)  # type: ignore[arg-type]

    assert caught.value.field == field


@pytest.mark.parametrize("name", ["../secret", "p_1@host/../x", "p_1", ""])
def test_what_is_no_workers_name_reaches_no_file(kept: logs.Logs, name: str) -> None:
    with pytest.raises(errors.InvalidArgument):
        kept.path(name)


async def test_a_log_that_is_not_there_is_told(kept: logs.Logs) -> None:
    with pytest.raises(errors.NotFound, match=f"{NAME}.log"):
        await kept.read(NAME)
