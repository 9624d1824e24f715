-- The schema that the migrations lead to, to read in one place. tests/migration holds the two equal.

-- Created by the migrator before the first migration.
CREATE TABLE schema_migration (
    number integer PRIMARY KEY
        CHECK (number >= 1),
    name text NOT NULL,
    sha256 text NOT NULL,
    applied_time timestamptz NOT NULL
);

-- Budgets, the fence, the lease ledger, the audit log, answers kept for repeats.
--
-- etcd's cluster ids and lease ids are unsigned 64-bit numbers, which bigint cannot hold. Cluster ids are kept as
-- the 16 hexadecimal digits that etcd's own tools print, lease ids as numeric.

CREATE DOMAIN etcd_cluster_id AS text COLLATE "C"
    CHECK (VALUE ~ '^[0-9a-f]{16}$');

CREATE DOMAIN lease_id AS numeric(20, 0)
    CHECK (VALUE >= 0 AND VALUE <= 18446744073709551615);

-- COLLATE "C": pages are in the order of code points, whatever the database's locale, as in every other part.
CREATE TABLE budget (
    name text COLLATE "C" PRIMARY KEY
        CHECK (name ~ '^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$'),
    definition jsonb NOT NULL
        CHECK (jsonb_typeof(definition) = 'object'),
    version bigint NOT NULL
        CHECK (version >= 1),
    update_time timestamptz NOT NULL,
    CONSTRAINT budget_definition_has_its_name CHECK (definition ->> 'name' IS NOT DISTINCT FROM name)
);

-- The etcd clusters that an operator accepted. The last one is in force.
CREATE TABLE generation (
    generation bigint PRIMARY KEY
        CHECK (generation >= 1),
    etcd_cluster_id etcd_cluster_id NOT NULL,
    accepted_time timestamptz NOT NULL
);

-- One row: the highest epoch that has written. See sql/fence.sql. Room is left in the page for HOT updates.
CREATE TABLE epoch_fence (
    is_only_row boolean PRIMARY KEY DEFAULT true
        CHECK (is_only_row),
    generation bigint NOT NULL
        CHECK (generation >= 0),
    revision bigint NOT NULL
        CHECK (revision >= 0),
    etcd_cluster_id etcd_cluster_id NOT NULL,
    -- Number of the last ledger batch written in this epoch; 0: none.
    ledger_batch bigint NOT NULL DEFAULT 0
        CHECK (ledger_batch >= 0),
    update_time timestamptz NOT NULL
) WITH (fillfactor = 10);

INSERT INTO epoch_fence (generation, revision, etcd_cluster_id, update_time)
VALUES (0, 0, '0000000000000000', now());

-- History of leases, append only. `time` is the writer's clock at the event, `id` the order of writing.
CREATE TABLE lease_ledger (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    time timestamptz NOT NULL,
    budget text COLLATE "C" NOT NULL,
    holder text COLLATE "C" NOT NULL,
    incarnation text COLLATE "C" NOT NULL,
    lease_id lease_id NOT NULL,
    event text COLLATE "C" NOT NULL
        CHECK (event ~ '^[A-Z][A-Z0-9_]{0,62}$'),
    amounts jsonb NOT NULL
        CHECK (jsonb_typeof(amounts) = 'object'),
    cause text NOT NULL,
    generation bigint NOT NULL,
    revision bigint NOT NULL,
    etcd_cluster_id etcd_cluster_id NOT NULL
);

-- Pages newest first, by budget and by holder. A holder's name is in few budgets, so budget and holder together
-- are found through the holder.
CREATE INDEX lease_ledger_budget ON lease_ledger (budget, id);
CREATE INDEX lease_ledger_holder ON lease_ledger (holder, id);
-- Retention. Entries come nearly in the order of time, so this index grows at its right edge only.
CREATE INDEX lease_ledger_time ON lease_ledger (time);

-- Who changed what. Written in the transaction of the change, never deleted by Leasehold.
CREATE TABLE audit_log (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    time timestamptz NOT NULL,
    actor text NOT NULL,
    method text COLLATE "C" NOT NULL,
    target text COLLATE "C" NOT NULL,
    cause text NOT NULL,
    before jsonb,
    after jsonb,
    generation bigint NOT NULL,
    revision bigint NOT NULL,
    etcd_cluster_id etcd_cluster_id NOT NULL,
    CONSTRAINT audit_log_tells_a_change CHECK (before IS DISTINCT FROM after)
);

CREATE INDEX audit_log_target ON audit_log (target, id);

-- First answers, kept for a day for repeats of the same request.
CREATE TABLE request (
    request_id text COLLATE "C" NOT NULL
        CHECK (length(request_id) BETWEEN 1 AND 64),
    method text COLLATE "C" NOT NULL,
    payload_sha256 bytea NOT NULL
        CHECK (length(payload_sha256) = 32),
    answer jsonb NOT NULL,
    time timestamptz NOT NULL,
    PRIMARY KEY (request_id, method)
);

