-- The records among these ($1: URIs of likes, reposts, follows and posts) with a missing notification
-- (sql/apply/11_notifications.sql). Rows of the old workers are skipped, because their notifications follow other
-- rules.
WITH pointers AS (
    SELECT r.uri, r.user_did, r.post_uri, r.via, r.created_at, r.commit_rev, r.stream_ms FROM likes r
    WHERE r.uri = ANY ($1::text[]) AND r.stream_ms IS NOT NULL
    UNION ALL
    SELECT r.uri, r.user_did, r.post_uri, r.via, r.created_at, r.commit_rev, r.stream_ms FROM reposts r
    WHERE r.uri = ANY ($1::text[]) AND r.stream_ms IS NOT NULL
), expected (cause, ending, author, recipient, created_at, rev, arrived) AS (
    SELECT r.uri, '', r.user_did, split_part(r.post_uri, '/', 3), r.created_at, r.commit_rev, r.stream_ms
    FROM pointers r
    UNION ALL
    SELECT r.uri, '/via-repost', r.user_did, split_part(r.via ->> 'uri', '/', 3), r.created_at, r.commit_rev, r.stream_ms
    FROM pointers r
    WHERE r.via ->> 'uri' LIKE 'at://%' AND length(r.via ->> 'uri') <= 512
      AND split_part(r.via ->> 'uri', '/', 3) <> split_part(r.post_uri, '/', 3)
    UNION ALL
    SELECT f.uri, '', f.follower_did, f.following_did, f.created_at, f.commit_rev, f.stream_ms
    FROM follows f
    WHERE f.uri = ANY ($1::text[]) AND f.stream_ms IS NOT NULL
    UNION ALL
    SELECT p.uri, '/reply', p.author_did, split_part(p.parent_uri, '/', 3), p.created_at, p.commit_rev, p.stream_ms
    FROM posts p
    WHERE p.uri = ANY ($1::text[]) AND p.stream_ms IS NOT NULL AND p.parent_uri IS NOT NULL
    UNION ALL
    SELECT p.uri, '/quote', p.author_did, split_part(q.quoted_uri, '/', 3), p.created_at, p.commit_rev, p.stream_ms
    FROM posts p JOIN quotes q ON q.uri = p.uri
    WHERE p.uri = ANY ($1::text[]) AND p.stream_ms IS NOT NULL
    UNION ALL
    SELECT p.uri, '/mention/' || d, p.author_did, d, p.created_at, p.commit_rev, p.stream_ms
    FROM posts p CROSS JOIN LATERAL unnest(standpipe.mentioned(p.facets)) d
    WHERE p.uri = ANY ($1::text[]) AND p.stream_ms IS NOT NULL
)
SELECT e.cause::text, 'none', string_agg(e.ending || ' to ' || e.recipient, ', ')
FROM expected e
WHERE standpipe.notifies(e.arrived, standpipe.sorted_at(e.cause, e.created_at, e.rev, e.arrived, NULL))
  AND e.recipient LIKE 'did:%' AND e.recipient <> e.author AND length(e.recipient) <= 255
  AND length(e.cause || '#notification' || e.ending) <= 512
  AND NOT EXISTS (SELECT FROM notifications n
                  WHERE n.uri = e.cause || '#notification' || e.ending AND n.recipient_did = e.recipient)
GROUP BY e.cause
