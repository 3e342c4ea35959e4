-- Removes feed items of deleted records.
DELETE FROM feed_items f
WHERE f.uri = ANY ($1::text[])
  AND NOT EXISTS (SELECT FROM posts p WHERE p.uri = f.uri)
  AND NOT EXISTS (SELECT FROM reposts r WHERE r.uri = f.uri)
