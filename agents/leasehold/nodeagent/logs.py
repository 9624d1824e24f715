"""Workers' logs: files that the workers write themselves, rotated here, read with cursors that survive it.

A pipe to the agent would freeze its workers when the agent stalls. So a worker's standard output and error are
one file, opened for appending by its shim.

A log is a row of segments, counted from 1: ``NAME.log.000001``, ``NAME.log.000002`` and so on, and the file
that is written, ``NAME.log``, which is the next. A cursor is a segment's number and a place in it. What a
rotation lost, and how long segments were that are gone, is kept in ``NAME.log.json``.
"""

import asyncio
import os
import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from leasehold.core import errors
from leasehold.core.node import model
from leasehold.nodeagent import records, worker_values
from leasehold.observe import logs

_log = logs.get_logger(__name__)

TAIL_LINES_DEFAULT = 100
TAIL_LINES_MAX = 10_000
BYTES_DEFAULT = 64 * 2**10
BYTES_MAX = 2**20
WAIT_SECONDS_MAX = 20.0

_LOOK_EVERY_SECONDS = 0.1
_TAIL_BLOCK_BYTES = 64 * 2**10
_CURSOR = re.compile(r"([1-9][0-9]{0,9})\.([0-9]{1,18})")
_SEGMENT_DIGITS = 6
_KEPT = records.Format("log", 1)
#: Of how many segments that are gone the length is kept.
_LENGTHS_MAX = 200


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a log, as `LogChunk` of the wire has it."""

    data: bytes
    #: Where to go on.
    cursor: str
    #: Lost by rotations between the cursor that was given and this chunk.
    lost_bytes: int = 0
    #: The worker has ended and everything was read.
    is_end: bool = False


@dataclass(frozen=True, slots=True)
class _Place:
    segment: int
    offset: int

    def __str__(self) -> str:
        return f"{self.segment}.{self.offset}"


class Logs:
    """The logs of one host: ``FOLDER/NAME.log`` and its rotated segments. `rotate` may run on a thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        #: Held while files are renamed or cut, and while they are read: never for long, the event loop waits.
        self._lock = threading.Lock()
        #: Held by whoever rotates.
        self._rotating = threading.Lock()

    def path(self, name: str) -> Path:
        """Where the worker `name` writes. Raises `InvalidArgument` if that is no worker's name."""
        return self._folder / f"{model.checked_worker_name(name)}.log"

    def rotate(self, name: str, settings: worker_values.LogSettings) -> bool:
        """Rotate a log that is over its size; whether it was. Blocks while it copies.

        A full disk costs the copy, not the agent: the log is cut all the same, and what was lost is told.
        """
        path = self.path(name)
        try:
            with self._rotating:
                if path.stat().st_size <= settings.max_bytes:
                    return False
                self._rotate(path, settings)
        except OSError as error:
            _log.warning("log_not_rotated", log=str(path), why=error.strerror)
            return False
        return True

    async def read(
        self,
        name: str,
        *,
        cursor: str = "",
        tail_lines: int = 0,
        wait_seconds: float = 0.0,
        bytes_max: int = 0,
        is_ended: Callable[[], bool] = lambda: False,
    ) -> Chunk:
        """Read on from `cursor`; without one, the last `tail_lines` lines (0: 100).

        Waits up to `wait_seconds` (at most 20) for something new, unless `is_ended` says that the worker has
        ended. `bytes_max` 0 is 64 KiB, at most 1 MiB. Raises `InvalidArgument` for what is no cursor or out of
        range, `NotFound` if there is no such log.
        """
        path = self.path(name)
        _check(tail_lines, wait_seconds, bytes_max)
        most = bytes_max or BYTES_DEFAULT
        if not cursor:
            place = self._tail(path, tail_lines or TAIL_LINES_DEFAULT, most)
        elif match := _CURSOR.fullmatch(cursor):
            place = _Place(int(match[1]), int(match[2]))
        else:
            raise errors.InvalidArgument(f"{cursor!r} is no cursor", field="cursor")
        loop = asyncio.get_running_loop()
        until, lost = loop.time() + wait_seconds, 0
        while True:
            # Asked first: what the worker wrote before its end is there when it has ended.
            has_ended = is_ended()
            data, place, more_lost = self._read_on(path, place, most)
            lost += more_lost
            is_end = has_ended and not data
            if data or is_end or loop.time() >= until:
                return Chunk(data, str(place), lost, is_end)
            await asyncio.sleep(min(_LOOK_EVERY_SECONDS, max(0.0, until - loop.time())))

    # Inside

    def _tail(self, path: Path, lines: int, bytes_max: int) -> _Place:
        """Where the last lines of the file that is written begin; of a new one, those of the one before."""
        with self._lock:
            current = _segments(path)[-1] + 1
            for segment in (current, current - 1):
                where = _file(path, segment, current)
                try:
                    size = where.stat().st_size
                except OSError:
                    continue
                if size or segment == current - 1:
                    return _Place(segment, _line_start(where, size, lines, bytes_max))
            if not path.exists():
                raise errors.NotFound(f"there is no log {path.name}", field="worker")
            return _Place(current, 0)

    def _read_on(self, path: Path, place: _Place, bytes_max: int) -> tuple[bytes, _Place, int]:
        """The bytes after a place, the place after them, and how many were lost on the way."""
        with self._lock:
            lost = 0
            segments = _segments(path)
            current = segments[-1] + 1
            kept = _kept(path)
            if place.segment > current:
                # Somebody removed the log's files: it began anew.
                place = _Place(current, 0)
            while True:
                data, size = _piece(_file(path, place.segment, current), place.offset, bytes_max)
                if data:
                    return data, _Place(place.segment, place.offset + len(data)), lost
                if place.segment == current:
                    # Cut by another hand, if it is shorter than the place: it is read from its start then.
                    is_cut = size is not None and size < place.offset
                    if not is_cut:
                        return b"", place, lost
                    place = _Place(current, 0)
                    continue
                is_next_there = place.segment + 1 < current or path.exists()
                if size is not None and not is_next_there:
                    # Renamed, and not opened anew yet: more may still come here.
                    return b"", place, lost
                length = kept.lengths.get(place.segment, 0) if size is None else size
                lost += max(0, length - place.offset) if size is None else 0
                lost += kept.lost.get(place.segment, 0)
                place = _Place(place.segment + 1, 0)

    def _rotate(self, path: Path, settings: worker_values.LogSettings) -> None:
        segments = _segments(path)
        number = segments[-1] + 1
        target = _rotated(path, number)
        kept = _kept(path)
        if settings.is_reopened:
            with self._lock:
                path.rename(target)
                kept.lengths[number] = target.stat().st_size
                kept.write(path)
        else:
            with _Copy(path, target) as copy:
                copy.go_on()
                with self._lock:
                    copied, size = copy.finish()
                    kept.lengths[number] = copied
                    kept.lost[number] = max(0, size - copied)
                    kept.write(path)
        for old in [*(found for found in segments if found), number][: -max(1, settings.keep)]:
            _rotated(path, old).unlink(missing_ok=True)


