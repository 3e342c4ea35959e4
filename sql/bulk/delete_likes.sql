-- Deletes likes that are older than their deletes ($1: URIs; $2-$5: versions), with what they caused. Returns for each its
-- subject, its account, and whether the account has another one of the same subject. Rows are found like those of look.sql
-- and others.sql.
WITH k AS MATERIALIZED (
    SELECT x.uri, x.post_uri, x.user_did
    FROM unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::bigint[]) AS o (uri, rev, seq, ms, sq), LATERAL (
        SELECT * FROM likes r WHERE r.uri = o.uri OFFSET 0) x
    WHERE standpipe.newer(o.rev, o.seq, o.ms, o.sq, x.commit_rev, x.commit_seq, x.stream_ms, x.stream_seq)
),
d AS (DELETE FROM likes r WHERE r.uri = ANY (ARRAY(SELECT k.uri FROM k))),
n AS (
    DELETE FROM notifications n
    WHERE n.uri = ANY (ARRAY(
        SELECT k.uri || ending FROM k, unnest('{#notification,#notification/via-repost}'::text[]) ending))
      AND current_setting('standpipe.notifications', true) IS DISTINCT FROM 'off'
)
SELECT k.uri::text, k.post_uri::text, k.user_did::text, coalesce((
    SELECT true FROM likes x
    WHERE (x.post_uri, x.user_did) >= (k.post_uri, k.user_did) AND (x.post_uri, x.user_did) <= (k.post_uri, k.user_did)
      AND x.uri <> ALL (ARRAY(SELECT k.uri FROM k))
    ORDER BY x.post_uri, x.user_did LIMIT 1), false)
FROM k
