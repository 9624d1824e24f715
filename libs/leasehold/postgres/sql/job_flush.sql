-- take_fence: First statement of every batch; no row: another epoch has the fence.
--
-- An UPDATE, since its row lock is held to the end of the transaction: a frozen leader's batch and its successor's
-- takeover come one after the other, and whichever is second sees what the first has done.
UPDATE job_fence
SET flush_seq = flush_seq + 1, batch_id = %(batch_id)s, update_time = now()
WHERE (generation, revision) = (%(generation)s, %(revision)s)
RETURNING flush_seq, extract(epoch FROM update_time)::float8 AS time_seconds;

-- advance_fence: As take_fence, for what is no batch of the flusher: the id of its last one stays.
UPDATE job_fence
SET flush_seq = flush_seq + 1, update_time = now()
WHERE (generation, revision) = (%(generation)s, %(revision)s)
RETURNING flush_seq;

-- live_of_ended: Live rows whose jobs have ended or are gone, which only statements by hand can bring about.
SELECT a.job_id::text, a.attempt, a.node
FROM resource_allocation_live AS a
LEFT JOIN job AS j USING (job_id)
WHERE j.state IS NULL OR j.state IN ('COMPLETED', 'FAILED', 'CANCELLED');

-- lock_nodes: Of everything that the batch touches, in the order of names; what each is.
SELECT node, boot_id, gated_cpus > declared_cpus OR gated_memory_bytes > declared_memory_bytes AS is_over
FROM node_capacity
WHERE node IN (
    SELECT unnest(%(nodes)s::text[])
    UNION ALL
    SELECT a.node FROM resource_allocation_live AS a WHERE a.job_id = ANY (%(job_ids)s::uuid[])
)
ORDER BY node
FOR UPDATE;

-- end_attempts: Release rows, give back what they counted, move their jobs; which were live.
WITH wanted AS (
    SELECT *
    FROM unnest(
        %(job_ids)s::uuid[], %(attempts)s::integer[], %(outcomes)s::jsonb[], %(states)s::text[],
        %(are_failures)s::boolean[], %(not_befores)s::float8[]
    ) WITH ORDINALITY AS w (job_id, attempt, outcome, state, is_failure, not_before, number)
), moved AS (
    UPDATE resource_allocation AS a
    SET released = true, released_time = now(), release_seq = %(flush_seq)s, outcome = w.outcome
    FROM wanted AS w
    WHERE NOT a.released AND a.job_id = w.job_id AND a.attempt = w.attempt
    RETURNING w.number, w.job_id, w.attempt, w.outcome, w.state, w.is_failure, w.not_before,
        a.node, a.allocated_cpus, a.allocated_memory_bytes
), freed AS (
    UPDATE node_capacity AS n
    SET used_cpus = n.used_cpus - m.cpus,
        used_memory_bytes = n.used_memory_bytes - m.memory_bytes,
        gated_cpus = greatest(n.declared_cpus, n.used_cpus - m.cpus),
        gated_memory_bytes = greatest(n.declared_memory_bytes, n.used_memory_bytes - m.memory_bytes),
        update_time = now()
    FROM (
        SELECT node, sum(allocated_cpus)::integer AS cpus, sum(allocated_memory_bytes)::bigint AS memory_bytes
        FROM moved
        GROUP BY node
    ) AS m
    WHERE n.node = m.node
), ended AS (
    UPDATE job AS j
    SET state = m.state,
        outcome = m.outcome,
        failures = j.failures + m.is_failure::integer,
        end_time = CASE WHEN m.state = 'PENDING' THEN NULL ELSE now() END,
        not_before_time = CASE WHEN m.state = 'PENDING' THEN to_timestamp(m.not_before) END
    FROM moved AS m
    WHERE j.job_id = m.job_id AND j.state = 'RUNNING' AND j.attempt = m.attempt
)
SELECT number::integer FROM moved;

-- cancel_jobs: In line: at once. Running: the wish is kept, and the end decides.
WITH wanted AS (
    SELECT * FROM unnest(%(job_ids)s::uuid[]) WITH ORDINALITY AS w (job_id, number)
)
UPDATE job AS j
SET is_cancel_requested = true,
    state = CASE WHEN j.state = 'PENDING' THEN 'CANCELLED' ELSE j.state END,
    end_time = CASE WHEN j.state = 'PENDING' THEN now() ELSE j.end_time END
FROM wanted AS w
WHERE j.job_id = w.job_id AND j.state IN ('PENDING', 'RUNNING')
RETURNING w.number::integer;

-- put_queue: Create or replace one.
INSERT INTO job_queue (name, nominal_cpus, nominal_memory_bytes, update_time)
VALUES (%(name)s, %(nominal_cpus)s, %(nominal_memory_bytes)s, now())
ON CONFLICT (name) DO UPDATE
SET nominal_cpus = excluded.nominal_cpus,
    nominal_memory_bytes = excluded.nominal_memory_bytes,
    update_time = excluded.update_time;

-- delete_queue: Unless a job of it is pending or running.
DELETE FROM job_queue AS q
WHERE q.name = %(name)s
    AND NOT EXISTS (SELECT FROM job AS j WHERE j.queue = q.name AND j.end_time IS NULL);