@dataclass(slots=True)
class _Kept:
    """Of each segment, how long it was, and what was lost between it and the next."""

    lengths: dict[int, int]
    lost: dict[int, int]

    def write(self, path: Path) -> None:
        for table in (self.lengths, self.lost):
            for old in sorted(table)[:-_LENGTHS_MAX]:
                del table[old]
        draft = _sidecar(path).with_suffix(".tmp")
        try:
            # Not synced, for the loop may be waiting: it survives the agent, not a power cut.
            draft.write_bytes(_KEPT.encode({"lengths": self.lengths, "lost": self.lost}))
            draft.replace(_sidecar(path))
        except OSError as error:
            _log.warning("log_losses_not_kept", log=str(path), why=error.strerror)


def _kept(path: Path) -> _Kept:
    try:
        document = _KEPT.read(_sidecar(path)) or {}
        return _Kept(
            {int(number): int(length) for number, length in document.get("lengths", {}).items()},
            {int(number): int(length) for number, length in document.get("lost", {}).items()},
        )
    except (records.Damaged, ValueError, AttributeError, TypeError):
        return _Kept({}, {})


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _rotated(path: Path, segment: int) -> Path:
    return path.with_name(f"{path.name}.{segment:0{_SEGMENT_DIGITS}}")


def _file(path: Path, segment: int, current: int) -> Path:
    return path if segment == current else _rotated(path, segment)