CREATE INDEX request_time ON request (time);

-- Nodes: who registered, and how each stands. Reports are not kept: they live in the leader's memory.

CREATE TABLE node (
    name text COLLATE "C" PRIMARY KEY
        CHECK (name ~ '^[a-z0-9][a-z0-9.-]{0,62}$'),
    node_id text COLLATE "C" NOT NULL
        CHECK (length(node_id) BETWEEN 8 AND 64),
    incarnation bigint NOT NULL
        CHECK (incarnation >= 0),
    boot_id text COLLATE "C" NOT NULL
        CHECK (length(boot_id) BETWEEN 1 AND 64),
    pid_namespace bigint NOT NULL
        CHECK (pid_namespace >= 0),
    total_cpus integer NOT NULL
        CHECK (total_cpus >= 0),
    total_memory_bytes bigint NOT NULL
        CHECK (total_memory_bytes >= 0),
    labels jsonb NOT NULL
        CHECK (jsonb_typeof(labels) = 'object'),
    state text COLLATE "C" NOT NULL
        CHECK (state IN ('ready', 'draining', 'lost', 'gone')),
    -- Why it is in this state, and which epoch's leader said so.
    cause text NOT NULL,
    register_time timestamptz NOT NULL,
    update_time timestamptz NOT NULL,
    generation bigint NOT NULL,
    revision bigint NOT NULL,
    etcd_cluster_id etcd_cluster_id NOT NULL
);

-- Jobs, and the CPUs and memory of nodes that they have.
--
-- `SELECT sum(allocated_cpus) FROM resource_allocation WHERE NOT released` is what is allocated: a row is written
-- in the transaction that counts it in node_capacity, whose CHECK is the last word, and released likewise.

CREATE TABLE job_queue (
    name text COLLATE "C" PRIMARY KEY
        CHECK (name ~ '^[a-z0-9][a-z0-9_-]{0,62}$'),
    -- NULL: no limit.
    nominal_cpus integer
        CHECK (nominal_cpus >= 0),
    nominal_memory_bytes bigint
        CHECK (nominal_memory_bytes >= 0),
    update_time timestamptz NOT NULL
);

INSERT INTO job_queue (name, update_time)
VALUES ('default', now());

-- What each node has for jobs. A table of its own: the registry writes `node`, and neither waits for the other.
CREATE TABLE node_capacity (
    node text COLLATE "C" PRIMARY KEY
        CHECK (node ~ '^[a-z0-9][a-z0-9.-]{0,62}$'),
    boot_id text COLLATE "C" NOT NULL
        CHECK (length(boot_id) BETWEEN 1 AND 64),
    -- As its host declares it.
    declared_cpus integer NOT NULL
        CHECK (declared_cpus >= 0),
    declared_memory_bytes bigint NOT NULL
        CHECK (declared_memory_bytes >= 0),
    -- The larger of what is declared and what is used: a total that shrinks takes effect as jobs release.
    gated_cpus integer NOT NULL,
    gated_memory_bytes bigint NOT NULL,
    used_cpus integer NOT NULL DEFAULT 0,
    used_memory_bytes bigint NOT NULL DEFAULT 0,
    update_time timestamptz NOT NULL,
    CONSTRAINT node_capacity_cpus_are_not_exceeded CHECK (used_cpus BETWEEN 0 AND gated_cpus),
    CONSTRAINT node_capacity_memory_is_not_exceeded CHECK (used_memory_bytes BETWEEN 0 AND gated_memory_bytes)
) WITH (fillfactor = 50);

-- Each change of a gated total, by the number of the flush that made it: "at every instant" is read from
-- sequence numbers, for now() is the start of a transaction.
CREATE TABLE node_capacity_log (
    node text COLLATE "C" NOT NULL,
    flush_seq bigint NOT NULL,
    gated_cpus integer NOT NULL,
    gated_memory_bytes bigint NOT NULL,
    time timestamptz NOT NULL,
    PRIMARY KEY (node, flush_seq)
);

CREATE INDEX node_capacity_log_time ON node_capacity_log (time);

