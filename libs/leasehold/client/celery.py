"""Celery applications whose tasks survive that workers come and go, and keep to shared budgets.

::

    import celery
    from leasehold.client import celery as leasehold_celery

    app = celery.Celery("app", broker="redis://127.0.0.1:6379/0")
    leasehold_celery.configure(app)

    @app.task
    @leasehold_celery.budgeted("llm-api", tokens=1200)
    def ask(prompt): ...

What `configure` sets, and why, is told in docs/celery.md; ``python -m leasehold.client.celery_lint module:app``
tells what an application lacks. Needs the extra ``leasehold[celery]``.
"""

from typing import Any

import celery
from leasehold.client import celery_activity, celery_redelivery, celery_settings
from leasehold.client.celery_allocation import allocated
from leasehold.client.celery_budget import budgeted, current_permit
from leasehold.client.celery_lint import lint
from leasehold.client.celery_redelivery import REDELIVERIES_MAX, revive
from leasehold.client.celery_settings import Finding
from leasehold.core import errors

__all__ = ["Finding", "allocated", "budgeted", "configure", "current_permit", "lint", "revive", "settings"]


def settings(
    broker_url: str,
    *,
    result_backend: str | None = None,
    task_time_limit: float = celery_settings.TASK_TIME_LIMIT,
) -> dict[str, Any]:
    """The settings that keep tasks safe, for a configuration module: ``globals().update(settings(...))``.

    `task_time_limit` is seconds; the visibility timeout of the broker follows it. `configure` is the better
    way: it also caps redeliveries, and leaves alone what is as safe already.
    """
    written: dict[str, Any] = {
        "broker_url": broker_url,
        "result_backend": result_backend,
        "task_time_limit": float(task_time_limit),
    }
    for finding in celery_settings.findings(_Written(written), longest_seconds=float(task_time_limit)):
        written |= celery_settings.merged(written, finding)
    return {name: value for name, value in written.items() if name not in ("broker_url", "result_backend")}


def configure(
    app: celery.Celery,
    *,
    redeliveries_max: int = REDELIVERIES_MAX,
    redelivery_url: str | None = None,
    **overrides: Any,
) -> None:
    """Make `app` safe: set each setting that `lint` would find fault with, and cap redeliveries.

    What the application has set that is as safe stays (a lower time limit, a longer visibility timeout), and
    what is not is replaced, whether it was set before or is read later (``config_from_object``). `overrides`
    are settings of Celery that stand as they are given: ``task_time_limit=600``. A task that loses its worker
    is run again `redeliveries_max` times; they are counted in the broker, or the result backend, if it is a
    Redis, else at `redelivery_url`. Raises `InvalidArgument` for an unknown setting, or a malformed value.
    """
    for name in overrides:
        if not celery_settings.is_known(name):
            raise errors.InvalidArgument(f"{name}: Celery has no such setting", field=name)
    celery_activity.install()
    celery_redelivery.install(app, redeliveries_max=redeliveries_max, url=redelivery_url)

    def apply(**_: Any) -> None:
        app.conf.update(overrides)
        longest = celery_settings.longest_task_seconds(app.conf, {})
        for finding in celery_settings.findings(app.conf, longest_seconds=longest):
            setting, option = finding.setting.partition(".")[::2]
            is_given = setting in overrides and (not option or option in overrides[setting])
            if finding.wanted is not None and not is_given:
                app.conf.update(celery_settings.merged(app.conf, finding))

    # Also whenever the configuration is read anew, which forgets what was set.
    app.on_after_configure.connect(apply, weak=False)
    if app.configured:
        apply()


class _Written(dict[str, Any]):
    """A plain configuration, with the attributes that Celery's own has."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)
