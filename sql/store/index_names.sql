-- The indexes by name, and whether they are complete.
SELECT CASE n.nspname WHEN 'standpipe' THEN 'standpipe.' ELSE '' END || c.relname, i.indisvalid
FROM pg_class c
JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_index i ON i.indexrelid = c.oid
WHERE n.nspname IN ($1, 'standpipe')
