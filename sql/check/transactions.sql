-- Long-open transactions: vacuum cannot remove rows that died since they began. A role without pg_read_all_stats sees
-- of other roles' sessions only that they exist.
SELECT pid, coalesce(usename, '')::text AS role, coalesce(application_name, '') AS application,
    coalesce(state, '') AS state, extract(epoch FROM clock_timestamp() - xact_start)::float8 AS seconds
FROM pg_stat_activity
WHERE xact_start < clock_timestamp() - $1::float8 * interval '1 second' AND pid <> pg_backend_pid()
    AND backend_type = 'client backend'
ORDER BY xact_start LIMIT 5
