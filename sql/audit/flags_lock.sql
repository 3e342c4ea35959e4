-- Takes these posts ($1), their roots and what they quote, in the order of standpipe.apply.
SELECT pg_advisory_xact_lock(hashtextextended(n.name, 0)) FROM (
    SELECT p.uri COLLATE "C" AS name FROM posts p WHERE p.uri = ANY ($1::text[])
    UNION
    SELECT p.root_uri COLLATE "C" FROM posts p WHERE p.uri = ANY ($1::text[]) AND p.root_uri IS NOT NULL
    UNION
    SELECT q.quoted_uri COLLATE "C" FROM quotes q WHERE q.post_uri = ANY ($1::text[])
    ORDER BY 1
) n
