-- Removes them.
DELETE FROM notifications n
WHERE n.uri = ANY ($1::text[])
  AND NOT EXISTS (SELECT FROM likes r WHERE r.uri = split_part(n.uri, '#', 1))
  AND NOT EXISTS (SELECT FROM posts r WHERE r.uri = split_part(n.uri, '#', 1))
  AND NOT EXISTS (SELECT FROM reposts r WHERE r.uri = split_part(n.uri, '#', 1))
  AND NOT EXISTS (SELECT FROM follows r WHERE r.uri = split_part(n.uri, '#', 1))
