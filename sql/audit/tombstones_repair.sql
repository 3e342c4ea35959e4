-- Applies these deletes ($1: URIs) again, with all their effects: counters, feed items, notifications.
WITH dead AS MATERIALIZED (
    SELECT k.key, split_part(k.key, '/', 3) AS did, r.kind, r.subject,
           t.commit_rev AS rev, t.commit_seq AS seq, t.stream_ms AS ms, t.stream_seq AS sq
    FROM unnest($1::text[]) AS k (key)
    JOIN standpipe.tombstones t ON t.uri = k.key
    CROSS JOIN LATERAL standpipe.record_rows(k.key) r
    WHERE standpipe.newer(t.commit_rev, t.commit_seq, t.stream_ms, t.stream_seq,
                          r.commit_rev, r.commit_seq, r.stream_ms, r.stream_seq)
)
SELECT standpipe.apply(
    ARRAY(SELECT DISTINCT n.name COLLATE "C" FROM (
        SELECT unnest(ARRAY[s.did, CASE WHEN s.kind = 'delete post' THEN s.key END, s.subject])
        FROM dead s
    ) n (name) WHERE n.name IS NOT NULL ORDER BY 1),
    ARRAY(SELECT DISTINCT s.did COLLATE "C" FROM dead s ORDER BY 1),
    NULL, NULL, NULL,
    ARRAY(SELECT jsonb_populate_record(NULL::standpipe.op, jsonb_build_object(
              'repo', s.did, 'uri', s.key, 'subject', s.subject, 'rev', s.rev, 'seq', s.seq, 'ms', s.ms, 'sq', s.sq))
          FROM dead s ORDER BY s.key COLLATE "C", s.kind),
    ARRAY(SELECT s.kind FROM dead s ORDER BY s.key COLLATE "C", s.kind)
)
