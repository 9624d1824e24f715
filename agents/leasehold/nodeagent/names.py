"""Names of settings: those of the agent, and all others of this product that one environment may hold.

A shared `.env` has many names that are nobody's business here; those that begin with LEASEHOLD_ are, so that a
mistyped one is told instead of being without effect.
"""

import re
from collections.abc import Iterable
from typing import Final

from leasehold.core import errors

PREFIX: Final = "LEASEHOLD_"

#: The agent's own settings: name of the variable to (flag without --, what it is).
AGENT: Final = {
    "LEASEHOLD_AGENT_CONFIG": ("config", "YAML file with this host's pools, templates and settings"),
    "LEASEHOLD_NODE": ("node", "this host's name (default: its host name)"),
    "LEASEHOLD_STATE_DIR": ("state-dir", "folder of the agent's state, its lock and the workers' logs"),
    "LEASEHOLD_SOCKET": ("socket", "Unix socket of the agent's API (default: agent.sock in the state folder)"),
    "LEASEHOLD_ADDR": ("addr", "host:port of the allocators, comma-separated; empty: there is none"),
    "LEASEHOLD_PRESET": ("preset", "settings to begin with: dev or r620"),
    "LEASEHOLD_WORKERS_CGROUP": ("workers-cgroup", "folder of the cgroup below which the workers' are made"),
    "LEASEHOLD_DRAIN_DEADLINE_SECONDS": (
        "drain-deadline-seconds",
        "how long SIGTERM waits for running tasks (default: the longest stop contract)",
    ),
    "LEASEHOLD_LOG_FORMAT": ("log-format", "auto, json or console"),
    "LEASEHOLD_LOG_LEVEL": ("log-level", "debug, info, warning or error"),
    "LEASEHOLD_TLS_CERTIFICATE_FILE": (
        "tls-certificate-file",
        "PEM of the certificate shown to the allocators",
    ),
    "LEASEHOLD_TLS_KEY_FILE": ("tls-key-file", "PEM of its key"),
    "LEASEHOLD_TLS_CA_FILE": ("tls-ca-file", "PEM of the authorities of the allocators' certificates"),
}

#: Of other processes of the product, of workers, of tests.
OTHERS: Final = frozenset(
    {
        # Allocators.
        "LEASEHOLD_LISTEN",
        "LEASEHOLD_ADVERTISE",
        "LEASEHOLD_ETCD_ENDPOINTS",
        "LEASEHOLD_ETCD_PREFIX",
        "LEASEHOLD_ETCD_CA_FILE",
        "LEASEHOLD_ETCD_CERTIFICATE_FILE",
        "LEASEHOLD_ETCD_KEY_FILE",
        "LEASEHOLD_ETCD_USER",
        "LEASEHOLD_ETCD_PASSWORD_FILE",
        "LEASEHOLD_ETCD_TXN_OPS_MAX",
        "LEASEHOLD_POSTGRES_DSN",
        "LEASEHOLD_POSTGRES_DSN_FILE",
        "LEASEHOLD_BUDGETS_FILE",
        "LEASEHOLD_ROLES_FILE",
        "LEASEHOLD_ELECTION_TTL_SECONDS",
        "LEASEHOLD_ACCEPT_NEW_ETCD",
        "LEASEHOLD_ACCEPT_UNFIT_ETCD",
        # Gateways.
        "LEASEHOLD_GATEWAY_LISTEN",
        "LEASEHOLD_GATEWAY_ALLOWED_HOSTS",
        "LEASEHOLD_GATEWAY_TLS_CERTIFICATE_FILE",
        "LEASEHOLD_GATEWAY_TLS_KEY_FILE",
        "LEASEHOLD_GATEWAY_TLS_CA_FILE",
        "LEASEHOLD_GATEWAY_REQUEST_TIMEOUT_SECONDS",
        "LEASEHOLD_GATEWAY_ALLOCATOR_TIMEOUT_SECONDS",
        "LEASEHOLD_GATEWAY_BODY_BYTES_MAX",
        # Told to workers.
        "LEASEHOLD_WORKER_ID",
        "LEASEHOLD_WORKER_NAME",
        "LEASEHOLD_POOL",
        "LEASEHOLD_RUN_DIR",
        "LEASEHOLD_MAX_RUN_SECONDS",
        "LEASEHOLD_KILL_GRACE_SECONDS",
        "LEASEHOLD_JOB_ID",
        "LEASEHOLD_JOB_ATTEMPT",
        "LEASEHOLD_JOB_CPUS",
        "LEASEHOLD_JOB_MEMORY_BYTES",
        # Demo and development.
        "LEASEHOLD_DEMO_LEDGER",
        "LEASEHOLD_CACHE_DIR",
        "LEASEHOLD_TEST_SERVERS",
        "LEASEHOLD_BENCH_PROFILE",
        "LEASEHOLD_BENCH_QUICK",
        "LEASEHOLD_COMPLETE",
        # Of deploy/compose.yaml.
        "LEASEHOLD_APP",
    }
)


#: Kubernetes tells every container of a namespace's services by such names: LEASEHOLD_ALLOCATOR_SERVICE_HOST.
_OF_KUBERNETES: Final = re.compile(
    r"LEASEHOLD\w*_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)"
)


def check_product_names(given: Iterable[str], where: str) -> None:
    """Raise `InvalidArgument` for a name that begins with LEASEHOLD_ and is none of the product's."""
    for name in given:
        if not name.startswith(PREFIX) or name in AGENT or name in OTHERS or _OF_KUBERNETES.fullmatch(name):
            continue
        import difflib  # only a mistake needs it

        near = difflib.get_close_matches(name, [*AGENT, *OTHERS], n=1, cutoff=0.85)
        meant = f"; did you mean {near[0]}?" if near else f"; the agent knows {', '.join(sorted(AGENT))}"
        raise errors.InvalidArgument(f"{name} ({where}): there is no such setting{meant}", field=name)
