"""How an attempt of a job is started: its template, with what the assignment says filled in."""

import dataclasses
import pathlib
import sys
from collections.abc import Mapping
from typing import Final

from leasehold.core import errors
from leasehold.core.job import model as job_model
from leasehold.core.node import job_life, model
from leasehold.nodeagent import pools, preflight, templates, worker_values

_LOG: Final = worker_values.LogSettings(max_bytes=16 * model.MIB, keep=2)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A template with an assignment's values."""

    template: templates.Template
    values: templates.Values

    @property
    def stop(self) -> model.StopContract:
        """How it is asked to end."""
        return templates.contract(self.template.stop, self.values)


def command(assignment: job_life.Assignment, known: Mapping[str, templates.Template]) -> Command:
    """What an assignment runs.

    Raises `NotFound` for an unknown template, `InvalidArgument` for parameters that it does not take.
    """
    template = known.get(assignment.template)
    if template is None:
        raise errors.NotFound(
            f"template: this host has no job template {assignment.template[:63]!r}; "
            f"it has {', '.join(sorted(known)) or 'none'}",
            field="template",
        )
    return Command(template=template, values=template.values(assignment.parameters, "parameters"))


def start_spec(
    assignment: job_life.Assignment,
    chosen: Command,
    *,
    worker_id: str,
    node: str,
    log_path: pathlib.Path,
    base: Mapping[str, str],
) -> worker_values.StartSpec:
    """How to start an attempt; `base` is the agent's environment. Raises `InvalidArgument`."""
    ref, template = assignment.ref, chosen.template
    facts = {
        "job_id": ref.job_id,
        "attempt": str(ref.attempt),
        "job_name": assignment.name,
        "cpus": str(assignment.held.cpus),
        "memory_bytes": str(assignment.held.memory_bytes),
        "node": node,
        "log_file": str(log_path),
        "interpreter": sys.executable,
    }
    known = template.known(chosen.values, facts)
    cwd = templates.fill(template.cwd, known)
    env = {name: value for name, value in base.items() if name not in pools.NOT_FOR_WORKERS}
    env.update({name: templates.fill(text, known) for name, text in template.env.items()})
    env = preflight.worker_environment(env, template.env_pass)
    env.update(
        LEASEHOLD_JOB_ID=ref.job_id,
        LEASEHOLD_JOB_ATTEMPT=facts["attempt"],
        LEASEHOLD_JOB_CPUS=facts["cpus"],
        LEASEHOLD_JOB_MEMORY_BYTES=facts["memory_bytes"],
    )
    return worker_values.StartSpec(
        worker_id=worker_id,
        name=ref.log_name,
        pool="jobs",
        number=ref.attempt,
        start_number=ref.attempt,
        argv=tuple(templates.fill_argv(template.argv, known)),
        env=env,
        cwd=pathlib.Path(cwd) if cwd else pathlib.Path.cwd(),
        limit_bytes=assignment.held.memory_bytes,
        stop=chosen.stop,
        log=dataclasses.replace(_LOG, is_reopened=template.log_reopens_on == "rename"),
        cpus=assignment.held.cpus,
        max_run_seconds=assignment.max_run_seconds,
        kill_grace_seconds=job_model.KILL_GRACE_SECONDS,
    )
