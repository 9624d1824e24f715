-- configure: Bounds of every session, in milliseconds. A frozen client must not hold the fence: the server ends
-- a transaction that idles.
SELECT set_config('statement_timeout', %(statement_timeout)s, false),
    set_config('lock_timeout', %(lock_timeout)s, false),
    set_config('idle_in_transaction_session_timeout', %(idle_in_transaction_session_timeout)s, false),
    set_config('timezone', 'UTC', false);

-- allow_long_statements: For one transaction that may take long (migrations).
SELECT set_config('statement_timeout', %(statement_timeout)s, true);

-- ping: Answered by any server that is well.
SELECT 1;

-- find_by_key: For a session whose every statement finds rows by their keys.
--
-- A statement that is prepared while tables are new is planned to read them from end to end, and keeps that plan
-- until they are analyzed, which a table that grows fast waits a minute for. `jit` would compile what these settings
-- make look dear.
SELECT set_config(name, 'off', false)
FROM unnest(ARRAY['enable_seqscan', 'enable_hashjoin', 'enable_mergejoin', 'jit']) AS name;
