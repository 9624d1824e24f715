-- insert_audit: Say who changed what, in the transaction of the change.
INSERT INTO audit_log (
    time, actor, method, target, cause, before, after, generation, revision, etcd_cluster_id
)
VALUES (
    now(), %(actor)s, %(method)s, %(target)s, %(cause)s, %(before)s, %(after)s,
    %(generation)s, %(revision)s, %(etcd_cluster_id)s
);

-- list_audit: A page, newest first. An empty target means all.
SELECT id, time, actor, method, target, cause, before, after, generation, revision, etcd_cluster_id
FROM audit_log
WHERE id < %(before_id)s
    AND (%(target)s::text = '' OR target = %(target)s)
ORDER BY id DESC
LIMIT %(limit)s;
