-- The quotes among these ($1) whose post is gone.
SELECT q.uri, q.quoted_uri::text, 'none'
FROM quotes q
WHERE q.uri = ANY ($1::text[]) AND NOT EXISTS (SELECT FROM posts p WHERE p.uri = q.post_uri)
