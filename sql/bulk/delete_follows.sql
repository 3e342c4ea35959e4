-- Deletes follows that are older than their deletes ($1: URIs; $2-$5: versions), with their notifications.
WITH d AS (
    DELETE FROM follows r USING unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::bigint[]) AS o (uri, rev, seq, ms, sq)
    WHERE r.uri = o.uri AND standpipe.newer(
        o.rev, o.seq, o.ms, o.sq, r.commit_rev, r.commit_seq, r.stream_ms, r.stream_seq)
    RETURNING r.uri
),
n AS (
    DELETE FROM notifications n USING d WHERE n.uri = d.uri || '#notification'
      AND current_setting('standpipe.notifications', true) IS DISTINCT FROM 'off'
)
SELECT d.uri FROM d
