-- Feed items that are missing or of the wrong type. A repost's row does not keep the repost's own CID.
INSERT INTO feed_items (uri, post_uri, originator_did, type, sort_at, cid, created_at)
SELECT uri, uri, author_did, CASE WHEN parent_uri IS NULL THEN 'post' ELSE 'reply' END,
       standpipe.sorted_at(uri, created_at, commit_rev, stream_ms, indexed_at), cid, created_at
FROM posts WHERE uri = ANY ($1::text[])
UNION ALL
SELECT uri, post_uri, user_did, 'repost',
       standpipe.sorted_at(uri, created_at, commit_rev, stream_ms, indexed_at), '', created_at
FROM reposts WHERE uri = ANY ($1::text[])
ON CONFLICT (uri) DO UPDATE SET type = excluded.type WHERE feed_items.type <> excluded.type
