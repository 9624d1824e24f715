"""Processes as the core names them."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ProcessKey:
    """A process, told from every other that ever ran: a reused PID has another start time.

    `pid` is as seen inside `pid_namespace`, the inode of /proc/PID/ns/pid; `start_time_ticks` is field 22 of
    /proc/PID/stat.
    """

    boot_id: str
    pid_namespace: int
    pid: int
    start_time_ticks: int
