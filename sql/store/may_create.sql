-- Whether we may create functions in our schema.
SELECT coalesce(bool_and(pg_has_role(nspowner, 'USAGE') OR has_schema_privilege(oid, 'CREATE')), true)
   AND NOT EXISTS (SELECT FROM pg_proc p WHERE p.pronamespace = ANY (array_agg(n.oid))
                   AND NOT pg_has_role(p.proowner, 'USAGE'))
FROM pg_namespace n WHERE nspname = 'standpipe'
