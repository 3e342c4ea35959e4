-- The ten statements on which most time was spent, without the comments in front of them. pg_stat_schema stands for the extension's schema.
SELECT left(regexp_replace(s.query, '^(\s*--[^\n]*\n)+', ''), 400), s.calls, s.total_exec_time, s.mean_exec_time, s.rows,
       coalesce(s.total_exec_time / nullif(sum(s.total_exec_time) OVER (), 0), 0)
FROM pg_stat_schema.pg_stat_statements s
WHERE s.dbid = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND s.userid = (SELECT oid FROM pg_roles WHERE rolname = current_user)
  AND s.query ~* '^(\s*--[^\n]*\n)*\s*(select|insert|update|delete|merge|with)\M'
ORDER BY s.total_exec_time DESC
LIMIT 10
