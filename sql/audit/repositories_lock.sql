-- Takes the repositories that these records ($1: URIs) are in, in the order of standpipe.apply.
SELECT pg_advisory_xact_lock(hashtextextended(n.name, 0)) FROM (
    SELECT DISTINCT split_part(k.uri, '/', 3) COLLATE "C" AS name FROM unnest($1::text[]) AS k (uri) ORDER BY 1
) n
