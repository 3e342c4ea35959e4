-- The records among these ($1: URIs of likes, reposts, follows and posts) with a missing notification
-- (sql/apply/11_notifications.sql). Rows of the old workers are skipped, because their notifications follow other
-- rules. If standpipe.notifications is off, the table belongs to somebody else.
WITH pointers AS (
    SELECT r.uri, r.user_did, r.post_uri, r.via FROM likes r
    WHERE r.uri = ANY ($1::text[]) AND r.stream_ms IS NOT NULL
    UNION ALL
    SELECT r.uri, r.user_did, r.post_uri, r.via FROM reposts r
    WHERE r.uri = ANY ($1::text[]) AND r.stream_ms IS NOT NULL
), expected (cause, ending, author, recipient) AS (
    SELECT r.uri, '', r.user_did, split_part(r.post_uri, '/', 3) FROM pointers r
    UNION ALL
    SELECT r.uri, '/via-repost', r.user_did, split_part(r.via ->> 'uri', '/', 3) FROM pointers r
    WHERE r.via ->> 'uri' LIKE 'at://%' AND length(r.via ->> 'uri') <= 512
      AND split_part(r.via ->> 'uri', '/', 3) <> split_part(r.post_uri, '/', 3)
    UNION ALL
    SELECT f.uri, '', f.follower_did, f.following_did FROM follows f
    WHERE f.uri = ANY ($1::text[]) AND f.stream_ms IS NOT NULL
    UNION ALL
    SELECT p.uri, '/reply', p.author_did, split_part(p.parent_uri, '/', 3) FROM posts p
    WHERE p.uri = ANY ($1::text[]) AND p.stream_ms IS NOT NULL AND p.parent_uri IS NOT NULL
    UNION ALL
    SELECT p.uri, '/quote', p.author_did, split_part(q.quoted_uri, '/', 3)
    FROM posts p JOIN quotes q ON q.uri = p.uri
    WHERE p.uri = ANY ($1::text[]) AND p.stream_ms IS NOT NULL
    UNION ALL
    SELECT p.uri, '/mention/' || d, p.author_did, d
    FROM posts p CROSS JOIN LATERAL unnest(standpipe.mentioned(p.facets)) d
    WHERE p.uri = ANY ($1::text[]) AND p.stream_ms IS NOT NULL
)
SELECT e.cause::text, 'none', string_agg(e.ending || ' to ' || e.recipient, ', ')
FROM expected e
WHERE current_setting('standpipe.notifications', true) IS DISTINCT FROM 'off'
  AND e.recipient LIKE 'did:%' AND e.recipient <> e.author AND length(e.recipient) <= 255
  AND length(e.cause || '#notification' || e.ending) <= 512
  AND NOT EXISTS (SELECT FROM notifications n
                  WHERE n.uri = e.cause || '#notification' || e.ending AND n.recipient_did = e.recipient)
GROUP BY e.cause
