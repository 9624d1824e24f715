-- list_nodes: Every one, in the order of names.
SELECT name, node_id, incarnation, boot_id, pid_namespace, total_cpus, total_memory_bytes, labels, state, cause,
    register_time, update_time
FROM node
ORDER BY name;

-- get_node: One by name.
SELECT name, node_id, incarnation, boot_id, pid_namespace, total_cpus, total_memory_bytes, labels, state, cause,
    register_time, update_time
FROM node
WHERE name = %(name)s;

-- put_node: Create, or replace what is known of it.
INSERT INTO node (
    name, node_id, incarnation, boot_id, pid_namespace, total_cpus, total_memory_bytes, labels, state, cause,
    register_time, update_time, generation, revision, etcd_cluster_id
)
VALUES (
    %(name)s, %(node_id)s, %(incarnation)s, %(boot_id)s, %(pid_namespace)s, %(total_cpus)s,
    %(total_memory_bytes)s, %(labels)s, %(state)s, %(cause)s, %(register_time)s, now(),
    %(generation)s, %(revision)s, %(etcd_cluster_id)s
)
ON CONFLICT (name) DO UPDATE
SET node_id = excluded.node_id,
    incarnation = excluded.incarnation,
    boot_id = excluded.boot_id,
    pid_namespace = excluded.pid_namespace,
    total_cpus = excluded.total_cpus,
    total_memory_bytes = excluded.total_memory_bytes,
    labels = excluded.labels,
    state = excluded.state,
    cause = excluded.cause,
    register_time = excluded.register_time,
    update_time = excluded.update_time,
    generation = excluded.generation,
    revision = excluded.revision,
    etcd_cluster_id = excluded.etcd_cluster_id;

-- delete_node: Remove one.
DELETE FROM node
WHERE name = %(name)s;
