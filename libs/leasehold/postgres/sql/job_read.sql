-- end_sessions: Those of flushers of lower epochs, or (with `is_own`) of this one; each is waited for.
--
-- Postgres is free to evaluate the parts of an AND in any order: only CASE keeps another program's name from being
-- read as an epoch. Who is to end is found before anybody is ended, by MATERIALIZED.
WITH flusher AS MATERIALIZED (
    SELECT pid, application_name AS name,
        CASE
            WHEN application_name ~ '^leasehold-jobs [0-9]{1,18}[.][0-9]{1,18}$'
            THEN string_to_array(substr(application_name, 16), '.')::bigint[]
        END AS epoch
    FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid()
)
SELECT pg_terminate_backend(pid, 1000)
FROM flusher
WHERE epoch < ARRAY[%(generation)s, %(revision)s]::bigint[] OR (%(is_own)s AND name = %(name)s);

-- raise_fence: Fence off lower epochs; no row: a higher one has it.
UPDATE job_fence
SET generation = %(generation)s, revision = %(revision)s, etcd_cluster_id = %(etcd_cluster_id)s, update_time = now()
WHERE (generation, revision) <= (%(generation)s, %(revision)s)
RETURNING flush_seq;

-- get_fence: Who has it, and what was flushed last.
SELECT generation, revision, etcd_cluster_id, flush_seq, batch_id, is_breaker_open
FROM job_fence;

-- set_breaker: Only by the epoch that has the fence.
UPDATE job_fence
SET is_breaker_open = %(is_open)s, update_time = now()
WHERE (generation, revision) = (%(generation)s, %(revision)s);

-- repeatable_read: For a snapshot of several statements; first in its transaction.
SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY;

-- list_queues: By name.
SELECT name, nominal_cpus, nominal_memory_bytes
FROM job_queue
ORDER BY name;

-- list_capacities: By node.
SELECT node, boot_id, declared_cpus, declared_memory_bytes, gated_cpus, gated_memory_bytes, used_cpus,
    used_memory_bytes
FROM node_capacity
ORDER BY node;

-- allow_parts: In this transaction a statement, or a pause between two, may take so long.
SELECT set_config(name, %(milliseconds)s, true)
FROM unnest(ARRAY['statement_timeout', 'idle_in_transaction_session_timeout']) AS name;

-- pending_jobs: Their specs as text, since many are alike.
SELECT job_id::text, state, attempt, failures, principal, extract(epoch FROM submit_time)::float8,
    extract(epoch FROM start_time)::float8, extract(epoch FROM not_before_time)::float8, is_cancel_requested,
    outcome, spec::text, name, queue, priority, required_cpus, required_memory_bytes
FROM job
WHERE end_time IS NULL AND state = 'PENDING';

-- running_jobs: As `pending_jobs`, with the live row of each.
SELECT j.job_id::text, j.state, j.attempt, j.failures, j.principal, extract(epoch FROM j.submit_time)::float8,
    extract(epoch FROM j.start_time)::float8, extract(epoch FROM j.not_before_time)::float8, j.is_cancel_requested,
    j.outcome, j.spec::text, j.name, j.queue, j.priority, j.required_cpus, j.required_memory_bytes,
    a.attempt, a.node, a.boot_id, a.queue, a.allocated_cpus, a.allocated_memory_bytes, a.alloc_seq,
    extract(epoch FROM a.allocated_time)::float8
FROM job AS j
LEFT JOIN resource_allocation_live AS a ON a.job_id = j.job_id
WHERE j.end_time IS NULL AND j.state = 'RUNNING';

-- list_jobs: Newest first, with the last row of each; NULL filters mean all.
--
-- Planned with its values, so each filter that is NULL falls away. A page that begins deep in the list is found by
-- the index of submit times, which must be compared as they are kept; jobs of a rare node by a join from its rows,
-- which a lateral subquery would forbid; those of rare states by the index of jobs that have ended, or have not,
-- which is what `has_ended` says of the states that are asked for (NULL: some of both).
SELECT j.job_id::text, j.name, j.queue, j.priority, j.required_cpus, j.required_memory_bytes, j.spec, j.state,
    j.attempt, j.failures, j.principal, extract(epoch FROM j.submit_time)::float8 AS submit_time,
    extract(epoch FROM j.start_time)::float8 AS start_time, extract(epoch FROM j.end_time)::float8 AS end_time,
    extract(epoch FROM j.not_before_time)::float8 AS not_before_time, j.is_cancel_requested, j.outcome,
    a.attempt AS row_attempt, a.node, a.boot_id, a.queue AS row_queue, a.allocated_cpus, a.allocated_memory_bytes,
    a.alloc_seq, a.release_seq, extract(epoch FROM a.allocated_time)::float8 AS allocated_time,
    extract(epoch FROM a.released_time)::float8 AS released_time
FROM job AS j
LEFT JOIN resource_allocation AS a ON a.job_id = j.job_id AND a.attempt = j.attempt
WHERE (%(job_id)s::uuid IS NULL OR j.job_id = %(job_id)s)
    AND (%(states)s::text[] IS NULL OR j.state = ANY (%(states)s))
    AND (%(has_ended)s::boolean IS NULL OR (j.end_time IS NOT NULL) = %(has_ended)s)
    AND (%(queue)s::text IS NULL OR j.queue = %(queue)s)
    AND (%(node)s::text IS NULL OR a.node = %(node)s)
    AND (
        %(before_time)s::float8 IS NULL
        OR (j.submit_time, j.job_id) < (to_timestamp(%(before_time)s), %(before_id)s::uuid)
    )