-- put_capacities: What nodes declare.
INSERT INTO node_capacity AS n (
    node, boot_id, declared_cpus, declared_memory_bytes, gated_cpus, gated_memory_bytes, update_time
)
SELECT w.node, w.boot_id, w.cpus, w.memory_bytes, w.cpus, w.memory_bytes, now()
FROM unnest(
    %(nodes)s::text[], %(boot_ids)s::text[], %(cpus)s::integer[], %(memory_bytes)s::bigint[]
) AS w (node, boot_id, cpus, memory_bytes)
ORDER BY w.node
ON CONFLICT (node) DO UPDATE
SET boot_id = excluded.boot_id,
    declared_cpus = excluded.declared_cpus,
    declared_memory_bytes = excluded.declared_memory_bytes,
    gated_cpus = greatest(excluded.declared_cpus, n.used_cpus),
    gated_memory_bytes = greatest(excluded.declared_memory_bytes, n.used_memory_bytes),
    update_time = now();

-- log_capacities: Gated totals that are new, or other than the last one told.
INSERT INTO node_capacity_log (node, flush_seq, gated_cpus, gated_memory_bytes, time)
SELECT n.node, %(flush_seq)s, n.gated_cpus, n.gated_memory_bytes, now()
FROM node_capacity AS n
LEFT JOIN LATERAL (
    SELECT l.gated_cpus, l.gated_memory_bytes
    FROM node_capacity_log AS l
    WHERE l.node = n.node
    ORDER BY l.flush_seq DESC
    LIMIT 1
) AS last ON true
WHERE n.node = ANY (%(nodes)s::text[])
    AND (last.gated_cpus, last.gated_memory_bytes) IS DISTINCT FROM (n.gated_cpus, n.gated_memory_bytes);

-- submit_jobs: New ones; one that is there is left as it is.
INSERT INTO job (
    job_id, name, queue, priority, required_cpus, required_memory_bytes, spec, state, principal, submit_time
)
SELECT w.job_id, w.name, w.queue, w.priority, w.cpus, w.memory_bytes, w.spec, 'PENDING', w.principal,
    to_timestamp(w.submit_time)
FROM unnest(
    %(job_ids)s::uuid[], %(names)s::text[], %(queues)s::text[], %(priorities)s::integer[], %(cpus)s::integer[],
    %(memory_bytes)s::bigint[], %(specs)s::jsonb[], %(principals)s::text[], %(submit_times)s::float8[]
) AS w (job_id, name, queue, priority, cpus, memory_bytes, spec, principal, submit_time)
ON CONFLICT (job_id) DO NOTHING
RETURNING job_id::text;

-- allocate: Pending jobs get rows, and are counted at nodes that are locked and have this boot; which were.
WITH wanted AS (
    SELECT *
    FROM unnest(
        %(job_ids)s::uuid[], %(attempts)s::integer[], %(nodes)s::text[], %(boot_ids)s::text[], %(queues)s::text[],
        %(cpus)s::integer[], %(memory_bytes)s::bigint[]
    ) WITH ORDINALITY AS w (job_id, attempt, node, boot_id, queue, cpus, memory_bytes, number)
), running AS (
    UPDATE job AS j
    SET state = 'RUNNING', attempt = w.attempt, start_time = now(), not_before_time = NULL
    FROM wanted AS w
    WHERE j.job_id = w.job_id AND j.state = 'PENDING' AND j.attempt = w.attempt - 1
    RETURNING w.number, w.job_id, w.attempt, w.node, w.boot_id, w.queue, w.cpus, w.memory_bytes
), given AS (
    INSERT INTO resource_allocation (
        job_id, attempt, node, boot_id, queue, allocated_cpus, allocated_memory_bytes, allocated_time, alloc_seq,
        epoch
    )
    SELECT r.job_id, r.attempt, r.node, r.boot_id, r.queue, r.cpus, r.memory_bytes, now(), %(flush_seq)s,
        %(epoch)s
    FROM running AS r
), counted AS (
    UPDATE node_capacity AS n
    SET used_cpus = n.used_cpus + r.cpus,
        used_memory_bytes = n.used_memory_bytes + r.memory_bytes,
        update_time = now()
    FROM (
        SELECT node, sum(cpus)::integer AS cpus, sum(memory_bytes)::bigint AS memory_bytes
        FROM running
        GROUP BY node
    ) AS r
    WHERE n.node = r.node
)
SELECT number::integer FROM running;

-- kept_answers: First answers under these keys.
SELECT r.principal, r.request_id, r.chunk, r.payload_sha256, r.answer
FROM job_request AS r
JOIN unnest(%(principals)s::text[], %(request_ids)s::text[], %(chunks)s::integer[])
    AS w (principal, request_id, chunk) USING (principal, request_id, chunk);

-- keep_answers: Of requests that are answered in this batch, and were not before; under which keys.
INSERT INTO job_request (principal, request_id, chunk, payload_sha256, answer, time)
SELECT w.principal, w.request_id, w.chunk, w.payload_sha256, w.answer, now()
FROM unnest(
    %(principals)s::text[], %(request_ids)s::text[], %(chunks)s::integer[], %(payloads)s::bytea[],
    %(answers)s::jsonb[]
) AS w (principal, request_id, chunk, payload_sha256, answer)
ON CONFLICT (principal, request_id, chunk) DO NOTHING
RETURNING principal, request_id, chunk;
