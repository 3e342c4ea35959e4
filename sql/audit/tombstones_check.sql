-- The tombstones among these ($1: URIs) that have an older row. A worker without tombstones that runs alongside us can
-- create such rows.
SELECT s.key, s.what, 'none'
FROM (
    SELECT k.key, replace(r.kind, 'delete ', 'a ') AS what
    FROM unnest($1::text[]) AS k (key)
    JOIN standpipe.tombstones t ON t.uri = k.key
    CROSS JOIN LATERAL standpipe.record_rows(k.key) r
    WHERE standpipe.newer(t.commit_rev, t.commit_seq, t.stream_ms, t.stream_seq,
                          r.commit_rev, r.commit_seq, r.stream_ms, r.stream_seq)
) s
