"""Real etcd and PostgreSQL as child processes, for `leasehold up`, tests and benchmarks; not for production.

::

    with devstack.Stack(Path(".leasehold/dev"), announce=print) as stack:
        use(stack.etcd_endpoints, stack.postgres_dsn)

Linux only: processes are told apart by what /proc shows and signalled through pidfds.
"""

from leasehold.devstack.etcd import EtcdCluster, EtcdServer
from leasehold.devstack.owner import Owner
from leasehold.devstack.owner import find as find_owner
from leasehold.devstack.owner import stop as stop_owner
from leasehold.devstack.postgres import PostgresServer
from leasehold.devstack.process import Child
from leasehold.devstack.records import record_process
from leasehold.devstack.stack import Stack, end_leftovers

__all__ = [
    "Child",
    "EtcdCluster",
    "EtcdServer",
    "Owner",
    "PostgresServer",
    "Stack",
    "end_leftovers",
    "find_owner",
    "record_process",
    "stop_owner",
]
