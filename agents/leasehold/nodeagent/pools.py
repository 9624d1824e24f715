"""One pool of this host: its declaration, its machine, its checks, and what waits in its queues."""

import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Final

from leasehold.core import errors
from leasehold.core.node import model, worker_effects, worker_machine
from leasehold.nodeagent import config, depth, dotenv, preflight, service_manager, templates, worker_values
from leasehold.observe import logs

#: Of the agent's own environment, not handed to workers: they would take them for theirs.
NOT_FOR_WORKERS: Final = frozenset(
    {
        *service_manager.VARIABLES,
        "LEASEHOLD_AGENT_CONFIG",
        "LEASEHOLD_STATE_DIR",
        "LEASEHOLD_SOCKET",
        "LEASEHOLD_PRESET",
        "LEASEHOLD_WORKERS_CGROUP",
        "LEASEHOLD_DRAIN_DEADLINE_SECONDS",
    }
)
_KEY_PREFIX_VARIABLE: Final = "CELERY_GLOBAL_KEYPREFIX"
_MANAGEMENT_VARIABLE: Final = "CELERY_BROKER_MANAGEMENT_URL"

_log = logs.get_logger(__name__)


class Pool:
    """A pool that the configuration declares; `declared` None: an earlier one did, and its workers are left."""

    def __init__(self, machine: worker_machine.PoolMachine, declared: config.Pool | None, node: str) -> None:
        self.machine = machine
        self.node = node
        self.declared = declared
        self.depth = model.Depth()
        self.warnings: tuple[str, ...] = ()
        #: Why its checks keep it from starting; empty: they do not.
        self.held_back = ""
        #: Its checks have passed.
        self.is_checked = False
        self.next_check_at = 0.0
        self._probe: depth.DepthProbe | None = None
        self._probed_url = ""

    @property
    def name(self) -> str:
        """The pool's name."""
        return self.machine.spec.name

    @property
    def has_depth(self) -> bool:
        """Whether its template tells where its queues are."""
        return self.declared is not None and self.declared.template.depth is not None

    def redeclare(self, declared: config.Pool | None) -> None:
        """Another declaration holds from now on."""
        self.declared = declared
        self.close()

    def close(self) -> None:
        """Drop the connection to the broker."""
        if self._probe is not None:
            self._probe.close()
        self._probe = None

    # What a worker is started with

    def start_spec(
        self, start: worker_effects.Start, log_path: pathlib.Path, base: Mapping[str, str]
    ) -> worker_values.StartSpec:
        """How to start one worker. Raises `InvalidArgument`, or `FailedPrecondition` if nothing declares it."""
        declared = self._declared()
        known = self._known(start.name, log_path)
        return worker_values.StartSpec(
            worker_id=start.worker_id,
            name=start.name,
            pool=self.name,
            number=start.number,
            start_number=start.start_number,
            argv=tuple(templates.fill_argv(declared.template.argv, known)),
            env=self.environment(base, known),
            cwd=self._cwd(known),
            limit_bytes=self.machine.spec.worker_limit_bytes,
            stop=self.machine.spec.stop,
            log=declared.log,
        )

    def environment(self, base: Mapping[str, str], known: templates.Values) -> dict[str, str]:
        """A worker's environment: the agent's, then the template's, then the pool's file, then the pool's own.

        Raises `InvalidArgument` if a file of it cannot be read.
        """
        declared = self._declared()
        env = {name: value for name, value in base.items() if name not in NOT_FOR_WORKERS}
        env.update({name: templates.fill(text, known) for name, text in declared.template.env.items()})
        if declared.env_file is not None:
            values = dotenv.read(declared.env_file)
            if values is None:
                raise errors.InvalidArgument(f"env_file: {declared.env_file} does not exist", field="env_file")
            env.update(values)
        env.update(declared.env)
        return preflight.worker_environment(env, declared.template.env_pass)

    def subject(self, logs_folder: pathlib.Path, base: Mapping[str, str]) -> preflight.Subject:
        """What the checks look at. Raises `InvalidArgument`."""
        declared = self._declared()
        name = model.worker_name(self.name, 1, self.node)
        known = self._known(name, logs_folder / f"{name}.log")
        return preflight.Subject(
            argv=templates.fill_argv(declared.template.argv, known),
            env=self.environment(base, known),
            cwd=self._cwd(known),
            logs=logs_folder,
            checks=[templates.filled_check(each, known) for each in declared.template.preflight],
        )

    # What waits

    async def ask_depth(self, base: Mapping[str, str]) -> model.Depth:
        """What waits in the pool's queues; why it is not known, where it is not. Raises nothing."""
        declared = self.declared
        if declared is None or declared.template.depth is None:
            return model.Depth()
        known = self._known(model.worker_name(self.name, 1, self.node), pathlib.Path(os.devnull))
        source = declared.template.depth
        try:
            env = self.environment(base, known)
            url = env.get(source.url_variable, "")
            if not url:
                return model.Depth(error=f"{source.url_variable} is not set")
            if self._probe is None or url != self._probed_url:
                self.close()
                self._probe = depth.probe_of(
                    url,
                    setting=source.url_variable,
                    key_prefix=env.get(_KEY_PREFIX_VARIABLE, ""),
                    management_url=env.get(_MANAGEMENT_VARIABLE, ""),
                )
                self._probed_url = url
        except errors.LeaseholdError as error:
            return model.Depth(error=error.message)
        queues = [name.strip() for name in templates.fill(source.queues, known).split(",") if name.strip()]
        return await self._probe.depth(queues)

    def _declared(self) -> config.Pool:
        if self.declared is None:
            raise errors.FailedPrecondition(f"pool {self.name} is not declared any more")
        return self.declared

    def _known(self, worker: str, log_path: pathlib.Path) -> templates.Values:
        declared = self._declared()
        facts = {
            "worker": worker,
            "pool_name": self.name,
            "node": self.node,
            "log_file": str(log_path),
            "interpreter": sys.executable,
        }
        return declared.template.known(declared.values, facts)

    def _cwd(self, known: templates.Values) -> pathlib.Path:
        text = templates.fill(self._declared().template.cwd, known)
        return pathlib.Path(text) if text else pathlib.Path.cwd()
