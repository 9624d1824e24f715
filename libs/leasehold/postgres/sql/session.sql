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
