-- Foreign keys that forbid rows which repositories can contain.
SELECT format('%s of %s to %s', k.conname, t.relname, k.confrelid::regclass)
FROM pg_constraint k
JOIN pg_class t ON t.oid = k.conrelid
JOIN pg_namespace n ON n.oid = t.relnamespace
WHERE k.contype = 'f' AND n.nspname = current_schema() AND t.relname = ANY ($1)
ORDER BY 1
