-- raise_epoch: Take the fence for an epoch. First statement of every write; no row: a higher epoch has it.
--
-- It is the UPDATE itself and not a SELECT ... FOR SHARE: the row lock that it takes is held to the end of the
-- transaction, so a batch of the old leader and the takeover of the new one come one after the other. If the batch
-- is first, the takeover waits, and the new leader reads what was written. If the takeover is first, the batch
-- waits, READ COMMITTED evaluates its WHERE again on the new row, and it is refused. A share lock would do that
-- too, but append_ledger writes this row, and two share locks that both want to write would deadlock. There is one
-- leader, so that its writes wait for each other costs nothing.
UPDATE epoch_fence
SET generation = %(generation)s,
    revision = %(revision)s,
    etcd_cluster_id = %(etcd_cluster_id)s,
    ledger_batch = CASE
        WHEN (generation, revision) = (%(generation)s, %(revision)s) THEN ledger_batch
        ELSE 0
    END,
    update_time = now()
WHERE (generation, revision) <= (%(generation)s, %(revision)s)
RETURNING ledger_batch;

-- get_epoch: The epoch that has the fence.
SELECT generation, revision, etcd_cluster_id
FROM epoch_fence;

-- note_ledger_batch: Remember the number of the batch that is being written; the fence is taken already.
UPDATE epoch_fence
SET ledger_batch = %(batch)s;

-- lock_generations: One claim at a time; reading goes on.
LOCK TABLE generation IN SHARE ROW EXCLUSIVE MODE;

-- get_generation: The generation in force.
SELECT generation, etcd_cluster_id
FROM generation
ORDER BY generation DESC
LIMIT 1;

-- insert_generation: Accept a cluster.
INSERT INTO generation (generation, etcd_cluster_id, accepted_time)
VALUES (%(generation)s, %(etcd_cluster_id)s, now());
