"""The files that tell the agent what a worker does, without a worker."""

import json
import os
from pathlib import Path

from leasehold.client import celery_activity
from leasehold.runtime import identity


def _read(folder: Path) -> dict[str, object]:
    document: dict[str, object] = json.loads((folder / f"activity.{os.getpid()}.json").read_text())
    return document


def test_tasks_come_and_go(tmp_path: Path) -> None:
    activity = celery_activity.Activity(tmp_path)
    activity.ready(True)
    activity.began("1", "a.task", "work")
    activity.began("2", "b.task", "")
    both = _read(tmp_path)
    activity.ended("1")
    activity.ended("unknown")

    tasks = both["tasks"]
    assert isinstance(tasks, list)
    assert [(task["id"], task["name"], task["queue"]) for task in tasks] == [
        ("1", "a.task", "work"),
        ("2", "b.task", ""),
    ]
    left = _read(tmp_path)["tasks"]
    assert isinstance(left, list)
    assert [task["id"] for task in left] == ["2"]
    assert both["start_time_ticks"] == identity.start_time_ticks(os.getpid())
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"], "no part is left"


def test_what_cannot_be_written_is_taken_away_rather_than_left_wrong(tmp_path: Path) -> None:
    activity = celery_activity.Activity(tmp_path)
    activity.began("1", "a.task", "work")
    part = tmp_path / f"activity.{os.getpid()}.part"
    part.mkdir()

    activity.ended("1")
    assert not (tmp_path / f"activity.{os.getpid()}.json").exists()

    part.rmdir()
    activity.ready(True)
    assert _read(tmp_path)["tasks"] == []


def test_the_child_of_a_fork_tells_of_itself_only(tmp_path: Path) -> None:
    activity = celery_activity.Activity(tmp_path)
    activity.began("1", "a.task", "work")
    with activity._mine():
        child = os.fork()
        if child == 0:
            # The parent's lock is held; it is not the child's.
            activity.began("2", "b.task", "work")
            os._exit(7)
    _, status = os.waitpid(child, 0)

    assert os.waitstatus_to_exitcode(status) == 7
    (task,) = json.loads((tmp_path / f"activity.{child}.json").read_text())["tasks"]
    assert task["id"] == "2"


def test_a_process_that_leaves_takes_its_file_along(tmp_path: Path) -> None:
    activity = celery_activity.Activity(tmp_path)
    activity.ready(True)
    activity.leave()
    activity.leave()

    assert list(tmp_path.iterdir()) == []
