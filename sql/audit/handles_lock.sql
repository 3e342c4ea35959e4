-- Takes these handles ($1), in the order of standpipe.apply.
SELECT pg_advisory_xact_lock(hashtextextended(n.name, 0)) FROM (
    SELECT DISTINCT ('@' || k.handle) COLLATE "C" AS name FROM unnest($1::text[]) AS k (handle) ORDER BY 1
) n
