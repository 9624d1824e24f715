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

CREATE INDEX job_live ON job (queue) WHERE state IN ('PENDING', 'RUNNING');
CREATE INDEX job_newest ON job (submit_time, job_id);
CREATE INDEX job_ended ON job (end_time) WHERE end_time IS NOT NULL;

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
