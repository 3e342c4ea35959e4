-- Deletes follows that are older than their deletes ($1: URIs; $2-$5: versions), with their notifications. Rows are found like
-- those of look.sql.
WITH k AS MATERIALIZED (
    SELECT x.uri
    FROM unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::bigint[]) AS o (uri, rev, seq, ms, sq), LATERAL (
        SELECT * FROM follows r WHERE r.uri = o.uri OFFSET 0) x
    WHERE standpipe.newer(o.rev, o.seq, o.ms, o.sq, x.commit_rev, x.commit_seq, x.stream_ms, x.stream_seq)
),
d AS (DELETE FROM follows r WHERE r.uri = ANY (ARRAY(SELECT k.uri FROM k))),
n AS (
    DELETE FROM notifications n WHERE n.uri = ANY (ARRAY(SELECT k.uri || '#notification' FROM k))
      AND current_setting('standpipe.notifications', true) IS DISTINCT FROM 'off'
)
SELECT k.uri::text FROM k
