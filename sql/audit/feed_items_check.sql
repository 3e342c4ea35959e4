-- The records among these ($1: URIs) whose feed item is missing, surplus or of the wrong type.
SELECT k.key, f.type, r.type
FROM unnest($1::text[]) AS k (key)
LEFT JOIN feed_items f ON f.uri = k.key
LEFT JOIN LATERAL (
    SELECT CASE WHEN p.parent_uri IS NULL THEN 'post' ELSE 'reply' END FROM posts p WHERE p.uri = k.key
    UNION ALL
    SELECT 'repost' FROM reposts x WHERE x.uri = k.key
) r (type) ON true
WHERE f.type IS DISTINCT FROM r.type
