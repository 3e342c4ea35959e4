-- Applies these deletes ($1: URIs) again, with all their effects: counters, feed items, notifications.
WITH dead AS MATERIALIZED (
    SELECT k.key, split_part(k.key, '/', 3) AS did, r.kind, r.subject,
           t.commit_rev AS rev, t.commit_seq AS seq, t.stream_ms AS ms, t.stream_seq AS sq
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
)
SELECT standpipe.apply(
    ARRAY(SELECT DISTINCT n.name COLLATE "C" FROM (
        SELECT unnest(ARRAY[s.did, CASE WHEN s.kind = 'delete post' THEN s.key END, s.subject])
        FROM dead s
    ) n (name) WHERE n.name IS NOT NULL ORDER BY 1),
    ARRAY(SELECT DISTINCT s.did COLLATE "C" FROM dead s ORDER BY 1),
    NULL, NULL, NULL,
    ARRAY(SELECT jsonb_populate_record(NULL::standpipe.op, jsonb_build_object(
              'repo', s.did, 'uri', s.key, 'subject', s.subject, 'rev', s.rev, 'seq', s.seq, 'ms', s.ms, 'sq', s.sq))
          FROM dead s ORDER BY s.key COLLATE "C", s.kind),
    ARRAY(SELECT s.kind FROM dead s ORDER BY s.key COLLATE "C", s.kind)
)
