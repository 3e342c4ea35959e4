-- Removes them and counts them out.
WITH gone AS (
    DELETE FROM quotes q
    WHERE q.uri = ANY ($1::text[]) AND NOT EXISTS (SELECT FROM posts p WHERE p.uri = q.post_uri)
    RETURNING q.quoted_uri, q.post_uri
)
UPDATE post_aggregations a SET quote_count = a.quote_count - g.posts, updated_at = now()
FROM (SELECT quoted_uri, count(DISTINCT post_uri) AS posts FROM gone GROUP BY quoted_uri) g
WHERE a.post_uri = g.quoted_uri
