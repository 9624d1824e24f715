-- get_request: The first answer to a request, and what it had asked.
SELECT payload_sha256, answer
FROM request
WHERE request_id = %(request_id)s AND method = %(method)s;

-- insert_request: Keep an answer, in the transaction of the change. Writers hold the fence, so none races this.
INSERT INTO request (request_id, method, payload_sha256, answer, time)
VALUES (%(request_id)s, %(method)s, %(payload_sha256)s, %(answer)s, now());

-- delete_requests: One bounded step of forgetting, oldest first.
DELETE FROM request
WHERE (request_id, method) IN (
    SELECT request_id, method
    FROM request
    WHERE time < now() - make_interval(secs => %(age_seconds)s)
    ORDER BY time
    LIMIT %(limit)s
);
