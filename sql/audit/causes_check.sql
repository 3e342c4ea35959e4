-- The notifications among these ($1: their keys) whose cause is gone.
SELECT k.key, 'a notification', 'none'
FROM unnest($1::text[]) AS k (key)
JOIN notifications n ON n.uri = k.key
CROSS JOIN LATERAL split_part(k.key, '#', 1) AS c (uri)
WHERE current_setting('standpipe.notifications', true) IS DISTINCT FROM 'off'
  AND k.key LIKE 'at://%#notification%'
  AND NOT EXISTS (SELECT FROM likes r WHERE r.uri = c.uri)
  AND NOT EXISTS (SELECT FROM posts r WHERE r.uri = c.uri)
  AND NOT EXISTS (SELECT FROM reposts r WHERE r.uri = c.uri)
  AND NOT EXISTS (SELECT FROM follows r WHERE r.uri = c.uri)
