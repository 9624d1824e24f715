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
