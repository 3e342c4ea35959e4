-- The columns of the application's tables and ours.
SELECT CASE n.nspname WHEN 'standpipe' THEN 'standpipe.' ELSE '' END || c.relname,
       array_remove(array_agg(a.attname::text), NULL), pg_has_role(c.relowner, 'USAGE')
FROM pg_class c
JOIN pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
WHERE c.relkind IN ('r', 'p', 'c') AND n.nspname IN ($1, 'standpipe')
GROUP BY n.nspname, c.oid
