-- Deletes reposts that are older than their deletes ($1: URIs; $2-$5: versions), with what they caused. Returns for each its
-- subject, its account, and whether the account has another one of the same subject.
WITH d AS (
    DELETE FROM reposts r USING unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::bigint[]) AS o (uri, rev, seq, ms, sq)
    WHERE r.uri = o.uri AND standpipe.newer(
        o.rev, o.seq, o.ms, o.sq, r.commit_rev, r.commit_seq, r.stream_ms, r.stream_seq)
    RETURNING r.uri, r.post_uri, r.user_did
),
f AS (DELETE FROM feed_items f USING d WHERE f.uri = d.uri),
n AS (
    DELETE FROM notifications n USING d
    WHERE n.uri = ANY (ARRAY[d.uri || '#notification', d.uri || '#notification/via-repost'])
      AND current_setting('standpipe.notifications', true) IS DISTINCT FROM 'off'
)
SELECT d.uri, d.post_uri, d.user_did, EXISTS (
    SELECT FROM reposts x WHERE x.post_uri = d.post_uri AND x.user_did = d.user_did
      AND NOT EXISTS (SELECT FROM d e WHERE e.uri = x.uri))
FROM d
