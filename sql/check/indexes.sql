-- The indexes of our tables and their condition. $1: the application's tables that the program writes.
SELECT
    CASE n.nspname WHEN 'standpipe' THEN 'standpipe.' ELSE '' END || t.relname AS table_name,
    i.indexrelid::regclass::text AS name,
    pg_get_indexdef(i.indexrelid, 1, true) AS first_column,
    i.indisunique AND i.indnkeyatts = 1 AND i.indpred IS NULL AS one_column_unique,
    i.indisvalid AND i.indisready AS valid,
    -- Being built at this moment.
    EXISTS (SELECT FROM pg_stat_progress_create_index b WHERE b.index_relid = i.indexrelid) AS under_way,
    -- No constraint needs it, the table is busy, and nobody has ever read it.
    NOT i.indisunique AND s.idx_scan = 0 AND u.n_tup_ins + u.n_tup_upd > 100000 AS unused,
    pg_relation_size(i.indexrelid) AS bytes
FROM pg_index i
JOIN pg_class t ON t.oid = i.indrelid
JOIN pg_namespace n ON n.oid = t.relnamespace
LEFT JOIN pg_stat_user_indexes s ON s.indexrelid = i.indexrelid
LEFT JOIN pg_stat_user_tables u ON u.relid = i.indrelid
WHERE n.nspname = current_schema() AND t.relname = ANY ($1::text[]) OR n.nspname = 'standpipe'
ORDER BY 1, 2
