"""Processes and epochs between proto and core: what every service says the same way."""

import functools

from leasehold.api.common.v1 import epoch_pb2, process_pb2
from leasehold.core import epoch as epochs
from leasehold.core import errors, processes

_PID_MAX = 1 << 22
_BOOT_ID_LENGTH_MAX = 64


def checked_boot_id(boot_id: str, *, field_name: str) -> str:
    """`boot_id` if it can be one, else raises `InvalidArgument`."""
    if not (0 < len(boot_id) <= _BOOT_ID_LENGTH_MAX and boot_id.isascii() and boot_id.isprintable()):
        raise errors.InvalidArgument(f"{field_name}: is not a boot id", field=field_name)
    return boot_id


def decode_process(message: process_pb2.ProcessIdentity) -> processes.ProcessKey:
    """The identity. Raises `InvalidArgument`."""
    boot_id = checked_boot_id(message.boot_id, field_name="process.boot_id")
    if not 0 < message.pid <= _PID_MAX:
        raise errors.InvalidArgument(f"process.pid: {message.pid} is not a PID", field="process.pid")
    return processes.ProcessKey(boot_id, message.pid_namespace, message.pid, message.start_time_ticks)


def encode_process(process: processes.ProcessKey) -> process_pb2.ProcessIdentity:
    """The message."""
    return process_pb2.ProcessIdentity(
        boot_id=process.boot_id,
        pid_namespace=process.pid_namespace,
        pid=process.pid,
        start_time_ticks=process.start_time_ticks,
    )


def decode_epoch(message: epoch_pb2.Epoch) -> epochs.Epoch:
    """The epoch."""
    return epochs.Epoch(message.generation, message.revision, message.etcd_cluster_id)


def encode_epoch(epoch: epochs.Epoch) -> epoch_pb2.Epoch:
    """The message."""
    return epoch_pb2.Epoch(
        generation=epoch.generation, revision=epoch.revision, etcd_cluster_id=epoch.etcd_cluster_id
    )


# An allocator says one epoch all its reign.
shared_epoch = functools.lru_cache(maxsize=16)(encode_epoch)
