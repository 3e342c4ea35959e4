-- The functions for tasks in the schema $1: whether it exists and may be used, those that may be called, those that may not.
SELECT n.oid IS NOT NULL, coalesce(has_schema_privilege(n.oid, 'USAGE'), false),
       coalesce(array_agg(p.proname::text ORDER BY p.proname) FILTER (WHERE has_function_privilege(p.oid, 'EXECUTE')), '{}'),
       coalesce(array_agg(p.proname::text ORDER BY p.proname) FILTER (WHERE NOT has_function_privilege(p.oid, 'EXECUTE')), '{}'),
       current_user::text
FROM (SELECT 1) one
LEFT JOIN pg_namespace n ON n.nspname = $1::text
LEFT JOIN pg_proc p ON p.pronamespace = n.oid AND p.prokind = 'f' AND p.pronargs = 1
    AND p.proargtypes[0] = 'jsonb'::regtype AND p.prorettype = 'jsonb'::regtype
GROUP BY n.oid
