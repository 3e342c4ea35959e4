-- Who holds locks on this table.
SELECT DISTINCT format('process %s (%s, %s, since %s s)', a.pid,
           coalesce(nullif(a.application_name, ''), a.backend_type), coalesce(a.state, 'state unknown'),
           extract(epoch FROM clock_timestamp() - a.xact_start)::int)
FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
WHERE l.locktype = 'relation' AND l.granted AND l.database = (SELECT oid FROM pg_database
                                                              WHERE datname = current_database())
  AND a.pid <> pg_backend_pid() AND a.xact_start < clock_timestamp() - interval '1 second'
LIMIT 3
