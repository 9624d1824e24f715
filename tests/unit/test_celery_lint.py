"""The lint names each setting that may lose a task, and finds nothing once `configure` has set them."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import celery
import pytest
from leasehold.client import celery as leasehold_celery
from leasehold.client import celery_lint, celery_redelivery, celery_settings
from leasehold.core import errors

REDIS = "redis://127.0.0.1:1/0"


@pytest.fixture(autouse=True)
def _no_address_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("CELERY_BROKER_URL", "CELERY_BROKER_READ_URL", "CELERY_RESULT_BACKEND", "REMAP_SIGTERM"):
        monkeypatch.delenv(name, raising=False)
    yield


def _app(broker: str = REDIS, **settings: Any) -> celery.Celery:
    app = celery.Celery("app", broker=broker, set_as_current=False)
    app.conf.update(settings)
    return app


def _nothing() -> None:
    """A task's body."""


def _found(app: celery.Celery) -> dict[str, celery_settings.Finding]:
    return {finding.setting: finding for finding in celery_lint.lint(app)}


def test_an_application_as_celery_makes_it_lacks_everything() -> None:
    found = _found(_app())

    assert {name: (finding.present, finding.wanted) for name, finding in found.items()} == {
        "task_acks_late": (False, True),
        "task_reject_on_worker_lost": (None, True),
        "worker_prefetch_multiplier": (4, 1),
        "worker_disable_prefetch": (False, True),
        "worker_max_tasks_per_child": (None, 15),
        "task_time_limit": (None, 3600.0),
        "task_soft_time_limit": (None, 3300.0),
        "worker_soft_shutdown_timeout": (0.0, 10.0),
        "broker_transport_options.visibility_timeout": (None, 4500),
        "worker_cancel_long_running_tasks_on_connection_loss": (False, True),
        "redelivery cap": (None, 3),
    }
    assert all(finding.why and str(finding).endswith(finding.why) for finding in found.values())


def test_a_configured_application_has_no_findings() -> None:
    app = _app()
    leasehold_celery.configure(app)

    assert _found(app) == {}
    assert app.conf.task_acks_late is True
    assert app.conf.broker_transport_options == {"visibility_timeout": 4500}


def test_what_is_as_safe_stays_and_other_options_of_the_transport_too() -> None:
    app = _app(
        task_time_limit=600,
        worker_max_tasks_per_child=100,
        broker_transport_options={"global_keyprefix": "app1:", "visibility_timeout": 43_200},
    )
    leasehold_celery.configure(app)

    assert _found(app) == {}
    assert (app.conf.task_time_limit, app.conf.task_soft_time_limit) == (600, 550.0)
    assert app.conf.worker_max_tasks_per_child == 100
    assert app.conf.broker_transport_options == {"global_keyprefix": "app1:", "visibility_timeout": 43_200}


def test_a_configuration_that_is_read_later_is_set_right_too() -> None:
    app = _app()
    leasehold_celery.configure(app)
    app.config_from_object({"task_acks_late": False, "worker_prefetch_multiplier": 8, "task_time_limit": 7200})

    assert _found(app) == {}
    assert (app.conf.task_acks_late, app.conf.worker_prefetch_multiplier) == (True, 1)
    assert app.conf.broker_transport_options["visibility_timeout"] == 9000


def test_an_application_that_was_read_before_is_set_right_at_once() -> None:
    app = _app()
    assert app.conf.task_acks_late is False
    leasehold_celery.configure(app)

    assert app.conf.task_acks_late is True


def test_what_is_given_to_configure_stands_and_is_told() -> None:
    app = _app()
    leasehold_celery.configure(
        app, worker_prefetch_multiplier=4, broker_transport_options={"socket_keepalive": True}
    )

    assert list(_found(app)) == ["worker_prefetch_multiplier"]
    assert app.conf.broker_transport_options == {"socket_keepalive": True, "visibility_timeout": 4500}


