"""A cap on how often a task is run again after its worker was lost. Celery has none: it would do so for ever.

Counted are starts of a task, by its id, that neither ended nor were given back in order. Each start counts
one more; the acknowledgement, or a rejection for good, clears the count; a stop that interrupts the task and
gives it back takes the one back. So the count is the number of workers that the task has cost, and a task
that is merely long, or waits for its ETA through many restarts, is never held to be poison. It is kept in
Redis: the broker, else the result backend, else where `configure` is told to. All of it happens in the
worker's main process, so it is true though the child that ran the task is gone.

A task over the cap is not run. Its message goes to the list ``leasehold:dead:QUEUE``, it is marked as failed,
with `celery.exceptions.WorkerLostError`, and rejected without requeue (RabbitMQ: to the queue's dead-letter
exchange). `revive` puts dead letters back. Where the count cannot be read, the task is run: the cap is a
guard, not a gate.
"""

import contextlib
import json
import time
import urllib.parse
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from celery import exceptions, signals
from celery.worker import request as requests
from celery.worker import state
from leasehold.client import celery_settings
from leasehold.core import errors
from leasehold.observe import logs

REDELIVERIES_MAX: Final = 3
#: A count that was left over is gone after so long; each start renews it.
_COUNT_SECONDS: Final = 7 * 86_400
#: The newest are kept, per queue.
_DEAD_LETTERS_MAX: Final = 10_000
_ANSWER_SECONDS: Final = 2.0

_log = logs.get_logger(__name__)


class Counts:
    """The counts of one application, in a Redis."""

    def __init__(self, client: Any, prefix: str = "") -> None:
        self._client = client
        self._prefix = prefix

    def starts(self, task_id: str) -> int:
        """Starts that neither ended nor were given back."""
        return int(self._client.get(self._key(task_id)) or 0)

    def started(self, task_id: str) -> None:
        """One start more."""
        pipeline = self._client.pipeline()
        pipeline.incr(self._key(task_id)).expire(self._key(task_id), _COUNT_SECONDS).execute()

    def given_back(self, task_id: str) -> None:
        """The last start was interrupted in order."""
        pipeline = self._client.pipeline()
        pipeline.decr(self._key(task_id)).expire(self._key(task_id), _COUNT_SECONDS).execute()

    def clear(self, task_id: str) -> None:
        """The task is over, or begins anew."""
        self._client.delete(self._key(task_id))

    def bury(self, queue: str, letter: dict[str, Any]) -> None:
        """Put a task among the dead letters of its queue."""
        key = self.dead_letters_key(queue)
        pipeline = self._client.pipeline()
        pipeline.lpush(key, json.dumps(letter, default=str)).ltrim(key, 0, _DEAD_LETTERS_MAX - 1).execute()

    def exhume(self, queue: str) -> dict[str, Any] | None:
        """Take the oldest dead letter of a queue."""
        letter = self._client.rpop(self.dead_letters_key(queue))
        return None if letter is None else json.loads(letter)

    def dead_letters_key(self, queue: str) -> str:
        """Name of the list."""
        return f"{self._prefix}leasehold:dead:{queue}"

    def _key(self, task_id: str) -> str:
        return f"{self._prefix}leasehold:starts:{task_id}"