CREATE TABLE job (
    job_id uuid PRIMARY KEY,
    name text NOT NULL,
    queue text COLLATE "C" NOT NULL,
    priority integer NOT NULL,
    required_cpus integer NOT NULL
        CHECK (required_cpus >= 1),
    required_memory_bytes bigint NOT NULL
        CHECK (required_memory_bytes >= 1),
    -- What else was asked for: selector, template, parameters, retries and so on.
    spec jsonb NOT NULL
        CHECK (jsonb_typeof(spec) = 'object'),
    state text COLLATE "C" NOT NULL
        CHECK (state IN ('PENDING', 'RUNNING', 'COMPLETED', 'FAILED', 'CANCELLED')),
    -- The present or last one; 0: none yet.
    attempt integer NOT NULL DEFAULT 0
        CHECK (attempt >= 0),
    -- Attempts that ended by the job's own fault.
    failures integer NOT NULL DEFAULT 0
        CHECK (failures >= 0),
    principal text NOT NULL,
    submit_time timestamptz NOT NULL,
    start_time timestamptz,
    end_time timestamptz,
    not_before_time timestamptz,
    is_cancel_requested boolean NOT NULL DEFAULT false,
    outcome jsonb,
    CONSTRAINT job_has_an_end_where_it_has_ended
        CHECK ((end_time IS NOT NULL) = (state IN ('COMPLETED', 'FAILED', 'CANCELLED')))
) WITH (fillfactor = 80);

-- Not of states, which the flusher compares: it is to find jobs by id, and to leave them in place when they start.
CREATE INDEX job_live ON job (queue) WHERE end_time IS NULL;
CREATE INDEX job_newest ON job (submit_time, job_id);
CREATE INDEX job_ended ON job (end_time) WHERE end_time IS NOT NULL;
-- Of states only once they change no more: a job that starts stays where it is.
CREATE INDEX job_ended_state ON job (state, submit_time, job_id) WHERE end_time IS NOT NULL;
CREATE INDEX job_queue_newest ON job (queue, submit_time, job_id);

-- The ledger. Live rows are few and in a partition of their own; released ones are in partitions by day, which are
-- made for days to come and dropped after the retention. There is no default partition, which would forbid that.
CREATE TABLE resource_allocation (
    job_id uuid NOT NULL,
    attempt integer NOT NULL
        CHECK (attempt >= 1),
    node text COLLATE "C" NOT NULL,
    boot_id text COLLATE "C" NOT NULL,
    queue text COLLATE "C" NOT NULL,
    allocated_cpus integer NOT NULL
        CHECK (allocated_cpus >= 1),
    allocated_memory_bytes bigint NOT NULL
        CHECK (allocated_memory_bytes >= 1),
    released boolean NOT NULL DEFAULT false,
    allocated_time timestamptz NOT NULL,
    released_time timestamptz,
    -- Numbers of the flushes that allocated and released it.
    alloc_seq bigint NOT NULL,
    release_seq bigint,
    -- Of the leader that allocated it.
    epoch text COLLATE "C" NOT NULL,
    outcome jsonb,
    CONSTRAINT resource_allocation_tells_its_release
        CHECK (released = (released_time IS NOT NULL) AND released = (release_seq IS NOT NULL))
) PARTITION BY LIST (released);

CREATE TABLE resource_allocation_live PARTITION OF resource_allocation FOR VALUES IN (false)
WITH (fillfactor = 70);

-- Also that no two attempts of a job are live together.
CREATE UNIQUE INDEX resource_allocation_live_job ON resource_allocation_live (job_id);
CREATE INDEX resource_allocation_live_node ON resource_allocation_live (node);

CREATE TABLE resource_allocation_released PARTITION OF resource_allocation FOR VALUES IN (true)
PARTITION BY RANGE (released_time);

CREATE INDEX resource_allocation_released_job ON resource_allocation_released (job_id);

-- One row: who may write all of this, and the number of the last flush. Room is left for HOT updates.
CREATE TABLE job_fence (
    is_only_row boolean PRIMARY KEY DEFAULT true
        CHECK (is_only_row),
    generation bigint NOT NULL,
    revision bigint NOT NULL,
    etcd_cluster_id etcd_cluster_id NOT NULL,
    flush_seq bigint NOT NULL,
    -- Of the last flush: tells whether one whose answer was lost was committed.
    batch_id text COLLATE "C" NOT NULL,
    -- Reclaims by timeout are held back.
    is_breaker_open boolean NOT NULL DEFAULT false,
    update_time timestamptz NOT NULL
) WITH (fillfactor = 10);

INSERT INTO job_fence (generation, revision, etcd_cluster_id, flush_seq, batch_id, update_time)
VALUES (0, 0, '0000000000000000', 0, '', now());

-- First answers to requests that may be repeated, kept for a day.
CREATE TABLE job_request (
    principal text NOT NULL,
    request_id text COLLATE "C" NOT NULL
        CHECK (length(request_id) BETWEEN 1 AND 64),
    chunk integer NOT NULL
        CHECK (chunk >= 0),
    payload_sha256 bytea NOT NULL
        CHECK (length(payload_sha256) = 32),
    answer jsonb NOT NULL,
    time timestamptz NOT NULL,
    PRIMARY KEY (principal, request_id, chunk)
);

CREATE INDEX job_request_time ON job_request (time);
