"""The script of the jobs' scene: hosts, jobs of mixed sizes, and when what is killed."""

import json
import pathlib
import random
from dataclasses import dataclass
from typing import Final

NODES: Final = ("demo-1", "demo-2", "demo-3", "demo-4")
NODE_CPUS: Final = 8
NODE_MEMORY_GB: Final = 16
TEMPLATE: Final = "demo-job"
SEED: Final = 20_261_126
GIB: Final = 2**30
MAX_RUN_SECONDS: Final = 60

#: The program of a job: writes down that it begins and that it is done, each in one write at the end of a file.
PROGRAM: Final = """\
#!/bin/sh
# job.sh JOURNAL KEY SECONDS EXIT_CODE
printf 'start %s %s\\n' "$2" "$$" >>"$1"
sleep "$3"
printf 'end %s %s\\n' "$2" "$$" >>"$1"
exit "$4"
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """A run. Fractions are of all jobs that have ended."""

    jobs: int = 2000
    kill_leader_at: float = 0.3
    kill_agent_at: float = 0.6
    #: The killed agent's successor follows so much later.
    agent_back_seconds: float = 3.0
    #: At the latest.
    end_at_seconds: float = 420.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """A job of the scene."""

    key: str
    cpus: int
    memory_bytes: int
    seconds: float
    exit_code: int
    priority: int


def jobs(script: Script) -> list[Wanted]:
    """The same jobs in each run: most are small, a few take half a node; one of 50 fails."""
    chance = random.Random(SEED)  # noqa: S311 - sizes of jobs, the same in each run
    return [
        Wanted(
            key=f"job-{number:05d}",
            cpus=chance.choice((1, 1, 1, 1, 1, 1, 2, 2, 4)),
            memory_bytes=chance.choice((1, 1, 1, 2, 2, 4, 8)) * GIB // 2,
            seconds=round(chance.uniform(0.02, 0.4), 2),
            exit_code=1 if number % 50 == 49 else 0,
            priority=chance.choice((0, 0, 0, 10)),
        )
        for number in range(script.jobs)
    ]


def agent_yaml(node: str, folder: pathlib.Path) -> str:
    """The configuration of one of the hosts: it runs jobs, and no pools."""
    program, journal = folder / "job.sh", folder / "journal"
    return f"""\
# Written by the demo.
node: {node}
jobs:
  cpus: {NODE_CPUS}
  memory_gb: {NODE_MEMORY_GB}
job_templates:
  {TEMPLATE}:
    description: Writes down that it begins, waits, and writes down that it is done.
    parameters:
      key: {{pattern: 'job-[0-9]{{5}}'}}
      seconds: {{pattern: '[0-9]+\\.[0-9]+'}}
      exit_code: {{pattern: '[01]'}}
    argv:
      - /bin/sh
      - {json.dumps(str(program))}
      - {json.dumps(str(journal))}
      - '{{key}}'
      - '{{seconds}}'
      - '{{exit_code}}'
"""