@dataclass(slots=True, kw_only=True)
class Cap:
    """What an application has set."""

    redeliveries_max: int
    #: None: there is no Redis to count in, and nothing is capped.
    counts: Counts | None
    has_failed: bool = False

    @contextlib.contextmanager
    def tried(self) -> Iterator[None]:
        """Do something with the counts; that they cannot be reached is told, once, and harms nobody."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  whatever the client raises, tasks go on
            if not self.has_failed:
                self.has_failed = True
                _log.warning("redeliveries_uncounted", error=str(error))
        else:
            self.has_failed = False


_caps: weakref.WeakKeyDictionary[Any, Cap] = weakref.WeakKeyDictionary()
_urls: weakref.WeakKeyDictionary[Any, str | None] = weakref.WeakKeyDictionary()


def install(app: Any, *, redeliveries_max: int = REDELIVERIES_MAX, url: str | None = None) -> None:
    """Cap the redeliveries of all tasks of `app`, from the start of its worker.

    `redeliveries_max` (at least 0) times is a task run again whose worker was lost. `url` is a Redis to count
    in, if neither the broker nor the result backend is one. Raises `InvalidArgument`.
    """
    if isinstance(redeliveries_max, bool) or not isinstance(redeliveries_max, int) or redeliveries_max < 0:
        raise errors.InvalidArgument(
            f"redeliveries_max: {redeliveries_max!r} is not a whole number from 0", field="redeliveries_max"
        )
    if url is not None and not celery_settings.is_redis(url):
        raise errors.InvalidArgument("redelivery_url: not the address of a Redis", field="redelivery_url")
    _caps[app] = Cap(redeliveries_max=redeliveries_max, counts=None)
    _urls[app] = url


def is_installed(app: Any) -> bool:
    """Whether `install` was called for this application."""
    return app in _caps


def place(app: Any) -> str | None:
    """Address of the Redis that an application's redeliveries are counted in; None: there is none."""
    for url in (_urls.get(app), app.conf.broker_read_url, app.conf.result_backend):
        if celery_settings.is_redis(url) and not str(url).startswith("sentinel"):
            return str(url).split(";")[0]
    return None


def counts_of(app: Any) -> Counts | None:
    """The counts of an application; None where there is no Redis to keep them in."""
    url = place(app)
    if url is None:
        return None
    import redis  # comes with celery[redis]; an application on another broker need not have it

    options: dict[str, Any] = {"socket_timeout": _ANSWER_SECONDS, "socket_connect_timeout": _ANSWER_SECONDS}
    prefix = ""
    if url == str(app.conf.broker_read_url).split(";")[0]:
        prefix = (app.conf.broker_transport_options or {}).get("global_keyprefix", "")
        if isinstance(app.conf.broker_use_ssl, dict):
            options |= app.conf.broker_use_ssl
    return Counts(redis.Redis.from_url(_redis_url(url), **options), prefix)


def revive(app: Any, queue: str, *, most: int = 1_000) -> int:
    """Put up to `most` dead letters of a queue back into it, the oldest first, counted anew; how many it was.

    Raises `FailedPrecondition` where there is no Redis that holds any.
    """
    counts = counts_of(app)
    if counts is None:
        raise errors.FailedPrecondition("there is no Redis that redeliveries are counted in")
    revived = 0
    while revived < most and (letter := counts.exhume(queue)) is not None:
        counts.clear(letter["id"])
        # Exactly the message that was taken, with its id, headers and links, before anybody decoded it.
        with app.producer_pool.acquire(block=True) as producer:
            producer.publish(
                letter["body"],
                routing_key=queue,
                exchange="",
                headers=letter["headers"],
                content_type=letter["content_type"],
                content_encoding=letter["content_encoding"],
                serializer=None,
                **letter["properties"],
            )
        revived += 1
    return revived


def _redis_url(url: str) -> str:
    """As the library `redis` reads it; Celery's own way to write it has some words more."""
    parts = urllib.parse.urlsplit(url)
    query = dict(urllib.parse.parse_qsl(parts.query))
    if "ssl_cert_reqs" in query:
        query["ssl_cert_reqs"] = query["ssl_cert_reqs"].lower().removeprefix("cert_")
    parts_scheme = parts.scheme
    if parts_scheme == "redis+socket":
        parts_scheme = "unix"
        query["db"] = query.pop("virtual_host", "0").strip("/") or "0"
        return f"unix://{parts.netloc}{parts.path}?{urllib.parse.urlencode(query)}"
    return parts._replace(query=urllib.parse.urlencode(query)).geturl()


