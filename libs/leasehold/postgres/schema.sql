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
