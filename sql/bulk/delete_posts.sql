-- Deletes posts without gates that are older than their deletes ($1: URIs; $2-$5: versions), with what they caused.
-- Returns for each the post that it replied to and the one that it quoted.
WITH d AS (
    DELETE FROM posts r USING unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::bigint[]) AS o (uri, rev, seq, ms, sq)
    WHERE r.uri = o.uri AND standpipe.newer(
        o.rev, o.seq, o.ms, o.sq, r.commit_rev, r.commit_seq, r.stream_ms, r.stream_seq)
    RETURNING r.uri, r.parent_uri, r.facets
),
q AS (DELETE FROM quotes q USING d WHERE q.post_uri = d.uri RETURNING q.post_uri, q.quoted_uri),
f AS (DELETE FROM feed_items f USING d WHERE f.uri = d.uri),
l AS (DELETE FROM labels l USING d WHERE l.subject = d.uri AND l.uri = d.uri || '#label/' || l.val),
n AS (
    DELETE FROM notifications n USING d
    WHERE n.uri = ANY (ARRAY[d.uri || '#notification/reply', d.uri || '#notification/quote']
                       || ARRAY(SELECT d.uri || '#notification/mention/' || m FROM unnest(standpipe.mentioned(d.facets)) m))
      AND current_setting('standpipe.notifications', true) IS DISTINCT FROM 'off'
)
SELECT d.uri, d.parent_uri, (SELECT q.quoted_uri FROM q WHERE q.post_uri = d.uri LIMIT 1) FROM d
