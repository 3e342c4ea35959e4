-- Takes the repositories of the posts that these quotes ($1) belong to, in the order of standpipe.apply.
SELECT pg_advisory_xact_lock(hashtextextended(n.name, 0)) FROM (
    SELECT DISTINCT split_part(q.post_uri, '/', 3) COLLATE "C" AS name
    FROM quotes q WHERE q.uri = ANY ($1::text[]) ORDER BY 1
) n
