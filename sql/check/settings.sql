-- What the doctor asks about the server and its own role.
SELECT
    current_setting('server_version_num')::int AS number,
    current_setting('server_version') AS version,
    pg_is_in_recovery() AS standby,
    current_setting('server_encoding') AS encoding,
    current_user::text AS role,
    current_database()::text AS database,
    coalesce(current_schema(), '')::text AS schema,
    current_setting('fsync')::boolean AS fsync,
    current_setting('full_page_writes')::boolean AS full_page_writes,
    current_setting('synchronous_commit') AS synchronous_commit,
    current_setting('synchronous_standby_names') <> '' AS has_standbys,
    current_setting('synchronous_standby_names') AS standby_names,
    -- Without pg_monitor their rows are there all the same, and say little.
    (SELECT count(*)::int FROM pg_stat_replication) AS standbys,
    current_setting('autovacuum')::boolean AS autovacuum,
    extract(epoch FROM clock_timestamp())::float8 AS clock,
    coalesce((SELECT version FROM pg_stat_ssl WHERE pid = pg_backend_pid()), '') AS tls,
    current_setting('max_connections')::int AS max_connections,
    -- Kept for others, unless we are a superuser; the second since PostgreSQL 16.
    CASE WHEN r.rolsuper THEN 0 ELSE
        current_setting('superuser_reserved_connections')::int
        + coalesce(current_setting('reserved_connections', true)::int, 0) END AS reserved,
    r.rolconnlimit AS role_limit,
    d.datconnlimit AS database_limit,
    -- numbackends is visible to everybody; pg_stat_activity shows little of other roles' sessions.
    (SELECT coalesce(sum(numbackends), 0)::int FROM pg_stat_database) AS connections,
    (SELECT count(*)::int FROM pg_stat_activity WHERE usesysid = r.oid AND application_name = 'standpipe') AS ours,
    has_database_privilege(current_database(), 'CREATE') AS may_create_schema,
    coalesce(has_schema_privilege(current_schema(), 'CREATE'), false) AS may_create_table
FROM pg_roles r, pg_database d
WHERE r.rolname = current_user AND d.datname = current_database()
