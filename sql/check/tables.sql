-- Our tables and their dead rows. $1: as in indexes.sql.
SELECT
    CASE n.nspname WHEN 'standpipe' THEN 'standpipe.' ELSE '' END || c.relname AS name,
    coalesce(u.n_dead_tup, 0) AS dead_rows,
    coalesce(u.n_live_tup, 0) AS live_rows,
    coalesce(to_char(greatest(u.last_autovacuum, u.last_vacuum), 'YYYY-MM-DD HH24:MI'), 'never') AS vacuumed
FROM pg_class c
JOIN pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN pg_stat_user_tables u ON u.relid = c.oid
WHERE c.relkind IN ('r', 'p')
    AND (n.nspname = current_schema() AND c.relname = ANY ($1::text[]) OR n.nspname = 'standpipe')
ORDER BY 1
