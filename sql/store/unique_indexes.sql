-- Unique indexes that forbid rows which repositories can contain: all but those whose columns hold a row's own key.
SELECT c.relname::text, quote_ident(c.relname), t.relname::text, pg_get_indexdef(c.oid),
       ARRAY(SELECT pg_get_indexdef(c.oid, n, true) FROM generate_series(1, i.indnkeyatts::int) n),
       pg_get_expr(i.indpred, i.indrelid),
       CASE WHEN k.oid IS NOT NULL THEN
           CASE WHEN k.condeferrable THEN 'DEFERRABLE' ELSE '' END
           || CASE WHEN k.condeferred THEN ' INITIALLY DEFERRED' ELSE '' END
       END,
       (SELECT p.relname::text FROM pg_index o JOIN pg_class p ON p.oid = o.indexrelid
        WHERE o.indrelid = i.indrelid AND o.indisvalid AND NOT o.indisunique
          AND (o.indkey::text, o.indclass::text, o.indcollation::text, o.indoption::text)
            = (i.indkey::text, i.indclass::text, i.indcollation::text, i.indoption::text)
          AND o.indexprs IS NULL AND i.indexprs IS NULL
          AND pg_get_expr(o.indpred, o.indrelid) IS NOT DISTINCT FROM pg_get_expr(i.indpred, i.indrelid)
        ORDER BY p.relname LIMIT 1)
FROM pg_index i
JOIN pg_class c ON c.oid = i.indexrelid
JOIN pg_class t ON t.oid = i.indrelid
JOIN pg_namespace n ON n.oid = t.relnamespace
LEFT JOIN pg_constraint k ON k.conindid = c.oid AND k.contype = 'u'
WHERE n.nspname = current_schema() AND i.indisunique AND NOT i.indisprimary AND t.relname = ANY ($1)
  AND NOT EXISTS (
      SELECT FROM pg_attribute a JOIN unnest($1::text[], $2::text[]) AS x (relname, attname)
          ON x.relname = t.relname AND x.attname = a.attname
      WHERE a.attrelid = t.oid AND a.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1]))
ORDER BY 3, 1