def _segments(path: Path) -> list[int]:
    """Numbers of the rotated segments, lowest first; 0 stands before the first."""
    prefix = path.name + "."
    found = [0]
    for entry in os.scandir(path.parent):
        suffix = entry.name.removeprefix(prefix)
        if entry.name.startswith(prefix) and suffix.isdigit():
            found.append(int(suffix))
    return sorted(found)


def _piece(path: Path, offset: int, bytes_max: int) -> tuple[bytes, int | None]:
    """What is in the file from `offset` on, and its size; no size: it is gone."""
    try:
        with path.open("rb") as file:
            return os.pread(file.fileno(), bytes_max, offset), os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return b"", None


def _line_start(path: Path, size: int, lines: int, bytes_max: int) -> int:
    """Where the last `lines` lines begin, not more than `bytes_max` before the end."""
    with path.open("rb") as file:
        start, found = size, 0
        lowest = max(0, size - bytes_max)
        while start > lowest:
            begin = max(lowest, start - _TAIL_BLOCK_BYTES)
            block = os.pread(file.fileno(), start - begin, begin)
            # The newline at the very end ends the last line and begins none.
            end = len(block) - 1 if start == size else len(block)
            while (at := block.rfind(b"\n", 0, end)) >= 0:
                found += 1
                if found == lines:
                    return begin + at + 1
                end = at
            start = begin
        return lowest


class _Copy:
    """Copies a log that is being written, and cuts it."""

    def __init__(self, path: Path, target: Path) -> None:
        self._path = path
        self._target = target
        self._draft = target.with_name(target.name + ".tmp")
        self._source = path.open("r+b")
        #: Why there is no copy; None: nothing is in the way.
        self._failure: OSError | None = None

    def __enter__(self) -> "_Copy":
        return self

    def __exit__(self, *_: object) -> None:
        self._source.close()

    def go_on(self) -> None:
        """Copy what is there by now. May take long."""
        if self._failure is not None:
            return
        try:
            with self._draft.open("r+b" if self._source.tell() else "wb") as copy:
                copy.seek(0, os.SEEK_END)
                shutil.copyfileobj(self._source, copy, _TAIL_BLOCK_BYTES)
        except OSError as error:
            self._failure = error

    def finish(self) -> tuple[int, int]:
        """Copy the rest and cut: bytes copied, and bytes that were there at the cut."""
        self.go_on()
        copied = 0
        try:
            if self._failure is not None:
                raise self._failure
            copied = self._draft.stat().st_size
            self._draft.replace(self._target)
        except OSError as error:
            # A log that nobody cuts would fill what is left of the disk. Its place in the row is kept, empty.
            _log.warning("log_copy_failed", log=str(self._path), why=error.strerror)
            self._draft.unlink(missing_ok=True)
            self._target.touch()
            copied = 0
        size = os.fstat(self._source.fileno()).st_size
        os.ftruncate(self._source.fileno(), 0)
        return copied, size


def _check(tail_lines: int, wait_seconds: float, bytes_max: int) -> None:
    limits = (
        ("tail_lines", tail_lines, TAIL_LINES_MAX),
        ("wait", wait_seconds, WAIT_SECONDS_MAX),
        ("bytes_max", bytes_max, BYTES_MAX),
    )
    for name, value, most in limits:
        if not 0 <= value <= most:
            raise errors.InvalidArgument(f"{name} is 0 to {most:g}, not {value:g}", field=name)
