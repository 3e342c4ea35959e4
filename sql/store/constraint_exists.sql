-- Whether a constraint of this name is on this table.
SELECT EXISTS (SELECT FROM pg_constraint k JOIN pg_namespace n ON n.oid = k.connamespace
WHERE k.conname = $1 AND n.nspname = current_schema())