class CountedRequest(requests.Request):  # type: ignore[misc]  # Celery has no types
    """A task in the main process of a worker, whose starts are counted."""

    def revoked(self) -> bool:
        """Asked before each start: whether it must not be."""
        if super().revoked():
            return True
        cap = _caps.get(self.app)
        if cap is None or cap.counts is None or not self.delivery_info.get("redelivered"):
            return False
        starts = 0
        with cap.tried():
            starts = cap.counts.starts(self.id)
        return starts > cap.redeliveries_max and self._bury(cap, cap.counts, starts)

    def on_accepted(self, pid: int, time_accepted: float) -> None:
        """A child has begun."""
        self._count(lambda counts: counts.started(self.id))
        super().on_accepted(pid, time_accepted)

    def acknowledge(self) -> None:
        """It is over."""
        if not self.acknowledged:
            self._count(lambda counts: counts.clear(self.id))
        super().acknowledge()

    def reject(self, requeue: bool = False) -> None:
        """It goes back, or away. A child that was lost keeps its count; a task that asked for it does not."""
        if not self.acknowledged and not requeue:
            self._count(lambda counts: counts.clear(self.id))
        super().reject(requeue=requeue)

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> Any:
        """It raised, or its child was lost."""
        error = exc_info.exception
        if isinstance(getattr(error, "exc", error), exceptions.Reject):
            self._count(lambda counts: counts.given_back(self.id))
        return super().on_failure(exc_info, send_failed_event=send_failed_event, return_ok=return_ok)

    def _announce_cancelled(self, emit_retry: bool = True) -> None:
        # A stop, or a lost connection, interrupts it: the message will be given back.
        self._count(lambda counts: counts.given_back(self.id))
        super()._announce_cancelled(emit_retry=emit_retry)

    def _count(self, change: Callable[[Counts], None]) -> None:
        cap = _caps.get(self.app)
        if cap is not None and cap.counts is not None and self.task.acks_late:
            with cap.tried():
                change(cap.counts)

    def _bury(self, cap: Cap, counts: Counts, starts: int) -> bool:
        """Put the task away for good; whether that was possible."""
        queue = str(self.delivery_info.get("routing_key") or "")
        message = self.message
        is_buried = False
        with cap.tried():
            counts.bury(
                queue,
                {
                    "id": self.id,
                    "task": self.name,
                    "starts": starts,
                    "time": time.time(),
                    "headers": message.headers,
                    "properties": _plain(message.properties),
                    "body": message.body if isinstance(message.body, str) else bytes(message.body).decode(),
                    "content_type": message.content_type,
                    "content_encoding": message.content_encoding,
                },
            )
            is_buried = True
        if not is_buried:
            return False
        _log.error(
            "task_quarantined",
            task_id=self.id,
            task=self.name,
            queue=queue,
            lost_workers=starts,
            redeliveries_max=cap.redeliveries_max,
            dead_letters=counts.dead_letters_key(queue),
        )
        state.task_ready(self)
        self._fail(starts)
        self.reject(requeue=False)
        return True

    def _fail(self, starts: int) -> None:
        error = exceptions.WorkerLostError(f"{starts} workers were lost while they ran it; it is not run again")
        self.task.backend.mark_as_failure(self.id, error, request=self._context, store_result=self.store_errors)
        signals.task_failure.send(
            sender=self.task,
            task_id=self.id,
            exception=error,
            args=self.args,
            kwargs=self.kwargs,
            traceback=None,
            einfo=None,
        )


def _plain(properties: dict[str, Any]) -> dict[str, Any]:
    kept = ("correlation_id", "reply_to", "priority", "delivery_mode", "expiration")
    return {name: properties[name] for name in kept if properties.get(name) is not None}


def _start(instance: Any = None, **_: Any) -> None:
    """Before a worker takes its first task, when all of them are known, whatever class each is of."""
    cap = _caps.get(instance.app)
    if cap is None:
        return
    cap.counts = counts_of(instance.app)
    if cap.counts is None:
        _log.warning(
            "redeliveries_uncapped",
            remedy="give configure() a redelivery_url, or the queue a delivery limit (RabbitMQ, quorum)",
        )
        return
    for task in instance.app.tasks.values():
        if not has_own_request(task):
            task.Request = CountedRequest


def has_own_request(task: Any) -> bool:
    """Whether a task has replaced what counts its starts."""
    return task.Request not in ("celery.worker.request:Request", requests.Request, CountedRequest)


signals.celeryd_after_setup.connect(_start, weak=False)
