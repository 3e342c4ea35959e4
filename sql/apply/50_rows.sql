-- The rows of the record with this URI, with the kind of their delete and their versions. subject: of a gate, its post.
CREATE OR REPLACE FUNCTION standpipe.record_rows(key text) RETURNS TABLE (
    kind text, subject text, commit_rev text, commit_seq text, stream_ms bigint, stream_seq bigint
) LANGUAGE sql STABLE AS $$
    SELECT 'delete post', NULL, commit_rev, commit_seq, stream_ms, stream_seq FROM posts WHERE uri = key
    UNION ALL SELECT 'delete like', NULL, commit_rev, commit_seq, stream_ms, stream_seq FROM likes WHERE uri = key
    UNION ALL SELECT 'delete repost', NULL, commit_rev, commit_seq, stream_ms, stream_seq FROM reposts WHERE uri = key
    UNION ALL SELECT 'delete bookmark', NULL, commit_rev, commit_seq, stream_ms, stream_seq FROM bookmarks WHERE uri = key
    UNION ALL SELECT 'delete follow', NULL, commit_rev, commit_seq, stream_ms, stream_seq FROM follows WHERE uri = key
    UNION ALL SELECT * FROM standpipe.plain_rows(key)
    UNION ALL SELECT 'delete thread_gate', post_uri, commit_rev, commit_seq, stream_ms, stream_seq FROM thread_gates
        WHERE key LIKE '%/app.bsky.feed.threadgate/%'
          AND post_uri = replace(key, '/app.bsky.feed.threadgate/', '/app.bsky.feed.post/')
    UNION ALL SELECT 'delete post_gate', post_uri, commit_rev, commit_seq, stream_ms, stream_seq FROM post_gates
        WHERE key LIKE '%/app.bsky.feed.postgate/%'
          AND post_uri = replace(key, '/app.bsky.feed.postgate/', '/app.bsky.feed.post/')
$$;
