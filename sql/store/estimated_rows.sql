-- About how many rows these tables have, where statistics tell.
SELECT CASE WHEN bool_and(pages = 0 OR reltuples >= 0 AND relpages > 0)
            THEN sum(CASE WHEN pages = 0 THEN 0 ELSE reltuples / nullif(relpages, 0) * pages END) END::float8
FROM (
    SELECT c.reltuples::float8, c.relpages::float8,
           pg_relation_size(c.oid) / current_setting('block_size')::float8 AS pages
    FROM unnest($1::text[]) AS t (name) JOIN pg_class c ON c.oid = to_regclass(t.name)
) counted
