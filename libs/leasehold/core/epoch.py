"""The epoch: which leader's reign a statement belongs to."""

from typing import NamedTuple

from leasehold.core import errors


class Epoch(NamedTuple):
    """One reign of a leader. Ordered by (generation, revision); the cluster id decides nothing in the order.

    ``generation`` is kept in Postgres and grows when an operator accepts a new etcd cluster, ``revision`` is
    etcd's revision at which the leader was elected, ``etcd_cluster_id`` tells the cluster it was elected in.
    """

    generation: int
    revision: int
    etcd_cluster_id: int = 0

    def encode(self) -> str:
        """Text form, as stored under etcd's epoch key and in Postgres."""
        return f"{self.generation}:{self.revision}:{self.etcd_cluster_id:016x}"

    @classmethod
    def decode(cls, text: str) -> "Epoch":
        """Inverse of `encode`; raises `InvalidArgument` on anything else."""
        try:
            generation, revision, cluster = text.split(":")
            return cls(int(generation), int(revision), int(cluster, 16))
        except ValueError as error:
            raise errors.InvalidArgument(f"not an epoch: {text!r}", field="epoch") from error


ZERO = Epoch(0, 0, 0)
