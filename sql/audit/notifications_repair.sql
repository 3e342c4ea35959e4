-- Creates them again. A like's or repost's row does not keep the record's CID.
SELECT standpipe.notify_pointer(o, why, true) FROM (
    SELECT 'like' AS why, r.uri, r.user_did, r.post_uri, r.via, r.created_at, r.commit_rev, r.stream_ms, r.indexed_at
    FROM likes r WHERE r.uri = ANY ($1::text[])
    UNION ALL
    SELECT 'repost', r.uri, r.user_did, r.post_uri, r.via, r.created_at, r.commit_rev, r.stream_ms, r.indexed_at
    FROM reposts r WHERE r.uri = ANY ($1::text[])
) r CROSS JOIN LATERAL jsonb_populate_record(NULL::standpipe.op, jsonb_build_object(
    'repo', r.user_did, 'uri', r.uri, 'subject', r.post_uri, 'body', r.via,
    'ms', r.stream_ms,
    'sort_at', standpipe.sorted_at(r.uri, r.created_at, r.commit_rev, r.stream_ms, r.indexed_at))) o
UNION ALL
SELECT standpipe.notify(o, '', f.following_did, 'follow', NULL, true)
FROM follows f CROSS JOIN LATERAL jsonb_populate_record(NULL::standpipe.op, jsonb_build_object(
    'repo', f.follower_did, 'uri', f.uri,
    'ms', f.stream_ms,
    'sort_at', standpipe.sorted_at(f.uri, f.created_at, f.commit_rev, f.stream_ms, f.indexed_at))) o
WHERE f.uri = ANY ($1::text[])
UNION ALL
SELECT standpipe.notify_post(o, true, NULL)
FROM posts p LEFT JOIN quotes q ON q.uri = p.uri
CROSS JOIN LATERAL jsonb_populate_record(NULL::standpipe.op, jsonb_build_object(
    'repo', p.author_did, 'uri', p.uri, 'cid', p.cid, 'subject', q.quoted_uri,
    'body', jsonb_strip_nulls(jsonb_build_object('parent_uri', p.parent_uri, 'facets', p.facets)),
    'ms', p.stream_ms,
    'sort_at', standpipe.sorted_at(p.uri, p.created_at, p.commit_rev, p.stream_ms, p.indexed_at))) o
WHERE p.uri = ANY ($1::text[])
