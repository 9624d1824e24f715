"""What in a Celery application may lose a task: ``python -m leasehold.client.celery_lint APP``.

`APP` is as ``celery --app`` takes it: ``module:app``. Exit codes: 0 nothing found, 1 findings, 2 no such
application, or a wrong command line. The application is imported and asked; it connects to nothing.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import celery
from celery.app import utils as app_utils
from leasehold.client import celery_redelivery, celery_settings
from leasehold.client.celery_settings import Finding

__all__ = ["Finding", "lint", "main"]


def lint(app: celery.Celery) -> list[Finding]:
    """What in `app` and its tasks may lose a task, or run it twice; the heaviest first."""
    app.loader.import_default_modules()
    app.finalize(auto=True)
    tasks = {name: task for name, task in app.tasks.items() if not name.startswith("celery.")}
    longest = celery_settings.longest_task_seconds(app.conf, tasks)
    return [
        *celery_settings.findings(app.conf, longest_seconds=longest),
        *_cap_findings(app),
        *(finding for name, task in sorted(tasks.items()) for finding in _task_findings(name, task, app.conf)),
    ]


def _cap_findings(app: celery.Celery) -> Iterator[Finding]:
    if not celery_redelivery.is_installed(app):
        yield Finding(
            setting="redelivery cap",
            present=None,
            wanted=celery_redelivery.REDELIVERIES_MAX,
            why="a task that kills its worker each time is run again for ever: call client.celery.configure",
        )
    elif celery_redelivery.place(app) is None:
        yield Finding(
            setting="redelivery cap",
            present=None,
            wanted=None,
            why="neither broker nor result backend is a Redis to count in: give configure a redelivery_url",
        )


def _task_findings(name: str, task: Any, configuration: Any) -> Iterator[Finding]:
    """What one task has set for itself. `configure` leaves it: its author may have a reason."""
    where = f"task {name}: "
    if configuration.task_acks_late and not task.acks_late:
        why = "it is acknowledged before it runs, so it is lost with its worker"
        yield Finding(setting=where + "acks_late", present=task.acks_late, wanted=True, why=why)
    if configuration.task_reject_on_worker_lost and not task.reject_on_worker_lost:
        why = "it is marked as failed, and not run again, when its process is killed"
        present = task.reject_on_worker_lost
        yield Finding(setting=where + "reject_on_worker_lost", present=present, wanted=True, why=why)
    limit = configuration.task_time_limit
    if limit and task.time_limit and task.time_limit > limit:
        why = "a stop waits for the application's limit, and interrupts what takes longer"
        yield Finding(setting=where + "time_limit", present=task.time_limit, wanted=limit, why=why)
    if celery_redelivery.has_own_request(task):
        why = "its starts are not counted, so the redelivery cap does not hold for it"
        yield Finding(setting=where + "Request", present=str(task.Request), wanted=None, why=why)


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m leasehold.client.celery_lint", description="Find settings that may lose Celery's tasks."
    )
    parser.add_argument("app", help="the application, as celery --app takes it: module:app")
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text")
    options = parser.parse_args(arguments)
    # As `celery` itself does.
    sys.path.insert(0, os.getcwd())
    try:
        app = app_utils.find_app(options.app)
        found = lint(app)
    except Exception as error:  # noqa: BLE001  an application may raise anything while it is imported
        sys.stderr.write(f"{options.app} cannot be loaded: {type(error).__name__}: {error}\n")
        return 2
    if options.output == "json":
        rows = [dataclasses.asdict(finding) for finding in found]
        sys.stdout.write(json.dumps(rows, default=str, indent=2) + "\n")
    else:
        sys.stdout.writelines(f"{finding}\n" for finding in found)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