def test_the_visibility_timeout_must_exceed_the_longest_task() -> None:
    app = _app()
    leasehold_celery.configure(app, task_time_limit=3600)
    app.task(_nothing, shared=False, name="long", time_limit=7200)

    found = _found(app)

    assert found["broker_transport_options.visibility_timeout"].wanted == 9000
    assert found["task long: time_limit"].present == 7200


def test_a_task_that_undoes_the_applications_safety_is_named() -> None:
    app = _app()
    leasehold_celery.configure(app)
    app.task(_nothing, shared=False, name="early", acks_late=False)
    app.task(_nothing, shared=False, name="lost", reject_on_worker_lost=False)
    app.task(_nothing, shared=False, name="own", Request="celery.worker.request:Context")

    assert list(_found(app)) == [
        "task early: acks_late",
        "task lost: reject_on_worker_lost",
        "task own: Request",
    ]


def test_a_result_backend_that_lasts_is_asked_before_a_task_completes_twice() -> None:
    assert "worker_deduplicate_successful_tasks" in _found(_app(result_backend=REDIS))
    assert "worker_deduplicate_successful_tasks" not in _found(_app(result_backend="rpc://"))


def test_on_rabbitmq_there_is_no_visibility_timeout_and_no_counter_unless_one_is_named() -> None:
    app = _app("amqp://127.0.0.1//")
    leasehold_celery.configure(app)
    assert list(_found(app)) == ["redelivery cap"]
    assert "redelivery_url" in _found(app)["redelivery cap"].why

    leasehold_celery.configure(app, redelivery_url=REDIS)
    assert _found(app) == {}
    assert celery_redelivery.place(app) == REDIS


def test_a_remapped_term_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMAP_SIGTERM", "SIGQUIT")
    app = _app()
    leasehold_celery.configure(app)

    assert list(_found(app)) == ["REMAP_SIGTERM (environment)"]


def test_settings_are_those_that_configure_sets() -> None:
    app = _app()
    app.conf.update(leasehold_celery.settings(REDIS, task_time_limit=600))

    assert list(_found(app)) == ["redelivery cap"]
    assert (app.conf.task_time_limit, app.conf.task_soft_time_limit) == (600.0, 550.0)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"task_time_limt": 600}, "task_time_limt"),
        ({"redeliveries_max": -1}, "redeliveries_max"),
        ({"redeliveries_max": True}, "redeliveries_max"),
        ({"redelivery_url": "amqp://127.0.0.1"}, "redelivery_url"),
    ],
)
def test_a_malformed_argument_is_named(arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        leasehold_celery.configure(_app(), **arguments)

    assert caught.value.field == field


@pytest.mark.parametrize(
    ("program", "exit_code", "told"),
    [
        ("", 1, "task_acks_late is False, wanted True: a task that is acknowledged"),
        ("from leasehold.client import celery as c; c.configure(app)", 0, ""),
        ("raise RuntimeError('no database')", 2, "lint_me:app cannot be loaded: RuntimeError: no database"),
    ],
)
def test_the_command_exits_by_what_it_found(tmp_path: Path, program: str, exit_code: int, told: str) -> None:
    app = "import celery; app = celery.Celery('lint_me', broker='redis://127.0.0.1:1/0')"
    (tmp_path / "lint_me.py").write_text(f"{app}\n{program}\n")
    finished = _run(tmp_path, "lint_me:app")

    assert finished.returncode == exit_code, finished.stderr
    assert (finished.stdout + finished.stderr).startswith(told)


def test_the_command_tells_programs_in_json(tmp_path: Path) -> None:
    (tmp_path / "lint_me.py").write_text("import celery\napp = celery.Celery('lint_me', broker='amqp://h')\n")
    rows = json.loads(_run(tmp_path, "lint_me:app", "-o", "json").stdout)

    assert rows[0]["setting"] == "task_acks_late"
    assert set(rows[0]) == {"setting", "present", "wanted", "why"}


def _run(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "leasehold.client.celery_lint", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
