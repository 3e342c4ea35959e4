-- Deletes posts without gates that are older than their deletes ($1: URIs; $2-$5: versions), with what they caused.
-- Returns for each the post that it replied to and the one that it quoted. Rows are found like those of look.sql.
WITH k AS MATERIALIZED (
    SELECT x.uri, x.parent_uri, x.facets
    FROM unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::bigint[]) AS o (uri, rev, seq, ms, sq), LATERAL (
        SELECT * FROM posts r WHERE r.uri = o.uri OFFSET 0) x
    WHERE standpipe.newer(o.rev, o.seq, o.ms, o.sq, x.commit_rev, x.commit_seq, x.stream_ms, x.stream_seq)
),
d AS (DELETE FROM posts r WHERE r.uri = ANY (ARRAY(SELECT k.uri FROM k))),
q AS (DELETE FROM quotes q WHERE q.post_uri = ANY (ARRAY(SELECT k.uri FROM k)) RETURNING q.post_uri, q.quoted_uri),
f AS (DELETE FROM feed_items f WHERE f.uri = ANY (ARRAY(SELECT k.uri FROM k))),
l AS (
    DELETE FROM labels l
    WHERE l.subject = ANY (ARRAY(SELECT k.uri FROM k)) AND l.uri = l.subject || '#label/' || l.val
),
n AS (
    DELETE FROM notifications n
    WHERE n.uri = ANY (ARRAY(
        SELECT k.uri || ending FROM k, unnest('{#notification/reply,#notification/quote}'::text[]) ending
        UNION ALL
        SELECT k.uri || '#notification/mention/' || did FROM k, unnest(standpipe.mentioned(k.facets)) did))
      AND current_setting('standpipe.notifications', true) IS DISTINCT FROM 'off'
)
SELECT k.uri::text, k.parent_uri::text, (SELECT q.quoted_uri::text FROM q WHERE q.post_uri = k.uri LIMIT 1) FROM k
