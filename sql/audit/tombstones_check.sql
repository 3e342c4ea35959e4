-- The tombstones among these ($1: URIs) that have an older row. A worker without tombstones that runs alongside us can
-- create such rows.
SELECT s.key, s.what, 'none'
FROM (
    SELECT k.key, replace(r.kind, 'delete ', 'a ') AS what
    FROM unnest($1::text[]) AS k (key)
    JOIN standpipe.tombstones t ON t.uri = k.key
    CROSS JOIN LATERAL (
        SELECT 'delete post', NULL, commit_rev, commit_seq, stream_ms, stream_seq FROM posts WHERE uri = k.key
        UNION ALL SELECT 'delete like', NULL, commit_rev, commit_seq, stream_ms, stream_seq FROM likes WHERE uri = k.key
        UNION ALL SELECT 'delete repost', NULL, commit_rev, commit_seq, stream_ms, stream_seq FROM reposts WHERE uri = k.key
        UNION ALL SELECT 'delete bookmark', NULL, commit_rev, commit_seq, stream_ms, stream_seq FROM bookmarks WHERE uri = k.key
        UNION ALL SELECT 'delete follow', NULL, commit_rev, commit_seq, stream_ms, stream_seq FROM follows WHERE uri = k.key
        UNION ALL SELECT * FROM standpipe.plain_rows(k.key)
        UNION ALL SELECT 'delete thread_gate', post_uri, commit_rev, commit_seq, stream_ms, stream_seq FROM thread_gates
            WHERE k.key LIKE '%/app.bsky.feed.threadgate/%'
              AND post_uri = replace(k.key, '/app.bsky.feed.threadgate/', '/app.bsky.feed.post/')
        UNION ALL SELECT 'delete post_gate', post_uri, commit_rev, commit_seq, stream_ms, stream_seq FROM post_gates
            WHERE k.key LIKE '%/app.bsky.feed.postgate/%'
              AND post_uri = replace(k.key, '/app.bsky.feed.postgate/', '/app.bsky.feed.post/')
    ) r (kind, subject, commit_rev, commit_seq, stream_ms, stream_seq)
    WHERE standpipe.newer(t.commit_rev, t.commit_seq, t.stream_ms, t.stream_seq,
                          r.commit_rev, r.commit_seq, r.stream_ms, r.stream_seq)
) s
