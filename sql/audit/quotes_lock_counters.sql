-- Takes the counters that these quotes ($1) are in, in their order.
INSERT INTO post_aggregations AS a (post_uri)
SELECT DISTINCT q.quoted_uri COLLATE "C" FROM quotes q WHERE q.uri = ANY ($1::text[]) ORDER BY 1
ON CONFLICT (post_uri) DO UPDATE SET updated_at = a.updated_at