ORDER BY j.submit_time DESC, j.job_id DESC
LIMIT %(limit)s;

-- get_allocation: The row that an attempt has, or had.
SELECT a.job_id::text, a.attempt AS row_attempt, a.node, a.boot_id, a.queue AS row_queue, a.allocated_cpus,
    a.allocated_memory_bytes, a.alloc_seq, a.release_seq,
    extract(epoch FROM a.allocated_time)::float8 AS allocated_time,
    extract(epoch FROM a.released_time)::float8 AS released_time
FROM resource_allocation AS a
WHERE a.job_id = %(job_id)s AND a.attempt = %(attempt)s;

-- audit: What ought not to be, each with its rule; all in one snapshot.
SELECT 'COUNTER_DIFFERS' AS rule, n.node AS subject,
    format('counted %%s CPUs and %%s bytes, live rows have %%s and %%s', n.used_cpus, n.used_memory_bytes,
        coalesce(a.cpus, 0), coalesce(a.memory_bytes, 0)) AS detail
FROM node_capacity AS n
LEFT JOIN (
    SELECT node, sum(allocated_cpus) AS cpus, sum(allocated_memory_bytes) AS memory_bytes
    FROM resource_allocation WHERE NOT released GROUP BY node
) AS a USING (node)
WHERE (n.used_cpus, n.used_memory_bytes) IS DISTINCT FROM (coalesce(a.cpus, 0), coalesce(a.memory_bytes, 0))
UNION ALL
SELECT 'OVER_ALLOCATED', n.node, format('live rows have %%s CPUs and %%s bytes of %%s and %%s', a.cpus,
    a.memory_bytes, n.gated_cpus, n.gated_memory_bytes)
FROM node_capacity AS n
JOIN (
    SELECT node, sum(allocated_cpus) AS cpus, sum(allocated_memory_bytes) AS memory_bytes
    FROM resource_allocation WHERE NOT released GROUP BY node
) AS a USING (node)
WHERE a.cpus > n.gated_cpus OR a.memory_bytes > n.gated_memory_bytes
UNION ALL
SELECT 'UNKNOWN_NODE', a.node, format('%%s live rows, and no capacity', count(*))
FROM resource_allocation AS a
WHERE NOT a.released AND NOT EXISTS (SELECT FROM node_capacity AS n WHERE n.node = a.node)
GROUP BY a.node
UNION ALL
SELECT 'ENDED_UNRELEASED', a.job_id::text, format('attempt %%s is live, its job is %%s at attempt %%s', a.attempt,
    coalesce(j.state, 'not there'), coalesce(j.attempt, 0))
FROM resource_allocation AS a
LEFT JOIN job AS j USING (job_id)
WHERE NOT a.released AND (j.state IS DISTINCT FROM 'RUNNING' OR j.attempt <> a.attempt)
UNION ALL
SELECT 'RELEASED_UNENDED', j.job_id::text, format('it is RUNNING at attempt %%s, and has no live row', j.attempt)
FROM job AS j
WHERE j.end_time IS NULL AND j.state = 'RUNNING' AND NOT EXISTS (
    SELECT FROM resource_allocation AS a WHERE NOT a.released AND a.job_id = j.job_id AND a.attempt = j.attempt
)
UNION ALL
SELECT 'UNKNOWN_QUEUE', j.job_id::text, format('it is %%s in queue %%s, which is not there', j.state, j.queue)
FROM job AS j
WHERE j.end_time IS NULL AND NOT EXISTS (SELECT FROM job_queue AS q WHERE q.name = j.queue)
LIMIT 1000;

-- audit_counts: How much was looked at.
SELECT (SELECT flush_seq FROM job_fence) AS flush_seq,
    (SELECT count(*) FROM resource_allocation WHERE NOT released) AS live_allocations,
    (SELECT count(*) FROM node_capacity) AS nodes;

-- lock_partitions: One maker of partitions at a time, to the end of its transaction.
SELECT pg_advisory_xact_lock(hashtextextended('leasehold.resource_allocation_released', 0));

-- partitions: Of released rows, by day.
SELECT c.relname AS name
FROM pg_inherits AS i
JOIN pg_class AS c ON c.oid = i.inhrelid
WHERE i.inhparent = 'resource_allocation_released'::regclass
ORDER BY c.relname;

-- today: Postgres's day, in UTC, as a number of days.
SELECT (now() AT TIME ZONE 'UTC')::date - date '2000-01-01' AS today;

-- delete_jobs: That ended longer ago than the retention.
DELETE FROM job
WHERE job_id IN (
    SELECT job_id FROM job
    WHERE end_time < now() - make_interval(secs => %(age_seconds)s)
    LIMIT %(limit)s
);

-- delete_requests: Older than a day, as asked.
DELETE FROM job_request
WHERE (principal, request_id, chunk) IN (
    SELECT principal, request_id, chunk FROM job_request
    WHERE time < now() - make_interval(secs => %(age_seconds)s)
    LIMIT %(limit)s
);

-- delete_capacity_log: All but the last of each node, past the retention.
DELETE FROM node_capacity_log AS l
WHERE l.time < now() - make_interval(secs => %(age_seconds)s)
    AND EXISTS (SELECT FROM node_capacity_log AS m WHERE m.node = l.node AND m.flush_seq > l.flush_seq);
