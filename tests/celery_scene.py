"""Real Celery workers, started as the agent's template says, and the ledger of what their tasks did."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from allocator_kit import until
from fixtures_broker import BrokerServer
from leasehold.nodeagent import templates

TESTS = Path(__file__).parent
LEDGER_DATABASE = 15


class CeleryWorker:
    """One ``celery worker`` in a session of its own; `main` is its PID."""

    def __init__(self, scene: "CeleryScene", number: int, env: Mapping[str, str], arguments: list[str]) -> None:
        self.name = f"work_{number}@test"
        self.run_dir = scene.folder / self.name
        self.run_dir.mkdir()
        self.log_path = scene.folder / f"{self.name}.log"
        template = templates.builtin()["celery"]
        values = template.values(
            {
                "app": scene.app,
                "queues": scene.queue,
                "directory": str(TESTS),
                "arguments": ["--without-mingle", "--without-gossip", *arguments],
            },
            "test",
        )
        facts = {
            "worker": self.name,
            "pool_name": "work",
            "node": "test",
            "log_file": str(self.log_path),
            "interpreter": sys.executable,
        }
        known = template.known(values, facts)
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                templates.fill_argv(template.argv, known),
                cwd=templates.fill(template.cwd, known),
                env={
                    **os.environ,
                    **{name: templates.fill(text, known) for name, text in template.env.items()},
                    "CELERY_BROKER_URL": scene.broker.url,
                    "LEASEHOLD_RUN_DIR": str(self.run_dir),
                    "WORKER_ID": self.name,
                    "TASKS_LEDGER": scene.ledger_url,
                    "TASKS_SETTINGS": json.dumps(scene.settings),
                    **env,
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.main = self._process.pid

    @property
    def children(self) -> list[int]:
        """PIDs of its pool."""
        text = Path(f"/proc/{self.main}/task/{self.main}/children").read_text()
        return [int(each) for each in text.split()]

    def log(self) -> str:
        """What it has written."""
        return self.log_path.read_text(errors="replace")

    def activity(self) -> dict[int, dict[str, Any]]:
        """Its files for the agent, by PID."""
        found = [json.loads(path.read_text()) for path in self.run_dir.glob("activity.*.json")]
        return {each["pid"]: each for each in found}

    def is_busy(self) -> bool:
        """As the agent sees it."""
        living = {self.main, *self.children}
        return any(each["tasks"] for pid, each in self.activity().items() if pid in living)

    def send(self, name: str, *, to_group: bool = False) -> None:
        """Signal the main process, or its whole group."""
        number = signal.Signals[f"SIG{name}"]
        if to_group:
            os.killpg(self.main, number)
        else:
            os.kill(self.main, number)

    async def ended(self, seconds: float = 60.0) -> int:
        """Its exit code, once it has ended."""
        try:
            await until(lambda: self._process.poll() is not None, f"{self.name} ends", seconds=seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log()}") from error  # what it has said by now
        return int(self._process.returncode)

    def end(self) -> None:
        """SIGKILL to all of it."""
        if self._process.poll() is None:
            os.killpg(self.main, signal.SIGKILL)
            self._process.wait()


class CeleryScene:
    """Workers on one broker. `settings` are of Celery, for the workers that start after."""

    def __init__(
        self, broker: BrokerServer, folder: Path, *, app: str = "celery_tasks:app", queue: str = "work"
    ) -> None:
        self.app = app
        self.queue = queue
        self.broker = broker
        self.folder = folder
        self.settings: dict[str, Any] = {"worker_soft_shutdown_timeout": 0.5, "worker_lost_wait": 0.5}
        self.ledger_url = broker.url.removesuffix("/0") + f"/{LEDGER_DATABASE}"
        self.workers: list[CeleryWorker] = []
        self._ledger = broker.client(LEDGER_DATABASE)
        self._queue = broker.client()

    async def start(self, *arguments: str, **env: str) -> CeleryWorker:
        """A worker that is ready."""
        worker = CeleryWorker(self, len(self.workers) + 1, env, list(arguments))
        self.workers.append(worker)
        await until(
            lambda: " ready." in worker.log(),
            f"{worker.name} is ready\n{worker.log()}",
            seconds=30.0,
            pause=0.05,
        )
        return worker

    def submit(self, task: str, *args: Any, **options: Any) -> str:
        """Queue a task of `celery_tasks`; its id."""
        import celery  # a worker's program, not this one's

        with celery.Celery("client", broker=self.broker.url, set_as_current=False) as app:
            app.conf.result_backend = self.settings.get("result_backend")
            options.setdefault("queue", "work")
            return str(app.send_task(f"celery_tasks.{task}", args=args, **options).id)

    def open(self, key: str) -> None:
        """Let a task `work` go on."""
        self._ledger.rpush(f"gate:{key}", "open")

    def ledger(self) -> list[str]:
        """``started KEY PID`` and ``completed KEY PID``, in order."""
        return [str(line) for line in self._ledger.lrange("ledger", 0, -1)]

    def count(self, event: str, key: str) -> int:
        """How often something happened to a key."""
        return sum(line.startswith(f"{event} {key} ") for line in self.ledger())

    def calls(self) -> list[dict[str, Any]]:
        """What the tasks `ask` wrote."""
        return [json.loads(line) for line in self._ledger.lrange("calls", 0, -1)]

    async def until_count(self, event: str, key: str, count: int = 1, seconds: float = 60.0) -> None:
        """Wait until something happened to a key so often."""
        try:
            await until(
                lambda: self.count(event, key) >= count, f"{event} {key} {count} times", seconds=seconds
            )
        except AssertionError as error:
            logs = "\n".join(worker.log()[-2000:] for worker in self.workers)
            raise AssertionError(f"{error}\n{self.ledger()}\n{logs}") from None

    def queued(self) -> int:
        """Messages that a worker may take now."""
        return int(self._queue.llen("work"))

    def unacknowledged(self) -> int:
        """Messages that a worker has, or had."""
        return int(self._queue.hlen("unacked"))

    def end(self) -> None:
        """End all."""
        for worker in self.workers:
            worker.end()
        self._ledger.close()
        self._queue.close()
