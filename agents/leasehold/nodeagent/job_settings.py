"""What a host declares for jobs in its configuration: what they may have together, and what they may run.

Job templates have the shape of worker templates (`templates`), without what only a pool of workers has. Nobody
who reaches the control plane can run anything that the host's administrator did not write down here.
"""

import dataclasses
from collections.abc import Mapping
from typing import Final

from leasehold.core.job import model as job_model
from leasehold.core.node import model
from leasehold.core.placement import model as placement
from leasehold.nodeagent import documents, templates

#: Of one host; more are a mistake in a file.
TEMPLATES_MAX: Final = 64
#: Filled in for each attempt; no parameter may have such a name.
FACTS: Final = ("job_id", "attempt", "job_name", "cpus", "memory_bytes", "node", "log_file", "interpreter")

_NOT_FOR_JOBS: Final = ("restart", "depth", "preflight")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class JobSettings:
    """What jobs may have of this host together, and how long what they wrote is kept."""

    total: placement.Resources = dataclasses.field(default_factory=lambda: placement.Resources(0, 0))
    log_keep_seconds: float = 86_400.0

    @property
    def is_running_jobs(self) -> bool:
        """Whether jobs get anything here."""
        return self.total.cpus > 0 and self.total.memory_bytes > 0


def read_settings(document: documents.Section) -> JobSettings:
    """The key `jobs`; nothing for jobs where it is missing. Raises `InvalidArgument` naming the place."""
    if "jobs" not in document:
        document.take("jobs")
        return JobSettings()
    section = document.section("jobs")
    cpus = section.whole("cpus", 0, most=job_model.CPUS_MAX)
    memory_gb = section.number("memory_gb", 0.0, most=1e6)
    keep_hours = section.number("log_keep_hours", 24.0, most=24.0 * 366)
    section.end()
    if cpus < 1:
        raise documents.wrong(section.at("cpus"), "must be 1 or more: what jobs may have of this host together")
    if memory_gb * model.GIB < 1:
        raise documents.wrong(
            section.at("memory_gb"), "must be above 0: what jobs may have of this host together"
        )
    return JobSettings(
        total=placement.Resources(cpus, int(memory_gb * model.GIB)), log_keep_seconds=keep_hours * 3600.0
    )


def read_templates(document: documents.Section) -> Mapping[str, templates.Template]:
    """The key `job_templates`. Raises `InvalidArgument` naming the place."""

    def read(name: str, section: documents.Section) -> templates.Template:
        for key in _NOT_FOR_JOBS:
            if key in section:
                raise documents.wrong(section.at(key), "is a pool's; a job template has none")
        job_model.checked_queue_name(name, field_name=section.where)
        return templates.read_template(name, section, facts=FACTS)

    found = document.named("job_templates", read)
    if len(found) > TEMPLATES_MAX:
        raise documents.wrong("job_templates", f"{len(found)} templates; at most {TEMPLATES_MAX}")
    return found
