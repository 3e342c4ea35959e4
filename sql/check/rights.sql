-- The rights that the program needs and the role lacks. $1: the application's tables that the program writes.
WITH tables AS (
    SELECT c.oid, c.oid::regclass::text AS name
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind IN ('r', 'p')
        AND (n.nspname = current_schema() AND c.relname = ANY ($1::text[]) OR n.nspname = 'standpipe')
)
SELECT 'USAGE' AS privilege, 'schema ' || n.nspname AS object
FROM pg_namespace n
WHERE n.nspname IN (current_schema(), 'standpipe') AND NOT has_schema_privilege(n.oid, 'USAGE')
UNION ALL
SELECT p, 'table ' || t.name
FROM tables t, unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) p
WHERE NOT has_table_privilege(t.oid, p)
UNION ALL
-- Columns that count by themselves.
SELECT 'USAGE', 'sequence ' || s.oid::regclass
FROM tables t
JOIN pg_depend d ON d.refobjid = t.oid AND d.refclassid = 'pg_class'::regclass AND d.classid = 'pg_class'::regclass
JOIN pg_class s ON s.oid = d.objid
-- CASE, because the function fails on anything but a sequence, and conditions are evaluated in no fixed order.
WHERE CASE s.relkind WHEN 'S' THEN NOT has_sequence_privilege(s.oid, 'USAGE') END
UNION ALL
SELECT 'EXECUTE', 'function ' || p.oid::regprocedure
FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
WHERE (n.nspname = 'standpipe' OR n.nspname = 'pg_catalog' AND p.proname = 'pg_logical_emit_message')
    AND NOT has_function_privilege(p.oid, 'EXECUTE')
UNION ALL
SELECT 'USAGE', 'type ' || t.oid::regtype
FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace
WHERE n.nspname = 'standpipe' AND t.typtype = 'c' AND NOT has_type_privilege(t.oid, 'USAGE')
ORDER BY 2, 1
