"""Keeps leasehold-workers.service alive, out of the way of the cgroups that the agent makes below it.

cgroup v2 lets a group hand its controllers down only while it has no processes of its own, so this one moves into
a leaf before it tells systemd that the unit is ready. (systemd 254 and newer can do this by DelegateSubgroup=;
Debian 12 has 252.) On cgroup v1 there is nothing to do but to wait.
"""

import os
import signal
import socket

LEAF = "holder"
CONTROLLERS = "+memory +pids"


def own_group() -> str | None:
    """Folder of this process's group in the unified hierarchy; None where there is none."""
    with open("/proc/self/cgroup") as lines:
        for line in lines:
            number, _, path = line.rstrip("\n").split(":", 2)
            if number == "0" and os.path.exists("/sys/fs/cgroup/cgroup.controllers"):
                return f"/sys/fs/cgroup{path}"
    return None


def hand_down(group: str) -> None:
    """Move into a leaf and enable the controllers for the groups beside it."""
    leaf = os.path.join(group, LEAF)
    os.makedirs(leaf, exist_ok=True)
    with open(os.path.join(leaf, "cgroup.procs"), "w") as processes:
        processes.write(str(os.getpid()))
    with open(os.path.join(group, "cgroup.subtree_control"), "w") as control:
        control.write(CONTROLLERS)


def tell_ready() -> None:
    """READY=1 to systemd, if it asked for it."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.connect("\0" + address[1:] if address.startswith("@") else address)
        notify.send(b"READY=1")


def main() -> None:
    """Hold the group until SIGTERM."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    group = own_group()
    if group is not None:
        hand_down(group)
    tell_ready()
    signal.sigwait({signal.SIGTERM, signal.SIGINT})


if __name__ == "__main__":
    main()
